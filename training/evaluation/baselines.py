"""Cheap ways of choosing as many channels as gates keep: what learning has to beat.

Each prunes as many channels, under the same rule and with the same constants, and where the gates
have corrections, with corrections of its own. *per site* keeps as
many at every site as the gates do, so that only the choice within a site differs; *together* ranks
the channels of all sites in one list. Between *own-effect, per site*, the strongest, and
*own-effect, together* lies how much each layer gives; beyond the first, which channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldcp_core import Gates, groups_of, top_channels
from training.console import progress
from training.criteria import Importances, magnitudes, own_effect, random
from training.data.encoding import Images
from training.learning.corrections import corrections
from training.model.gating import watched
from training.sample import Candidate
from training.step.denoising import Denoising, Problem

#: how many images, noised, are measured on, and in what batches
SAMPLES, BATCH = 128, 2


def baselines(
    name: str,
    beside: Candidate,
    denoising: Denoising,
    images: Images,
    seen: Sequence[int],
    seed: int,
) -> dict[str, Candidate]:
    """Name -> candidate of every cheap choice ``beside`` the gates of this name.

    Measured on the images ``seen``, which no comparison uses; ``seed`` is that of chance.
    """
    gates, found = beside.gates, {}
    assert gates is not None
    groups = groups_of(gates.topology.all_sites())
    stream = images.batches(seen, BATCH, seed=seed, epochs=None)
    count = progress(range(SAMPLES // BATCH), "baselines: images", unit="batch")
    problems = [denoising.problem(next(stream)) for _ in count]
    rank = max((c.left.shape[1] for c in gates.corrections.values()), default=0)
    for way, importances in measured(gates, denoising, problems, seed).items():
        for how, keep_sets in (
            ("per site", ranked_per_site(importances, gates.keep_sets())),
            ("together", ranked_together(importances, gates.keep_sets(), groups)),
        ):
            info = {"criterion": f"{way}, {how}", "scope": gates.info.get("scope", "")}
            scores = {site: keep.float() for site, keep in keep_sets.items()}
            chosen = replace(gates, scores=scores, info=info, importances={}, corrections={})
            if rank:
                own = corrections(denoising, problems, chosen, rank)
                chosen = replace(chosen, corrections=own)
            label = f"{name}-{way}-{how}".replace(" ", "-")
            found[label] = Candidate(chosen, beside.precision, name)
    return found


def measured(
    gates: Gates, denoising: Denoising, problems: Sequence[Problem], seed: int
) -> dict[str, Importances]:
    """The importances of the gates' channels by each way of choosing.

    FLAP is `ldcp_core.fluctuation` as in ComfyUI's Calibrate Gates, but on noised images instead of
    a sampler's, each site in units of its mean.
    """
    unet = denoising.model.unet
    sites = [site for site in gates.topology.all_sites() if site.name in gates.scores]
    constants = {site.name: gates.constant(site.name) for site in sites}
    with watched(unet, sites) as what:
        for problem in progress(problems, "baselines: FLAP", unit="batch"):
            denoising.dense(problem)
    ways = {
        "own-effect": own_effect(denoising, problems, sites, constants, gates.padding),
        "FLAP": {site: values / values.mean() for site, values in what.importances().items()},
        "L1 magnitude": magnitudes(unet, sites, "l1"),
        "random": random(sites, seed),
    }
    return {
        way: {site.name: site.shared(found[site.name]) for site in sites}
        for way, found in ways.items()
    }


def ranked_together(
    importances: Importances, keep_sets: Mapping[str, Tensor], groups: Mapping[str, int]
) -> dict[str, Tensor]:
    """As many of the most important channels of all sites as ``keep_sets`` keeps.

    Of ``groups`` (see `groups_of`) the one that the cut goes through stays as a whole.
    """
    kept = sum(int(keep.sum()) for keep in keep_sets.values())
    keep = top_channels(torch.cat([importances[site] for site in keep_sets]), kept)
    widths = [importances[site].numel() for site in keep_sets]
    found = {}
    for site, part in zip(keep_sets, torch.split(keep, widths), strict=True):
        group = groups.get(site, 1)
        found[site] = part.view(-1, group).any(1).repeat_interleave(group)
    return found


def ranked_per_site(importances: Importances, keep_sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many of the most important channels at each site as ``keep_sets`` keeps there."""
    return {site: top_channels(importances[site], int(k.sum())) for site, k in keep_sets.items()}
