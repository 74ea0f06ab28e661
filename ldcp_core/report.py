"""The pruning report: what gates prune, what that saves, and what a run really did.

The facts are gathered once, in `Report`; the table that a fit prints, the text and image of
ComfyUI's report node and the command line all show these same facts. Savings are counted from the
architecture; what a run did is measured, by the host that ran it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .blocks import Latent, Padding, PrunedSite
from .cost import Savings, SiteSaving, savings
from .gates import THRESHOLD, Gates
from .pruning import Pruned, padding_of
from .schedule import ALWAYS, Schedule, StepRange
from .sites import Topology, block_of, short_name

MIB = 2**20


class RunFacts(Protocol):
    """What a host has counted during one run of a pruned model."""

    @property
    def sampled(self) -> bool:
        """Whether a sampler ran, as the host announces it."""

    @property
    def steps(self) -> int | None:
        """Steps of the sampler's schedule; None when no evaluation said."""

    @property
    def pruned_steps(self) -> AbstractSet[int]:
        """0-based steps with at least one pruned evaluation."""

    @property
    def evaluations(self) -> int: ...

    @property
    def pruned_evaluations(self) -> int: ...

    @property
    def device(self) -> str:
        """Where the model computes, e.g. "cuda:0"."""

    @property
    def full_bytes(self) -> int:
        """Bytes of the gated layers before pruning."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of them on the compute device during pruned evaluations."""

    @property
    def kept_full(self) -> str:
        """Why full weights stayed on the compute device; empty when they left it."""


