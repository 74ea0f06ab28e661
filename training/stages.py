"""Prune little while the picture takes shape and more afterwards, at the same mean sparsity.

    python -m training.stages gates.safetensors --demo --output staged.safetensors
    python -m training.stages gates.safetensors --model sd15.safetensors --data ffhq/ \\
        --prompts prompts.txt --output staged.safetensors

The denoising schedule is cut into equal stages, and sparsity is moved from one to another for as
long as the pictures come nearer to the dense model's: same prompts, seeds and steps, compared by
their final latents. All stages share the gates' one order of channels. Corrections are then made
anew for the stage that prunes least, which is where the pictures are most sensitive.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from ldcp_core import Gates, Stage, groups_of, load_gates, save_gates, scores_by_rank
from ldcp_core.diffusers import pruned
from training.console import explaining, log_progress, progress
from training.data.encoding import FreshImages
from training.data.images import open_dataset
from training.data.splits import Split, unseen
from training.errors import UserError
from training.evaluation.statistics import bootstrap
from training.learning.corrections import corrections
from training.options import SEED, Bound, Options, correction_rank, device, option, parsed
from training.output import claimed, gate_output
from training.provenance import derived
from training.sample import (
    Pipeline,
    Settings,
    Shot,
    check_fits,
    check_one_stage,
    draw,
    pipeline_of,
    read_prompts,
)
from training.session import fit_to, frozen_model
from training.step.denoising import Denoising

log = logging.getLogger("training.stages")

#: what is moved between stages: first this share of the channels, then that
MOVES = (0.1, 0.05)
#: problems that corrections are computed from
CORRECTION_SAMPLES, BATCH = 128, 4
Shares = tuple[float, ...]


@dataclass(frozen=True)
class StagesConfig(Options):
    """Which gates, how many stages, and the pictures to decide by."""

    gates: str = option("gate file by training.fit or training.score", positional=True)
    model: str = option("checkpoint file, diffusers folder or hub id")
    data: str = option("images to compute corrections from, as for training.fit")
    output: str = option("the gate file to write (.safetensors)")
    stages: int = option("of equal length", 2, Bound(range(2, 9).__contains__, "2 to 8"))
    prompts: str | None = option("a text file, a prompt per line (default: nine faces)", None)
    seeds: tuple[int, ...] = option("of the initial noise, each with every prompt", (1, 2), SEED)
    settings: Settings = field(default_factory=Settings)
    correction_rank: int = correction_rank()
    device: str = device()
    seed: int = option("of the images that corrections are computed from", 0, SEED)


def in_stages(gates: Gates, shares: Shares) -> Gates:
    """The gates with equal stages that prune these shares of their channels.

    The cut at a score of 0.5 is that of the stage that prunes least; the order of channels stays.
    """
    least = min(shares)
    kept = gates.keep_sets_at(least)
    scores = scores_by_rank(gates.scores, kept, groups_of(gates.topology.all_sites()))
    stages = tuple(
        Stage(number / len(shares), None if share == least else share)
        for number, share in enumerate(shares)
    )
    return replace(gates, scores=scores, stages=stages, corrections={})


def best_shares(distance: Callable[[Shares], float], mean: float, count: int) -> Shares:
    """The shares of ``count`` stages with this mean that no move of `MOVES` makes better."""
    known: dict[Shares, float] = {}

    def of(shares: Shares) -> float:
        if shares not in known:
            known[shares] = distance(shares)
        return known[shares]

    best = (round(mean, 4),) * count
    for move in MOVES:
        while (nearest := min(moved(best, move), key=of, default=best)) != best:
            if of(nearest) >= of(best):
                break
            best = nearest
    return best


def moved(shares: Shares, by: float) -> Iterator[Shares]:
    """The shares with ``by`` moved from one stage to another, where both stay from 0 to 1."""
    for giving, taking in permutations(range(len(shares)), 2):
        found = list(shares)
        found[giving], found[taking] = round(found[giving] - by, 4), round(found[taking] + by, 4)
        if found[giving] >= 0 and found[taking] <= 1:
            yield tuple(found)


class Pictures:
    """The final latents of the dense model, and how far from them those of gates are."""

    def __init__(self, pipe: Pipeline, shots: Sequence[Shot], settings: Settings) -> None:
        self._pipe, self._shots, self._settings = pipe, shots, settings
        self._dense = self._latents("dense")

    def distances(self, gates: Gates, label: str) -> Tensor:
        """Root mean squared distance of each picture's latents from dense, float32 [N]."""
        with pruned(self._pipe.unet, gates):
            found = self._latents(label)
        return (found - self._dense).square().mean((1, 2, 3)).sqrt()

    def _latents(self, label: str) -> Tensor:
        drawn = draw(self._pipe, self._shots, self._settings, output_type="latent")
        shown = progress(drawn, f"drawing {label}", len(self._shots), unit="image")
        return torch.stack([latents.float().cpu() for latents in shown])


