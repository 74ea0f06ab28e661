"""Corrections of the layers that read pruned channels, from the dense model's answers to problems.

`ldcp_core.gathering` says how; here are the problems, some of which are held out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldcp_core import HELD_OUT_EVERY, PASS_BYTES, Correction, Gates, Pass, passes
from ldcp_core.diffusers import adapter
from training.console import progress
from training.step.denoising import Denoising, Problem

log = logging.getLogger("training.corrections")


def corrections(
    denoising: Denoising, problems: Sequence[Problem], gates: Gates, rank: int
) -> dict[str, Correction]:
    """Site -> correction of the layer that reads it, where that layer's held-out error falls.

    At least `HELD_OUT_EVERY` ``problems`` are needed. The model is the dense one; its weights are
    in the precision of the correction that comes out.
    """
    parts = passes(gates, PASS_BYTES)
    sites = sum(len(part) for part in parts)
    found: dict[str, Correction] = {}
    for part in parts:
        _gather(denoising, problems, part)
        solved = part.solved(rank)
        label = "corrections: solving"
        for name, correction in progress(solved, label, len(part), unit="layer"):
            if correction is not None:
                found[name] = correction
    log.info("%d of %d layers that read pruned channels are corrected", len(found), sites)
    return found


def _gather(denoising: Denoising, problems: Sequence[Problem], part: Pass) -> None:
    unet = denoising.model.unet
    with part.watching(lambda block: adapter(unet, block)):
        for number, problem in enumerate(progress(problems, "corrections: dense", unit="batch")):
            part.held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            denoising.dense(problem)