@dataclass(frozen=True)
class ReportLayer:
    """One set of gates, what is kept of it (site -> bool [C]), and when, where that is known."""

    gates: Gates
    keep_sets: Mapping[str, Tensor]
    schedule: Schedule | None = None

    @property
    def corrections(self) -> set[str]:
        """The sites of which the gates have a correction that holds for what is kept."""
        pruned = self.gates.pruned(self.keep_sets)
        return {name for name, site in pruned.items() if site.correction is not None}

    def __str__(self) -> str:
        kept = sum(int(keep.sum()) for keep in self.keep_sets.values())
        channels = sum(keep.numel() for keep in self.keep_sets.values())
        words = [
            f"{len(self.keep_sets)} site{'s' * (len(self.keep_sets) != 1)}",
            f"{1 - kept / channels if channels else 0:.1%} of {channels:,} channels pruned",
            f"rule {self.gates.padding!r}",
        ]
        return ", ".join(words if self.schedule is None else [*words, str(self.schedule)])


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    ``scores[site]`` (float [C]) and ``keep_sets[site]`` (bool [C]) are those of the last layer
    that names the site; ``savings`` is of an evaluation in which all layers prune. ``notes`` are
    sentences of the host on these gates and their run.
    """

    layers: tuple[ReportLayer, ...]
    scores: Mapping[str, Tensor]
    keep_sets: Mapping[str, Tensor]
    savings: Savings
    bytes_per_parameter: int
    latent: Latent
    run: RunFacts | None = None
    notes: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int:
        return self.savings.saved_bytes(self.bytes_per_parameter)

    @property
    def unet_bytes(self) -> int:
        return self.savings.unet.parameters * self.bytes_per_parameter

    @property
    def as_learned(self) -> bool:
        """Whether exactly the channels with a score above 0.5 are kept."""
        return all(
            bool(((score > THRESHOLD) == self.keep_sets[site]).all())
            for site, score in self.scores.items()
        )

    def gates_lines(self) -> list[str]:
        """A line per set of gates, and what there is to know about all of them."""
        lines = [str(layer) for layer in self.layers]
        if len(lines) > 1:
            staged = all(layer.schedule and layer.schedule.stage for layer in self.layers)
            word = "stage" if staged else "gates"
            lines = [f"{word} {number}: {line}" for number, line in enumerate(lines, 1)]
            lines.append("where several gate the same site, the later ones are shown")
        found = [(id(layer.gates.corrections), layer) for layer in self.layers]  # stages share them
        known = {(of, site) for of, layer in found for site in layer.gates.corrections}
        if known:
            used = {(of, site) for of, layer in found for site in layer.corrections}
            why = "" if used else ": they are for the channels that are kept as learned"
            lines.append(f"corrections in use: {len(used)} of {len(known)}{why}")
        if self.savings.kept == self.savings.channels:
            lines.append("nothing is pruned: all channels are kept")
        return lines

    def counted_lines(self) -> list[str]:
        """What one pruned evaluation leaves out, absolute and as a share of the U-Net."""
        saved, unet = self.savings.saved, self.savings.unet
        return [
            f"weights: {show_bytes(self.saved_bytes)} of {show_bytes(self.unet_bytes)} left out "
            f"({self.savings.parameter_share:.2%} of the U-Net)",
            f"compute: {show_flops(saved.flops)} of {show_flops(unet.flops)} left out "
            f"({self.savings.flop_share:.2%} of the U-Net)",
        ]

    def counted_for(self) -> str:
        """What the counted figures hold for."""
        return (
            f"{self.bytes_per_parameter} bytes per parameter, "
            f"{self.latent.height}x{self.latent.width} latent, batch {self.latent.batch}"
        )

    def measured_lines(self) -> list[str]:
        """What the run did; empty without one."""
        if self.run is None:
            return []
        return [line for line in (run_line(self.run), *bytes_lines(self.run)) if line]

    def text(self) -> str:
        """The report as plain text, at most 80 columns except for what a host has to say."""
        lines = [*self.gates_lines(), "", *_table(self.savings), ""]
        counted = [*self.counted_lines(), f"per pruned evaluation, {self.counted_for()}"]
        lines += [f"counted   {line}" for line in counted]
        lines += [f"measured  {line}" for line in self.measured_lines()]
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)


def build_report(
    layers: Sequence[ReportLayer],
    topology: Topology,
    bytes_per_parameter: int = 2,
    latent: Latent | None = None,
    run: RunFacts | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The report on gates attached one after the other to a U-Net; of a site the later wins.

    Raises ValueError for a site that the topology does not have.
    """
    latent = latent or Latent()
    pruned: dict[str, PrunedSite] = {}
    scores: dict[str, Tensor] = {}
    for layer in layers:
        pruned |= layer.gates.pruned(layer.keep_sets)
        scores |= {site: layer.gates.scores[site] for site in layer.keep_sets}
    found = _savings(topology, pruned, latent)
    sites = [row.site for row in found.sites]
    return Report(
        tuple(layers),
        {site: scores[site].detach().cpu() for site in sites},
        {site: pruned[site].keep.cpu() for site in sites},
        found,
        bytes_per_parameter,
        latent,
        run,
        tuple(notes),
    )


def gates_report(gates: Gates, latent: Latent | None = None) -> Report:
    """The report on gates as learned, for their own U-Net in half precision."""
    return build_report(layers_as_learned(gates), gates.topology, latent=latent)


def layers_as_learned(gates: Gates) -> list[ReportLayer]:
    """What gates prune as learned: one layer for each of their stages."""
    return [
        ReportLayer(gates, kept, None if stage is None else ALWAYS.during(stage))
        for stage, kept in gates.by_stage()
    ]


def _savings(topology: Topology, pruned: Pruned, latent: Latent) -> Savings:
    by_rule: dict[Padding, dict[str, int]] = {"zero": {}, "extend": {}}
    for name, site in pruned.items():
        by_rule[padding_of(block_of(name), pruned)][name] = int(site.keep.sum())
    parts = [savings(topology, kept, rule, latent) for rule, kept in by_rule.items()]
    order = {site.name: place for place, site in enumerate(topology.all_sites())}
    rows: list[SiteSaving] = sorted(
        (row for part in parts for row in part.sites), key=lambda row: order[row.site]
    )
    return Savings(tuple(rows), parts[0].unet)