def stage(config: StagesConfig) -> Gates:
    """Find stages and write the gates; raises UserError for everything a user can put right.

    Where no stages bring the pictures nearer, nothing is written.
    """
    output = gate_output(config.output, (config.gates, config.model, config.data))
    with claimed(output):
        return _stage(config, output)


def _stage(config: StagesConfig, output: Path) -> Gates:
    gates, prompts = load_gates(config.gates), read_prompts(config.prompts)
    check_one_stage(config.gates, gates)
    data = open_dataset(config.data)
    seen, _ = unseen(data, [Split.of_file(gates.info, config.gates)])
    model = frozen_model(config.model, "fp32", config.device)
    check_fits(model, gates)
    fit_to(model, data, config.settings.resolution)
    shots = [Shot(prompt, seed) for prompt in prompts for seed in config.seeds]
    pictures = Pictures(pipeline_of(model), shots, config.settings)

    def distance(shares: Shares) -> float:
        words = ", ".join(f"{share:.0%}" for share in shares)
        found = pictures.distances(in_stages(gates, shares), words).mean().item()
        log.info("stages of %s: %.4g from dense", words, found)
        return found

    given = pictures.distances(gates, "as given")
    shares = best_shares(distance, gates.sparsity, config.stages)
    staged = in_stages(gates, shares)
    rows = {"as given": given, "in stages": pictures.distances(staged, "in stages")}
    if config.correction_rank:
        denoising, images = Denoising(model, config.seed), FreshImages(data, model)
        stream = images.batches(seen, BATCH, seed=config.seed, epochs=None)
        problems = [denoising.problem(next(stream)) for _ in range(CORRECTION_SAMPLES // BATCH)]
        found = corrections(denoising, problems, staged, config.correction_rank)
        corrected = replace(staged, corrections=found)
        rows["in stages, corrected"] = pictures.distances(corrected, "corrected")
        if rows["in stages, corrected"].mean() < rows["in stages"].mean():
            staged = corrected
    print(f"distance from dense of {len(shots)} pictures' final latents (RMS, 95% interval)")
    for label, distances in rows.items():
        low, high = bootstrap(distances.numpy())
        print(f"{label:<22} {distances.mean():.4g} ({low:.3g} to {high:.3g})")
    best = min(rows, key=lambda label: rows[label].mean().item())
    if best == "as given" or len(set(shares)) == 1:
        raise UserError("No stages bring the pictures nearer to dense, so nothing was written.", "")
    told = {label: distances.mean().item() for label, distances in rows.items()}
    staged = replace(staged, info={**gates.info, "stages": {**derived(config), "distances": told}})
    save_gates(staged, output)
    for stretch, kept in staged.by_stage():
        pruned_share = 1 - sum(int(k.sum()) for k in kept.values()) / staged.channels
        print(f"{stretch}: {pruned_share:.1%} of the gated channels pruned")
    print(f"wrote {output}")
    return staged


@explaining
def main(argv: list[str] | None = None) -> int:
    log_progress()
    demo = ("model", "data", "output")
    stage(parsed(StagesConfig, argv, "stages", __doc__, demo=demo))
    return 0


if __name__ == "__main__":
    sys.exit(main())
