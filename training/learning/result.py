"""What a run of learning leaves behind: a gate file, pictures, a report, and words about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldcp_core import (
    HELD_OUT_EVERY,
    Gates,
    fingerprint,
    gates_report,
    save_gates,
)
from ldcp_core.diffusers import compact_blocks, topology_of
from training.config import FitConfig
from training.console import name_of, progress
from training.data.encoding import Images
from training.data.splits import Split
from training.data.streaming import Data, StreamedImages
from training.errors import UserError
from training.learning.budget import Budget
from training.learning.corrections import corrections
from training.learning.curves import History, curves_png, scores_png
from training.learning.learner import TARGET_TOLERANCE, GateLearner, aligned_scores
from training.learning.loop import Learning
from training.learning.page import html_report
from training.learning.recovery import recovered
from training.learning.sample_sheet import SampleSheet
from training.model.precision import in_precision
from training.output import write
from training.provenance import provenance
from training.step.denoising import Denoising, FixedProblems, Problem, without_prompts

log = logging.getLogger("training.fit")

#: images that a step of recovering sees, at least
RECOVERY_SAMPLES = 8
#: up to so many sites, counts are aligned by the scores alone; with more, deviations are measured
#: on so many samples (so many in all, over the sites, each of which is tried once or twice)
FEW_SITES, ALIGNING_SAMPLES, MOST_ALIGNING_SAMPLES = 8, 32, 2000


@dataclass(frozen=True)
class FitResult:
    """The gates as written, the course of the run, and the held-out deviation from dense."""

    gates: Gates
    history: History
    heldout_deviation: float | None


def finish(
    config: FitConfig,
    learning: Learning,
    denoising: Denoising,
    data: Data,
    images: Images | StreamedImages,
    train: Sequence[int],
    held_out: Sequence[int],
    output: Path,
    sheet: SampleSheet | None,
    empty_prompt: tuple[Tensor, Tensor] | None,
) -> FitResult:
    """From logits to a gate file and all that lies beside it.

    With the embeddings of an ``empty_prompt`` the gates are recovered.
    """
    learning.finish()
    history, learner, unet = learning.history, learning.learner, denoising.model.unet
    budget = learner.budget
    gates = Gates(
        learner.scores(),
        learning.start.constants if config.constant == "mean" else {},
        config.padding,
        topology_of(unet),
        floor=config.floor,
    )
    gates, moved = _aligned(config, learner, gates, denoising, images, train)
    gates = replace(gates, info=_info(config, data, history, unet, budget, gates))
    variants = {"pruned": gates}
    if config.correction_rank:
        gates = variants["corrected"] = _corrected(config, learning, denoising, gates)
    if empty_prompt is not None:
        gates = variants["recovered"] = _recovered(learning, denoising, gates, empty_prompt)
    heldout = None
    if held_out:
        gates, heldout = _validated(config, denoising, images, held_out, variants)
        history.heldout_deviation = heldout
    gates = replace(gates, info={**gates.info, "history": history.to_json()})
    picture = None if sheet is None else sheet.picture(gates.pruned())
    curves, sorted_scores = curves_png(history), scores_png(gates)
    notes = [] if heldout is None else [f"held-out deviation from dense (MSE, fp32): {heldout:.3g}"]
    page = html_report(gates, curves, sorted_scores, picture, [*notes, data.broken_report()])
    try:
        save_gates(gates, output)
        write(output.with_suffix(".curves.png"), curves)
        write(output.with_suffix(".scores.png"), sorted_scores)
        write(output.with_suffix(".html"), page.encode())
    except OSError as error:
        raise UserError(
            f"The results can't be written beside {output}: {error}.",
            "a disk with room",
            "make room, and go on with --resume",
        ) from error
    _say_result(config, gates, history, moved, budget, output, data)
    return FitResult(gates, history, heldout)


def _aligned(
    config: FitConfig,
    learner: GateLearner,
    gates: Gates,
    denoising: Denoising,
    data: Images | StreamedImages,
    indices: Sequence[int],
) -> tuple[Gates, int]:
    """The gates with aligned kept counts, and how many channels moved.

    Where many sites are gated, counts are tried on images that were learned from, in float32 as
    `_validated` does. With few of them there is little to choose from, and chance would decide.
    """
    sites, target = learner.sites, config.target_sparsity
    if len(sites) <= FEW_SITES:
        scores, moved = aligned_scores(gates.scores, target, learner.budget, sites, learner.least)
        return replace(gates, scores=scores), moved
    unet = denoising.model.unet
    samples = min(ALIGNING_SAMPLES, MOST_ALIGNING_SAMPLES // len(sites))
    with in_precision(unet, "fp32", {}):
        problems = FixedProblems(
            denoising,
            data.batches(indices, samples, seed=config.seed, epochs=None),
            samples,
            config.seed + 2,
            at_once=config.batch_size,
            label="aligning",
        )
    with progress(None, "aligning: trying counts", unit="batch") as bar:

        def deviation(keep: Mapping[str, Tensor]) -> float:
            blocks = compact_blocks(unet, gates.pruned(keep), torch.float32)
            with in_precision(unet, "fp32", blocks):
                deviations, _ = problems.as_it_is(bar)
            return deviations.mean().item()

        scores, moved = aligned_scores(
            gates.scores, target, learner.budget, sites, learner.least, deviation
        )
    return replace(gates, scores=scores), moved


def _corrected(config: FitConfig, learning: Learning, denoising: Denoising, gates: Gates) -> Gates:
    problems = learning.next_problems(config.correction_samples, HELD_OUT_EVERY)
    found = corrections(denoising, problems, gates, config.correction_rank)
    return replace(gates, corrections=found)


def _recovered(
    learning: Learning, denoising: Denoising, gates: Gates, empty_prompt: tuple[Tensor, Tensor]
) -> Gates:
    turn = count()

    def next_problems() -> list[Problem]:
        found = learning.next_problems(RECOVERY_SAMPLES)
        return [without_prompts(one, *empty_prompt, next(turn)) for one in found]

    unet = denoising.model.unet
    dtype = unet.dtype
    unet.float()  # what fewer bits round away is more than what recovering gains
    try:
        return recovered(denoising, next_problems, gates)
    finally:
        unet.to(dtype)


def _validated(
    config: FitConfig,
    denoising: Denoising,
    data: Images | StreamedImages,
    indices: Sequence[int],
    variants: Mapping[str, Gates],
) -> tuple[Gates, float]:
    """Of variants of the same gates the one that deviates least, and its held-out deviation.

    In float32 whatever the fit computes in: rounding to fewer bits moves the output as far as
    well-chosen gates do.
    """
    unet = denoising.model.unet
    with in_precision(unet, "fp32", {}):
        heldout = FixedProblems(
            denoising,
            data.batches(indices, config.batch_size, epochs=None),
            config.validation_samples,
            config.seed + 1,
        )

    measured = {}
    for label, gates in variants.items():
        blocks = compact_blocks(unet, gates.pruned(), torch.float32)
        with in_precision(unet, "fp32", blocks):
            measured[label] = heldout.as_it_is(f"held-out images, {label}")
    means = {label: found[0].mean().item() for label, found in measured.items()}
    if len(means) > 1:
        told = ", ".join(f"{mean:.3g} {label}" for label, mean in means.items())
        log.info("held out: deviation from dense (MSE, fp32) %s", told)
    best = min(means, key=lambda label: means[label])
    deviations, losses = measured[best]
    dense, pruned = heldout.dense_losses.mean().item(), losses.mean().item()
    error = deviations.std().item() / math.sqrt(len(deviations)) if len(deviations) > 1 else 0.0
    log.info(
        "held out: deviation from dense %.3g ± %.1g (MSE, fp32); loss %.5f, dense %.5f (%+.2f%%)",
        deviations.mean().item(),
        error,
        pruned,
        dense,
        100 * (pruned / dense - 1),
    )
    return variants[best], means[best]


def _say_result(
    config: FitConfig,
    gates: Gates,
    history: History,
    moved: int,
    budget: Budget,
    output: Path,
    data: Data,
) -> None:
    target, channels = config.target_sparsity, gates.channels
    print(gates_report(gates).text())
    print(
        f"{history.changed} of {channels} channels changed state through learning since the start "
        f"(all kept); alignment to multiples of 8 moved {moved} more."
    )
    achieved = budget.pruned(gates.keep_sets())
    if budget.kind != "channels":
        print(f"Of the gated layers' {budget.kind} {achieved:.1%} are pruned.")
    if target is not None and abs(achieved - target) > TARGET_TOLERANCE:
        print(advice(target, achieved))
    if broken := data.broken_report():
        print(broken)
    for suffix in (".safetensors", ".history.csv", ".curves.png", ".scores.png", ".html"):
        print(f"wrote {output.with_suffix(suffix)}")


def advice(target: float, achieved: float) -> str:
    """What to do about a target that was missed: the cut is at the target, so alignment missed it.

    >>> print(advice(0.3, 0.25))
    25.0% are pruned, over a point less than the target of 30.0%: kept counts are multiples of 8,
    and widths as small as these allow no closer value. Raise --target-sparsity to come to the next,
    or give it a larger --scope.
    """
    less, change = ("less", "Raise") if achieved < target else ("more", "Lower")
    return (
        f"{achieved:.1%} are pruned, over a point {less} than the target of {target:.1%}: kept "
        "counts are multiples of 8,\nand widths as small as these allow no closer value. "
        f"{change} --target-sparsity to come to the next,\nor give it a larger --scope."
    )


def _info(
    config: FitConfig,
    data: Data,
    history: History,
    unet: torch.nn.Module,
    budget: Budget,
    gates: Gates,
) -> dict[str, Any]:
    """Everything needed to know later what the gate file is."""
    sites = [site for site in gates.topology.all_sites() if site.name in gates.scores]
    weights = {site.name: unet.get_parameter(site.weight) for site in sites}
    count = None if isinstance(data, StreamedImages) else len(data)  # which a stream does not know
    return {
        **provenance("learned", config.to_json(), gates, budget),
        "steps": len(history.sparsity),
        "changed_channels": history.changed,
        "held_out": Split.of(config).to_json(),
        "data": {"source": name_of(data.source), "images": count},
        "fingerprint": fingerprint(weights),
    }
