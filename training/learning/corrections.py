"""Corrections of the layers that read pruned channels, in closed form from the dense model's runs.

Each site is corrected by itself: its reader is fed what it would be fed if the site were pruned and
nothing before it, and what its output then lacks is predicted from that (`ldcp_core.Regression`).
On the demo that is as good as feeding it what the whole pruned model makes, in one pass instead of
one per site, and better where much is pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor

from ldcp_core import Correction, Gates, Regression, Site, block_of, sites_of
from ldcp_core.diffusers import adapter
from training.console import progress
from training.model.gating import hard_gates
from training.step.denoising import Denoising, Problem

log = logging.getLogger("training.corrections")

#: of this many problems one is held out, to tell whether a correction holds elsewhere
HELD_OUT_EVERY = 5
#: bytes of the sums of squares that are gathered in one pass over the problems
PASS_BYTES = 2**30


def corrections(
    denoising: Denoising, problems: Sequence[Problem], gates: Gates, rank: int
) -> dict[str, Correction]:
    """Site -> correction of the layer that reads it, where that layer's held-out error falls.

    At least `HELD_OUT_EVERY` ``problems`` are needed. The model is the dense one; its weights are
    in the precision of the correction that comes out.
    """
    keep_sets = gates.keep_sets()
    sites = [
        site
        for site in gates.topology.all_sites()
        if site.reader and site.name in keep_sets and _is_part(keep_sets[site.name])
    ]
    found: dict[str, Correction] = {}
    for part in _passes(sites, keep_sets):
        regressions = {site.name: Regression(keep_sets[site.name]) for site in part}
        _gather(denoising, problems, gates, regressions)
        for name in progress(list(regressions), "corrections: solving", unit="layer"):
            correction = regressions.pop(name).correction(rank)
            if correction is not None:
                found[name] = correction
    log.info("%d of %d layers that read pruned channels are corrected", len(found), len(sites))
    return found


def _is_part(keep: Tensor) -> bool:
    return bool(keep.any()) and not bool(keep.all())


def _passes(sites: Sequence[Site], keep_sets: dict[str, Tensor]) -> Iterator[list[Site]]:
    """The sites in turn, as many together as `PASS_BYTES` allow, at least one."""
    part: list[Site] = []
    size = 0
    for site in sites:
        features = int(keep_sets[site.name].sum()) * site.kind.reader_taps
        needed = 4 * (features + 1) * (features + site.block.outputs())
        if part and size + needed > PASS_BYTES:
            yield part
            part, size = [], 0
        part.append(site)
        size += needed
    if part:
        yield part


def _gather(
    denoising: Denoising,
    problems: Sequence[Problem],
    gates: Gates,
    regressions: dict[str, Regression],
) -> None:
    unet, soft = denoising.model.unet, hard_gates(gates.pruned())
    held_out = False

    def seen(regression: Regression, fed: Tensor, missing: Tensor) -> None:
        regression.add(fed, missing, held_out)

    with ExitStack() as hooks:
        for name, regression in regressions.items():
            block = block_of(name)
            of_block = [soft.get(site) for site in sites_of(block)]
            watch = adapter(unet, block).watch_reader(
                of_block, gates.padding, lambda f, m, r=regression: seen(r, f, m)
            )
            hooks.enter_context(watch)
        for number, problem in enumerate(progress(problems, "corrections: dense", unit="batch")):
            held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            denoising.dense(problem)