def _table(found: Savings) -> list[str]:
    width = max([32, *(len(short_name(row.site)) for row in found.sites)])
    head = f"{'site':<{width}} {'kept':>11} {'pruned':>7} {'parameters':>12} {'MFLOP':>11}"
    rule, saved = "-" * len(head), found.saved
    rows = [
        f"{short_name(row.site):<{width}} {row.kept:>5}/{row.channels:<5} "
        f"{1 - row.kept / row.channels:>7.1%} "
        f"{-row.saved.parameters:>12,} {-row.saved.flops / 1e6:>11,.1f}"
        for row in found.sites
    ]
    total = (
        f"{'total':<{width}} {found.kept:>5}/{found.channels:<5} {found.sparsity:>7.1%} "
        f"{-saved.parameters:>12,} {-saved.flops / 1e6:>11,.1f}"
    )
    share = (
        f"{'share of the whole U-Net':<{width + 20}} {0 - found.parameter_share:>12.2%} "
        f"{0 - found.flop_share:>11.2%}"
    )
    return [head, rule, *rows, rule, total, share]


def run_line(run: RunFacts) -> str:
    """Which steps ran pruned, such as "steps 5-19 of 20 ran pruned (15 of 20 evaluations)"."""
    evaluations = f"{run.pruned_evaluations} of {run.evaluations} evaluations"
    if run.sampled and not run.evaluations:
        return "sampled, but the model was never asked: nothing was pruned"
    if run.steps is None:
        return f"{evaluations} ran pruned{'' if run.sampled else ', without a sampler'}"
    pruned = show_steps(run.pruned_steps) if run.pruned_steps else "no step"
    return f"{pruned} of {run.steps} ran pruned ({evaluations})"


def bytes_lines(run: RunFacts) -> list[str]:
    """What lay on the compute device of the gated layers, and why it was that much."""
    if not run.pruned_evaluations:
        return []
    lines = [
        f"gated layers on {run.device}: {show_bytes(run.resident_bytes)} resident, "
        f"{show_bytes(run.full_bytes)} in full"
    ]
    return [*lines, f"full weights stayed: {run.kept_full}"] if run.kept_full else lines


def show_steps(steps: Collection[int]) -> str:
    """Step numbers as ranges.

    >>> show_steps({0, 1, 2, 7, 9, 10}), show_steps({3})
    ('steps 0-2, 7, 9-10', 'step 3')
    """
    ranges: list[StepRange] = []
    for step in sorted(steps):
        if ranges and ranges[-1].last == step - 1:
            ranges[-1] = StepRange(ranges[-1].first, step)
        else:
            ranges.append(StepRange(step, step))
    return f"step{'s' * (len(steps) != 1)} {', '.join(map(str, ranges))}"


def show_bytes(count: int) -> str:
    """
    >>> show_bytes(3 * 2**20), show_bytes(1536), show_bytes(0)
    ('3.0 MiB', '1.5 KiB', '0.0 MiB')
    """
    if 0 < count < MIB / 10:
        return f"{count / 1024:,.1f} KiB"
    return f"{count / MIB:,.1f} MiB"


def show_saved(count: int) -> str:
    """Bytes that were saved, or taken besides where the count is negative.

    >>> show_saved(3 * 2**20), show_saved(-(2**20)), show_saved(0)
    ('3.0 MiB less', '1.0 MiB more', 'the same')
    """
    return f"{show_bytes(abs(count))} {'less' if count > 0 else 'more'}" if count else "the same"


def show_flops(count: int) -> str:
    """
    >>> show_flops(1_606_500_000_000), show_flops(7_100_000), show_flops(0)
    ('1,606.5 GFLOP', '7.1 MFLOP', '0.0 GFLOP')
    """
    if 0 < count < 10**8:
        return f"{count / 1e6:,.1f} MFLOP"
    return f"{count / 1e9:,.1f} GFLOP"
