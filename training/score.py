"""Rank the channels of a Stable Diffusion U-Net by a criterion, and write a gate file.

    python -m training.score --criterion taylor --demo --target-sparsity 0.3
    python -m training.score --criterion flap --scope all+ff --budget parameters \\
        --model v1-5-pruned-emaonly.safetensors --data ffhq/ --output flap.safetensors

No training: a criterion measures how much each channel matters, and the least important ones go
until the target is met. What stands in for them is the channels' mean over the data, as in a fit.
The importance itself is stored beside the scores.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldcp_core import (
    DEFAULT_FLOOR,
    DEFAULT_SCOPE,
    SCOPES,
    Gates,
    Latent,
    Padding,
    Ranking,
    Site,
    Topology,
    aligned_counts,
    fingerprint,
    gates_report,
    groups_of,
    least_kept,
    save_gates,
    scores_at,
    scores_by_rank,
    short_name,
    top_channels,
)
from ldcp_core.diffusers import topology_of
from training.console import explaining, log_progress, name_of, progress, table
from training.criteria import CRITERIA, CriterionOptions, Importances, Ladder, Subject
from training.data.encoding import FreshImages
from training.data.images import ImageData, open_dataset
from training.data.splits import Split
from training.learning.budget import Budget, BudgetKind
from training.learning.corrections import corrections
from training.model.gating import ChannelMeans
from training.options import (
    BELOW_ONE,
    COUNT,
    SEED,
    Options,
    Precision,
    correction_rank,
    device,
    option,
    parsed,
    require,
)
from training.output import claimed, gate_output
from training.provenance import provenance
from training.session import check_target, fit_to, frozen_model, sites_in
from training.step.denoising import Denoising

log = logging.getLogger("training.score")

#: criteria whose threshold can be given instead of a target sparsity
THRESHOLDS = {name: found.threshold for name, found in CRITERIA.items() if found.threshold}
#: settings that say where to cut, and leave what is measured alone
CUT = ("output", "ranking", "target_sparsity", "budget", "floor", "threshold", "correction_rank")


@dataclass(frozen=True)
class ScoreConfig(Options):
    """What to rank by, on what, and how much to prune."""

    model: str = option("checkpoint file, diffusers folder or hub id")
    data: str = option("folder of images in any of FFHQ's layouts, or a data set")
    output: str = option("the gate file to write (.safetensors)")
    criterion: str = option(
        "; ".join(f"{name}: {found.help}" for name, found in CRITERIA.items()),
        choices=tuple(CRITERIA),
    )
    ranking: Ranking = option("of all channels, or of those of each layer", "global")
    scope: str = option(f"which layers, such as {', '.join(SCOPES[:5])}, all+ff", DEFAULT_SCOPE)
    target_sparsity: float = option("share to prune", 0.3, BELOW_ONE)
    budget: BudgetKind = option("what the target is a share of", "channels")
    floor: float = option("share of each layer that stays", DEFAULT_FLOOR, BELOW_ONE)
    padding: Padding = option("how constants meet the border", "zero")
    correction_rank: int = correction_rank()
    samples: int = option("images to measure on", 16, COUNT)
    timesteps: int = option("per image, evenly spread over the schedule", 20, COUNT)
    threshold: float | None = option(
        "; ".join(["instead of a target", *(f"{n}: {t.help}" for n, t in THRESHOLDS.items())]), None
    )
    resolution: int | None = option("pixels (default: the model's own)", None, COUNT)
    batch_size: int = option("images encoded at once", 4, COUNT)
    precision: Precision = option("of the frozen U-Net", "fp32")
    device: str = device()
    seed: int = option("of everything random", 0, SEED)
    options: CriterionOptions = field(default_factory=CriterionOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            only = f"only with criterion {' or '.join(THRESHOLDS)}"
            require(self.criterion in THRESHOLDS, "threshold", self.threshold, only)
            largest = THRESHOLDS[self.criterion].largest
            within = f"above 0 and below {largest:g}"
            require(0 < self.threshold < largest, "threshold", self.threshold, within)


@dataclass(frozen=True)
class Measurement:
    """What a criterion found on a model: all that does not depend on how much is to be pruned."""

    sites: Sequence[Site]
    topology: Topology
    importances: Importances
    constants: Mapping[str, Tensor]
    latent: Latent
    ladders: Sequence[Ladder]
    facts: Mapping[str, Any]  # for the gate file


def score(config: ScoreConfig, measurement: Measurement | None = None) -> Gates:
    """Measure, rank and write; raises UserError for everything a user can put right.

    ``measurement`` saves the measuring: that of settings that differ only in `CUT`.
    """
    output = gate_output(config.output, (config.model, config.data))
    with claimed(output):
        return _score(config, output, measurement or measure(config))


def _score(config: ScoreConfig, output: Path, found: Measurement) -> Gates:
    budget = Budget(config.budget, found.sites, config.padding, found.latent)
    scores = pruned_scores(config, found.importances, found.sites, budget)
    gates = Gates(scores, found.constants, config.padding, found.topology, floor=config.floor)
    info = {
        **provenance(config.criterion, asdict(config), gates, budget),
        "target_sparsity": config.target_sparsity if config.threshold is None else None,
        "ranking": config.ranking,
        **found.facts,
    }
    gates = replace(gates, info=info, importances=found.importances)
    if config.correction_rank:
        problems = [problem for ladder in found.ladders for problem in ladder]
        denoising, rank = found.ladders[0].denoising, config.correction_rank
        gates = replace(gates, corrections=corrections(denoising, problems, gates, rank))
    save_gates(gates, output)
    print(gates_report(gates).text())
    if config.criterion in THRESHOLDS:
        print(f"\n{layer_table(gates)}\n")
    if "stopped_at" in found.facts:
        print(f"gradients were accumulated up to timestep {found.facts['stopped_at']}")
    print(f"measured in {found.facts['seconds']:.1f} s; wrote {output}")
    return gates


def measure(config: ScoreConfig) -> Measurement:
    """The importance of every channel in scope, and the constants that would replace them."""
    data = open_dataset(config.data)
    model = frozen_model(config.model, config.precision, config.device)
    side = fit_to(model, data, config.resolution)
    topology = topology_of(model.unet)
    sites, latent = sites_in(topology, config.scope), Latent(side, side)
    if config.threshold is None:
        budget = Budget(config.budget, sites, config.padding, latent)
        check_target(config.target_sparsity, config.floor, budget, sites, config.scope)

    denoising = Denoising(model, config.seed)
    ladders = _ladders(config, denoising, data)
    with ChannelMeans(model.unet, sites) as means:
        for problem in progress(chain(*ladders), "channel means", sum(map(len, ladders))):
            denoising.dense(problem)
    constants = means.constants()
    start = time.perf_counter()
    subject = Subject(ladders, sites, constants, config.padding, config.seed, config.options)
    measured = CRITERIA[config.criterion].measure(subject)
    importances = {site.name: site.shared(measured[site.name]) for site in sites}
    weights = {site.name: model.unet.get_parameter(site.weight) for site in sites}
    facts = subject.facts | {
        "seconds": round(time.perf_counter() - start, 2),
        "data": {"source": name_of(data.source), "images": len(data)},
        "held_out": Split().to_json(),
        "fingerprint": fingerprint(weights),
    }
    return Measurement(sites, topology, importances, constants, latent, ladders, facts)


def _ladders(config: ScoreConfig, denoising: Denoising, data: ImageData) -> list[Ladder]:
    """The images in batches, each with one draw of noise and the same timesteps."""
    train, _ = Split().apply(data)
    generator = torch.Generator().manual_seed(config.seed)
    last = denoising.model.alphas_cumprod.numel() - 1
    steps = torch.linspace(0, last, config.timesteps).round().long().tolist()
    count = -(-config.samples // config.batch_size)
    images = FreshImages(data, denoising.model)
    stream = images.batches(train, config.batch_size, seed=config.seed, epochs=None)
    ladders = []
    for batch in progress(islice(stream, count), "encoding images", count, unit="batch"):
        latents, context, added = denoising.inputs(batch)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        ladders.append(Ladder(denoising, latents, context, noise, steps, added))
    return ladders


def pruned_scores(
    config: ScoreConfig, importances: Mapping[str, Tensor], sites: Sequence[Site], budget: Budget
) -> dict[str, Tensor]:
    """Scores whose cut at 0.5 meets the target in the budget, or the criterion's own threshold."""
    groups = groups_of(sites)

    def ranked(sparsity: float) -> dict[str, Tensor]:
        return scores_at(importances, sparsity, config.ranking, config.floor, groups)

    if config.threshold is not None:
        return scores_by_rank(importances, thresholded(config, importances, sites), groups)
    if config.budget == "channels":
        return ranked(config.target_sparsity)
    # the share of channels whose removal comes nearest to the budget
    low, high = 0.0, 0.999
    for _ in range(20):
        middle = (low + high) / 2
        found = ranked(middle)
        pruned = budget.pruned({site: values > 0.5 for site, values in found.items()})
        low, high = (middle, high) if pruned < config.target_sparsity else (low, middle)
    return ranked(high)


