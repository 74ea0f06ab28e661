"""Patching a model with gates, and telling the user what that does."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ldcp_core import ALWAYS, Gates, PercentRange, Schedule, Topology, savings
from ..ldcp_core.report import bytes_lines, run_line
from ..ldcp_core.text import quoted
from .host.identity import DIFFERS, differs_from_training
from .host.model import model_topology
from .host.parking import FULL_WEIGHTS, FullWeights
from .host.patch import attach
from .host.record import RunRecord
from .host.run import Layer
from .inputs import check_offered, check_share, check_text
from .queued import inputs_of
from .shared import CATEGORY, GatesType, ScheduleType, schema, server, show_on_node, warn

CHANNELS = ["as learned", "a share"]
#: as a sparsity: what prompts and workflows say that were made before ``channels`` was there
AS_LEARNED = -1.0
#: has every site that a U-Net of any family has: what is checked before the model is known
LARGEST = Topology(down=((10, 10),) * 4, mid=(10, 0), up=((10, 10, 10),) * 4, heads=(8, 8, 8, 8))
SHOWN_NOTES = 3  # on the node
#: seconds between two looks at a run that is going on
EVERY = 0.5
log = logging.getLogger("ldcp")


def wanted_share(channels: str, sparsity: float) -> float | None:
    """The share of the gated channels to prune; None for those that were learned.

    Raises ValueError for what the widgets do not offer, but for the sparsity `AS_LEARNED`.
    """
    check_offered("channels", channels, CHANNELS)
    if channels == "as learned" or sparsity == AS_LEARNED:
        return None
    check_share("sparsity", sparsity)
    return sparsity


def chosen_keep_sets(
    gates: Gates, share: float | None, sites: str = ""
) -> list[tuple[PercentRange | None, dict[str, Tensor]]]:
    """The learned keep-sets by stages, or those of a share, of ``sites`` of a scope (empty: all).

    Raises ValueError for an unknown scope, or one without gates.
    """
    check_text("sites", sites)
    if not sites.strip():
        return gates.by_stage(share)
    part = within(gates, sites)
    if share is not None:  # of the part
        return part.by_stage(share)
    return [(when, {site: kept[site] for site in part.scores}) for when, kept in gates.by_stage()]


def within(gates: Gates, sites: str) -> Gates:
    """The part of ``gates`` that lies in a scope; raises ValueError where there is none."""
    named = sites_of_scope(gates.topology, sites)
    scores = {site: score for site, score in gates.scores.items() if site in named}
    if not scores:
        parts = ", ".join(dict.fromkeys(site.split(".")[0] for site in gates.scores))
        raise ValueError(
            f"LDCP: these gates have no site in {quoted(sites)}, only in {parts}; leave 'sites' "
            "empty to prune all that they have, or load gates of a larger scope"
        )
    return replace(gates, scores=scores)


def sites_of_scope(topology: Topology, sites: str) -> set[str]:
    """The names of the sites of a scope; raises ValueError where it cannot be read."""
    try:
        return {site.name for site in topology.sites(sites)}
    except ValueError as error:
        raise ValueError(f"LDCP: sites: {error}") from error


def problem(sparsity: Any, channels: Any = "a share", sites: Any = "") -> str | None:
    """Why these widgets cannot be meant, as far as they are known (sparsity None: not yet)."""
    try:
        if sparsity is not None:
            wanted_share(channels, sparsity)
        check_text("sites", sites)
        if sites.strip():
            sites_of_scope(LARGEST, sites)
    except ValueError as error:
        return str(error)
    return None


def status(model: Any, layers: Sequence[Layer], share: float | None) -> list[str]:
    """Sites and share of channels pruned; bytes that a pruned step does not use; when.

    Lines of their own, because the canvas breaks what is longer than a node inside a word.
    """
    pruned, left_out = [], []
    for layer in layers:
        counts = {site: int(keep.sum()) for site, keep in layer.keep_sets.items()}
        saved = savings(model_topology(model.model), counts, layer.gates.padding)
        pruned.append(f"{saved.sparsity:.1%}")
        left_out.append(f"{saved.saved_bytes(model.model.get_dtype().itemsize) / 2**20:,.1f}")
    sites = len(layers[0].keep_sets)
    requested = "" if share is None else f" ({share:.1%} requested)"
    return [
        f"{sites} site{'s' * (sites != 1)}, {', then '.join(pruned)} pruned{requested}",
        f"{', then '.join(left_out)} MiB of weights left out (counted)",
        ", then ".join(str(layer.schedule) for layer in layers),
    ]


@dataclass
class Status:
    """What an Apply node shows: its own lines, what its run does, and what was noticed."""

    lines: list[str]
    node_id: str | None
    prompt: str | None = None
    #: what the run that is going on, or the latest one, did
    run: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _shown: float = 0.0

    def show(self, new: Sequence[str] = ()) -> None:
        """Show everything; ``new`` is what the user should know and was not shown before."""
        more = len(self.notes) - SHOWN_NOTES
        rest = [f"and {more} more: see Pruning Report, or the log"] if more > 0 else []
        lines = [*self.lines, *self.run, *self.notes[:SHOWN_NOTES], *rest]
        show_on_node("\n".join(lines), self.node_id)
        warn(list(new), self.node_id)
        self._shown = time.monotonic()

    def evaluated(self, record: RunRecord) -> None:
        """Show how far the run has come, now and then."""
        if time.monotonic() - self._shown < EVERY:
            return
        self._forget_other_prompts()
        now = "pruned" if record.pruning else "in full"
        counted = f"{record.pruned_evaluations} of {record.evaluations} evaluations pruned so far"
        self.run = [f"now {now}; {counted}, {record.seconds:.1f} s", *bytes_lines(record)]
        self.show()

    def ended(self, record: RunRecord) -> None:
        """Show what a run did and noticed; a prompt may sample several times with one model."""
        self._forget_other_prompts()
        new = [note for note in record.notes if note not in self.notes]
        self.notes += new
        self.run = [f"{run_line(record)}, {record.seconds:.1f} s", *bytes_lines(record)]
        self.show(new)

    def _forget_other_prompts(self) -> None:
        """Forget what runs of an earlier prompt noticed."""
        prompt = getattr(server(), "last_prompt_id", None)
        if prompt is None or prompt != self.prompt:
            self.prompt, self.notes = prompt, []


class LDCPApplyDynamicPruning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPApplyDynamicPruning",
            display_name="Apply Dynamic Pruning",
            category=CATEGORY,
            description="Prunes channels of a Stable Diffusion model (1.5, 2 or XL) while it "
            "samples: what "
            "the gates prune is not computed. Several in a row add up; where two name the same "
            "layer in the same step, the later one wins.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion model (1.5, 2 or XL), LoRA included."
                ),
                GatesType.Input(
                    "gates",
                    tooltip="Which channels to prune: Load Pruning Gates, Estimate Gates from "
                    "Model or Calibrate Gates.",
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="With channels set to 'a share': how much of the gated channels to "
                    "prune, the least important first. 0.0 prunes nothing, 1.0 all of them; counts "
                    "per layer are rounded to multiples of 8, and the node shows what came out.",
                ),
                ScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="The steps to prune in: Pruning Step Schedule. Unconnected: all steps.",
                ),
                io.Combo.Input(
                    "full_weights",
                    options=list(FULL_WEIGHTS),
                    default="auto",
                    optional=True,
                    tooltip="Where the full weights of pruned layers stay while sampling. auto: "
                    "they leave the GPU when every step prunes, and stay when some steps don't. "
                    "offload: they always leave; steps that don't prune fetch them from main "
                    "memory each time, which is slower. keep: they stay, and the pruned copies "
                    "take extra memory. The image is the same; on a CPU nothing can leave.",
                ),
                io.String.Input(
                    "sites",
                    default="",
                    optional=True,
                    tooltip="Prune only this part of what the gates have: mid, up, down, all, ff "
                    "(the feed-forward layers), heads (of attention), several joined by +, or site "
                    "names such as mid_block.resnets.0.conv1 separated by commas. Empty: "
                    "everything. With two Apply nodes in a row, each part can have its own "
                    "schedule.",
                ),
                io.Combo.Input(
                    "channels",
                    options=CHANNELS,
                    default="as learned",
                    optional=True,
                    tooltip="Which channels to prune. as learned: those that the gates were "
                    "trained to prune, stage by stage where they have stages; sparsity is then "
                    "not used. a share: as many as sparsity "
                    "says, whatever the gates were trained for.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, pruned while it samples.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, sparsity: float | None = None) -> bool | str:
        """Names one input, because ComfyUI repeats the answer for each (see `queued`)."""
        queued = inputs_of(cls.hidden.unique_id if cls.hidden else None)
        known = {name: queued[name] for name in ("channels", "sites") if name in queued}
        return problem(sparsity, **known) or True

    @classmethod
    def execute(
        cls,
        model: Any,
        gates: Gates,
        sparsity: float,
        schedule: Schedule | None = None,
        full_weights: FullWeights = "auto",
        sites: str = "",
        channels: str = "a share",  # in a prompt without it, sparsity says it all
    ) -> io.NodeOutput:
        check_offered("full_weights", full_weights, FULL_WEIGHTS)
        share = wanted_share(channels, sparsity)
        chosen = chosen_keep_sets(gates, share, sites)
        remark = DIFFERS if differs_from_training(model, gates) else ""
        when = ALWAYS if schedule is None else schedule
        layers = [
            Layer(gates, keep_sets, when.during(stage), full_weights, remark)
            for stage, keep_sets in chosen
        ]
        shown = Status([], cls.hidden.unique_id if cls.hidden else None)
        patched = attach(model, *layers, onlooker=shown)
        shown.lines += status(model, layers, share)
        log.info("LDCP: %s", ", ".join(shown.lines))
        remarks = [remark] if remark else []
        for text in remarks:
            log.warning("LDCP: %s", text)
        shown.lines += remarks
        shown.show(remarks)
        return io.NodeOutput(patched)
