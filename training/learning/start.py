"""What a fit measures before it learns: constants for pruned channels, and what channels do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldcp_core import Site, SoftGate
from training.config import FitConfig
from training.console import progress
from training.criteria import own_effect
from training.data.encoding import Batch
from training.errors import UserError
from training.learning.processes import Processes
from training.model.gating import ChannelMeans, deviation
from training.step.denoising import Denoising


@dataclass(frozen=True)
class Start:
    """What stands in for pruned channels, the effect of closing all gates, and of closing each.

    ``constants`` (site name -> float32 [C]) are the channels' means over the data, or zero;
    ``effect`` is the deviation from dense with every gate closed; ``effects`` (site name ->
    float32 [C]), a mean squared error too, is what each channel does alone: where learning starts.
    """

    constants: dict[str, Tensor]
    effect: float
    effects: dict[str, Tensor]


def measure_start(
    config: FitConfig,
    denoising: Denoising,
    sites: Sequence[Site],
    stream: Iterator[Batch],
    processes: Processes,
) -> Start:
    """Measure all three on the first batches of the stream, each process on its share of them.

    Raises UserError when pruning everything changes nothing, or breaks the model.
    """
    batches = progress(range(config.calibration_batches), "calibrating: images", unit="batch")
    problems = [denoising.problem(next(stream)) for _ in batches]
    with ChannelMeans(denoising.model.unet, sites) as means:
        dense = [
            denoising.dense(problem) if len(problem) else None
            for problem in progress(problems, "calibrating: dense", unit="batch")
        ]
    processes.sum_(means.totals())
    constants = means.constants()
    if config.constant == "zero":
        constants = {site: torch.zeros_like(mean) for site, mean in constants.items()}

    gates = {
        site.name: SoftGate(torch.zeros(site.channels), constants[site.name]) for site in sites
    }
    answered = [pair for pair in zip(problems, dense, strict=True) if pair[1] is not None]
    deviations = [
        problem.share * deviation(denoising.gated(problem, gates, config.padding), target).item()
        for problem, target in progress(answered, "calibrating: all pruned", unit="batch")
    ]
    whole = torch.tensor(math.fsum(deviations), dtype=torch.float64)
    processes.sum_([whole])
    effect = whole.item() / len(problems)
    if not effect > 0 or not math.isfinite(effect):
        raise UserError(
            f"Pruning all of scope {config.scope!r} moves the model's output by {effect}.",
            "a scope that does something",
            "check that the model's weights are intact",
        )
    found = own_effect(denoising, problems, sites, constants, config.padding, processes.sum_)
    # a mean over the outputs of all batches, of which this process may have a part
    outputs = torch.tensor(float(sum(p.noisy.numel() for p in problems)), dtype=torch.float64)
    processes.sum_([outputs])
    effects = {site: total * len(problems) / outputs.item() for site, total in found.items()}
    return Start(constants, effect, effects)
