"""Corrections for gates, from sampling once more with the full model.

What a layer that reads pruned channels lacks is gathered while the prompts of a calibration are
sampled as they were. What is found must hold for other noise: evaluations of one run are too much
alike to check each other, so a shorter run from the next seed is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ldcp_core import HELD_OUT_EVERY, PASS_BYTES, RANK, Gates, Pass, correctable, passes
from .host.blocks import HostBlock
from .host.model import find_blocks
from .host.observe import watched_by

#: steps of a held-out run, at least, unless the run itself has fewer
HELD_OUT_STEPS = 4


class Gatherer:
    """The wrapper: for the length of an evaluation hooks gather what a pass wants."""

    def __init__(self, part: Pass, blocks: dict[str, HostBlock]) -> None:
        self._part, self._blocks = part, blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> Gatherer:
        return self  # model options that carry the wrapper get copied

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the model (the signature is that of BaseModel.apply_model)."""
        from comfy.model_management import throw_exception_if_processing_interrupted as check

        with self._part.watching(self._blocks.__getitem__, before=check):
            return executor(*args, **kwargs)


def corrected(model: Any, gates: Gates, runs: Sequence[dict[str, Any]]) -> Gates:
    """``gates`` with corrections for the ModelPatcher ``model``, where they hold for other noise.

    ``runs`` are arguments of the host's ``common_ksampler``. Each is sampled once, and from the
    next seed in `held_out`, or several times where main memory is short. What an `Observer` could
    watch can be corrected; of a block that another extension has changed nothing is.
    """
    from comfy.model_management import throw_exception_if_processing_interrupted as check
    from comfy.utils import ProgressBar

    from nodes import common_ksampler  # ComfyUI's own nodes.py

    blocks, found = find_blocks(model.model, gates), {}
    progress = ProgressBar(len(correctable(gates)))
    for part in passes(gates, _room()):
        watched = watched_by(model, Gatherer(part, blocks))
        for run in runs:
            for part.held_out, sampling in ((False, run), (True, held_out(run))):
                common_ksampler(watched, **sampling)
        for site, correction in part.solved(RANK, between=check):
            progress.update(1)
            if correction is not None:
                found[site] = correction
    return replace(gates, corrections=found, info={**gates.info, "correction_rank": RANK})


def held_out(run: dict[str, Any]) -> dict[str, Any]:
    """A run of fewer steps from other noise."""
    steps = max(run["steps"] // HELD_OUT_EVERY, min(run["steps"], HELD_OUT_STEPS))
    return {**run, "seed": (run["seed"] + 1) % 2**64, "steps": steps}


def _room() -> int:
    """Bytes of sums that may lie in main memory at once."""
    from comfy.model_management import get_free_memory

    return max(PASS_BYTES, int(get_free_memory(torch.device("cpu"))) // 2)
