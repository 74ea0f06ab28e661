"""Scores, gates and keep-sets: which channels stay.

`ChannelGate` is what training optimises, `Gates` is what a gate file holds and every host reads.
The rule between them is the same everywhere: a channel is kept iff its score exceeds 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import ALIGNMENT, Padding, PrunedSite, groups_of
from .correction import Correction
from .schedule import PercentRange
from .sites import SD15, Topology

THRESHOLD = 0.5
#: share of every site's channels that stays unless asked otherwise: no layer is emptied by accident
DEFAULT_FLOOR = 0.05


class ChannelGate(nn.Module):
    """One importance score per channel, learned through a straight-through gate.

    ``logits`` is an `nn.Parameter` of shape [C]; the score is its sigmoid. The forward value is
    the hard 0/1 mask, the gradient that of the score (Bengio et al. 2013, arXiv:1308.3432, §3.1).
    Where channels go by ``group`` (the head that they belong to), a logit is a whole group's, and
    there are [C / group].
    """

    def __init__(self, logits: Tensor, group: int = 1) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone().float())
        self.group = group

    @property
    def score(self) -> Tensor:
        """Importance in [0, 1], shape [C]."""
        return self.spread(torch.sigmoid(self.logits))

    @property
    def keep(self) -> Tensor:
        """Which channels are kept, bool of shape [C]."""
        return self.score.detach() > THRESHOLD

    def forward(self, noise: Tensor | None = None) -> Tensor:
        """The mask [C] of exact zeros and ones.

        ``noise``, of the shape of the logits, is added to them before the threshold (not to the
        score): with logistic noise a channel near the threshold is tried both ways, so that a kept
        channel also feels what its removal would cost.
        """
        score = self.score
        tried = score if noise is None else self.spread(torch.sigmoid(self.logits + noise))
        hard = tried > THRESHOLD
        return hard.to(score.dtype).detach() + (score - score.detach())

    def spread(self, values: Tensor) -> Tensor:
        """Values of the logits as values [C] of the channels."""
        return values if self.group == 1 else values.repeat_interleave(self.group)


@dataclass(frozen=True)
class Stage:
    """From ``start`` on, ``sparsity`` of all gated channels is pruned, by rank (None: as learned).

    ``start`` is a share of the denoising schedule, from 0.0 (pure noise) up to 1.0 (image).
    """

    start: float
    sparsity: float | None


@dataclass(frozen=True)
class Gates:
    """The scores of all gated sites, how they came about, and what stands in for pruned channels.

    ``scores[site]`` and the optional ``constants[site]`` are float32 tensors [C]; a site without
    constants uses zero. ``padding`` is the rule the gates were made for. ``info`` is free-form
    JSON-able provenance: criterion, λ, target sparsity, data, seed, versions. ``importances[site]``
    (optional, float32 [C]) is what a criterion measured before it became a score. ``floor`` is the
    share of every site's channels that stays whatever the ranking says, in [0, 1).
    ``corrections[site]`` (optional) are for the channels that are kept as learned.
    ``stages`` (optional) say that more is pruned in some of the schedule than in the rest: they
    start at 0.0 and follow one another. They share the one order of channels.
    """

    scores: Mapping[str, Tensor]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    padding: Padding = "zero"
    topology: Topology = SD15
    info: Mapping[str, Any] = field(default_factory=dict)
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    floor: float = 0.0
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @property
    def channels(self) -> int:
        return sum(score.numel() for score in self.scores.values())

    @property
    def sparsity(self) -> float:
        """Share of all gated channels that is pruned as learned, in [0, 1]."""
        kept = sum(int(keep.sum()) for keep in self.keep_sets().values())
        return 1.0 - kept / self.channels if self.channels else 0.0

    def constant(self, site: str) -> Tensor:
        """What replaces a pruned channel of ``site``, float32 [C]."""
        found = self.constants.get(site)
        return torch.zeros_like(self.scores[site]) if found is None else found

    def keep_sets(self) -> dict[str, Tensor]:
        """Kept channels as learned: site -> bool [C], true iff score > 0.5.

        Stages do not change them: see `by_stage`.
        """
        return {site: score > THRESHOLD for site, score in self.scores.items()}

    def by_stage(
        self, sparsity: float | None = None
    ) -> list[tuple[PercentRange | None, dict[str, Tensor]]]:
        """Of every stage the stretch of the schedule and the keep-sets.

        Gates without stages have `keep_sets` alone, in all of the schedule (None). With a
        ``sparsity`` all gates have `keep_sets_at` it alone.
        """
        if sparsity is not None:
            return [(None, self.keep_sets_at(sparsity))]
        if not self.stages:
            return [(None, self.keep_sets())]
        found: list[tuple[PercentRange | None, dict[str, Tensor]]] = []
        for stage, end in zip(self.stages, [*self.stages[1:], Stage(1.0, None)], strict=True):
            share = stage.sparsity
            kept = self.keep_sets() if share is None else self.keep_sets_at(share)
            found.append((PercentRange(stage.start, end.start), kept))
        return found

    def pruned(self, keep_sets: Mapping[str, Tensor] | None = None) -> dict[str, PrunedSite]:
        """What these gates prune, as learned or with other keep-sets of their sites.

        A site has its correction where its keep-set is the one as learned.
        """
        kept = self.keep_sets() if keep_sets is None else keep_sets
        found = {}
        for site, keep in kept.items():
            correction = self.corrections.get(site)
            if bool(keep.all()) or not torch.equal(keep, self.scores[site] > THRESHOLD):
                correction = None
            found[site] = PrunedSite(keep, self.constants.get(site), self.padding, correction)
        return found

    def keep_sets_at(self, sparsity: float, multiple: int = ALIGNMENT) -> dict[str, Tensor]:
        """Kept channels when the lowest-ranked ``sparsity`` of all channels is pruned instead.

        See `keep_by_rank`; the gates' own floor holds. Raises ValueError outside [0, 1].
        """
        groups = groups_of(self.topology.all_sites())
        return keep_by_rank(self.scores, sparsity, multiple, self.floor, groups)


def keep_by_rank(
    scores: Mapping[str, Tensor],
    sparsity: float,
    multiple: int = ALIGNMENT,
    floor: float = 0.0,
    groups: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Site -> bool [C], false for the lowest-ranked ``sparsity`` of all channels of ``scores``.

    All sites are ranked together, ties broken by site and then by index (the earlier channel
    stays). Of every site at least the share ``floor`` stays (see `least_kept`). Per-site counts are
    then aligned to ``multiple`` (see `aligned_counts`), or where ``groups`` names the site (see
    `groups_of`) to that many channels, which have one score. 0 keeps and 1 prunes everything,
    whatever the floor. Raises ValueError outside [0, 1].
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity {sparsity:g} is outside 0.0 to 1.0")
    widths = [score.numel() for score in scores.values()]
    multiples = [(groups or {}).get(site, multiple) for site in scores]
    least = [
        0 if sparsity == 1.0 else least_kept(width, floor, of)
        for width, of in zip(widths, multiples, strict=True)
    ]
    ranked = torch.cat(list(scores.values()))
    total = max(round((1.0 - sparsity) * ranked.numel()), sum(least))
    safe = torch.cat([top_channels(s, n) for s, n in zip(scores.values(), least, strict=True)])
    order = torch.sort(ranked, descending=True, stable=True).indices
    order = torch.cat([order[safe[order]], order[~safe[order]]])
    kept = torch.zeros(ranked.numel(), dtype=torch.bool)
    kept[order[:total]] = True
    wanted = [int(part.sum()) for part in torch.split(kept, widths)]
    cut = float(ranked[order[total - 1]]) if total else math.inf
    cost = moving_cost(list(scores.values()), cut) if math.isfinite(cut) else None
    # the last few channels are not worth a costly step of a site whose width is no multiple
    counts = aligned_counts(
        wanted, widths, total, multiples, least=least, cost=cost, slack=multiple / 2
    )
    return {
        site: top_channels(score, k)
        for (site, score), k in zip(scores.items(), counts, strict=True)
    }


def least_kept(width: int, floor: float, multiple: int = ALIGNMENT) -> int:
    """The least that stays of ``width`` channels under a floor (a share), rounded up to a multiple.

    >>> least_kept(1280, 0.05), least_kept(20, 0.5), least_kept(20, 0.0)
    (64, 16, 0)
    """
    return min(-(-math.ceil(floor * width) // multiple) * multiple, width)


def top_channels(score: Tensor, count: int) -> Tensor:
    """Bool [C] with the ``count`` highest scores set; of equal scores the earlier index wins."""
    keep = torch.zeros(score.numel(), dtype=torch.bool)
    keep[torch.sort(score.cpu(), descending=True, stable=True).indices[:count]] = True
    return keep


def aligned_counts(
    wanted: Sequence[int],
    widths: Sequence[int],
    total: float,
    multiples: Sequence[int],
    *,
    least: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    cost: Callable[[int, int], float] | None = None,
    slack: float = 0.0,
) -> list[int]:
    """Round per-site counts to their ``multiples`` while holding their sum near ``total``.

    A site may also keep all of its channels, or as few as ``least`` says (default: none; a
    multiple). ``weights`` says what a channel of each site counts (default: 1, then ``total`` is
    in channels), ``cost(site, count)`` how bad a count is (default: how far from ``wanted``; see
    `moving_cost`). Starting from the cheaper neighbour of every count, the cheapest steps are taken
    (with weights those that cost least for what they bring) until the sum is within ``slack`` of
    ``total``, or as near as it gets: no single step brings it closer.

    >>> aligned_counts([451, 445, 450, 446], [640] * 4, 1792, [8] * 4)
    [448, 448, 448, 448]
    """
    floors = [0] * len(widths) if least is None else least
    shares: Sequence[float] = [1] * len(widths) if weights is None else weights
    bad = cost or (lambda site, count: abs(count - wanted[site]))

    def up(site: int, count: int) -> int:
        return min(count - count % multiples[site] + multiples[site], widths[site])

    def down(site: int, count: int) -> int:
        return max((count - 1) // multiples[site] * multiples[site], min(floors[site], count))

    def nearest(site: int, count: int) -> int:
        count = max(count, floors[site])
        if count % multiples[site] == 0 or count == widths[site]:
            return count
        return min((down(site, count), up(site, count)), key=lambda c: bad(site, c))

    counts = [nearest(site, count) for site, count in enumerate(wanted)]
    while True:
        gap = total - sum(c * share for c, share in zip(counts, shares, strict=True))
        moves = [(up if gap > 0 else down)(site, c) - c for site, c in enumerate(counts)]
        useful = [
            i for i, move in enumerate(moves) if move and abs(gap - move * shares[i]) < abs(gap)
        ]
        if not useful or abs(gap) <= slack:
            return counts
        worse = {i: bad(i, counts[i] + moves[i]) - bad(i, counts[i]) for i in useful}
        if weights is not None:
            worse = {i: w / (abs(gap) - abs(gap - moves[i] * shares[i])) for i, w in worse.items()}
        best = min(useful, key=lambda i: (worse[i], i))
        counts[best] += moves[best]


def moving_cost(values: Sequence[Tensor], cut: float) -> Callable[[int, int], float]:
    """What it costs to keep the best ``count`` of a site instead of those above ``cut``.

    The sum over the channels that change sides of how far from the cut their values [C] are.
    """
    tables = []
    for value in values:
        ordered = torch.sort(value.double().cpu(), descending=True).values - cut
        below = torch.cat([ordered.new_zeros(1), (-ordered).clamp(min=0).cumsum(0)])
        above = torch.cat([ordered.new_zeros(1), ordered.clamp(min=0).cumsum(0)])
        tables.append((below + (above[-1] - above)).tolist())
    return lambda site, count: float(tables[site][count])