def thresholded(
    config: ScoreConfig, importances: Mapping[str, Tensor], sites: Sequence[Site]
) -> dict[str, Tensor]:
    """Keep-sets of the channels that reach the criterion's threshold, with aligned counts."""
    assert config.threshold is not None
    cut = THRESHOLDS[config.criterion].cut
    keep = {site: values >= cut(values, config.threshold) for site, values in importances.items()}
    widths, multiples = [site.channels for site in sites], [site.multiple for site in sites]
    wanted = [int(keep[site.name].sum()) for site in sites]
    least = [least_kept(site.channels, config.floor, site.multiple) for site in sites]
    counts = aligned_counts(wanted, widths, sum(wanted), multiples, least=least)
    pairs = zip(sites, counts, strict=True)
    return {site.name: top_channels(importances[site.name], count) for site, count in pairs}


def layer_table(gates: Gates) -> str:
    """Layer, type, parameters, non-zero ones and sparsity of each layer's own rows, as Markdown."""
    kept = {site: int(keep.sum()) for site, keep in gates.keep_sets().items()}
    rows = (
        [
            short_name(site.name),
            site.kind.type_name,
            *(f"{site.row_parameters * count:,}" for count in (site.channels, kept[site.name])),
            f"{1 - kept[site.name] / site.channels:.1%}",
        ]
        for site in gates.topology.all_sites()
        if site.name in kept
    )
    return "\n".join(table(["layer", "type", "parameters", "non-zero", "sparsity"], rows))


@explaining
def main(argv: list[str] | None = None) -> int:
    log_progress()
    score(parsed(ScoreConfig, argv, "score", __doc__, demo=("model", "data", "output")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
