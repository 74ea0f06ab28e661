"""Learning the gates: two losses that compete, and what keeps the competition fair.

The loss is the original project's: MSE reconstruction + λ · mean score (the L1 of the scores; with
a budget in parameters or FLOPs every score counts as much as its channel costs). Four things make
it learnable. The reconstruction is measured in the price of the channels at the target (see
`price_of`), so that λ means the same for every model and every scope. While learning, logistic
noise opens and closes channels near the threshold: under a hard straight-through gate alone a kept
channel never feels what its own removal would cost, since at m = 1 the gradient of a quadratic
loss holds only its interaction with the pruned ones; tried both ways, the two gradients average to
the true difference. A controller moves λ so that the sparsity follows a ramp to the target. What
it still misses in the end a cut by rank of the learned scores makes up.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from ldcp_core import (
    THRESHOLD,
    ChannelGate,
    Site,
    aligned_counts,
    least_kept,
    moving_cost,
    top_channels,
)
from training.learning.budget import Budget

#: every channel starts kept, its logit random between these: equal ones would fall together
START_LOGITS = (0.8, 1.2)
#: where it is known what each channel does alone, logits start here: cheapest, at the price, and by
#: how much per e-fold above it, so that what matters most is never tried closed
CHEAPEST_LOGIT, PRICE_LOGIT, LOGIT_PER_FOLD = 0.2, 1.0, 0.5
#: logits stay within this, so that a channel can always come back
LOGIT_BOUND = 5.0
#: the original project's balanced setting: its λ, and its target (λ alone prunes less)
ORIGINAL_WEIGHT, ORIGINAL_SPARSITY = 0.01, 0.3
#: the least logit of the channels that a floor keeps
FLOOR_LOGIT = 0.01
#: scale of the logistic noise on the logits: while exploring, and at the end
NOISE, LAST_NOISE = 0.5, 0.03
#: shares of the run: the target is reached, noise and learning rate begin to fall, noise is least
RAMP_END, FADE_START, FADE_END = 0.4, 0.45, 0.75
#: learning rate at the end of the run, as a share of the first
LAST_LEARNING_RATE = 0.2
#: how far a logit can go over a run: the way from bound to bound. With more, the last steps decide
TRAVEL = 6.0
#: the λ controller: e-folds of λ per unit of missing sparsity, and per unit that is missing for a
#: whole run once the ramp has ended; the most of them
PROPORTIONAL, INTEGRAL, MOST_FOLDS = 60.0, 300.0, 9.0
#: how closely a fit's sparsity must meet its target, and how far alignment may leave it
TARGET_TOLERANCE, ALIGNMENT_SLACK = 0.01, 0.0025


class GateLearner(nn.Module):
    """One `ChannelGate` per site, with the masks of the current step.

    Of every site at least the share ``floor`` is kept.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        seed: int,
        budget: Budget | None = None,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.budget = budget or Budget("channels", sites)
        self.least = {site.name: least_kept(site.channels, floor, site.multiple) for site in sites}
        self.generator = torch.Generator().manual_seed(seed)
        low, high = START_LOGITS
        self.gate_of = {
            site.name: ChannelGate(
                low
                + (high - low) * torch.rand(site.channels // site.group, generator=self.generator),
                site.group,
            )
            for site in sites
        }
        self.gates = nn.ModuleList(self.gate_of.values())

    @torch.no_grad()
    def start_(self, effects: Mapping[str, Tensor], price: float) -> None:
        """Begin at what each channel does alone (site name -> [C], of any scale).

        All are kept, the cheapest nearest to the threshold; those below ``price`` (see `price_of`)
        by their rank, since equal logits would fall together. In a group all do the same.
        """
        found = worths(effects, self.budget)
        worth = torch.cat([found[site][:: gate.group] for site, gate in self.gate_of.items()])
        below = int((worth < price).sum())
        rank = torch.empty_like(worth)
        rank[worth.argsort()] = torch.arange(len(worth), dtype=worth.dtype)
        ranked = CHEAPEST_LOGIT + (PRICE_LOGIT - CHEAPEST_LOGIT) * rank / max(below, 1)
        folds = (worth / price).clamp(min=1.0).log()
        logits = torch.where(worth < price, ranked, PRICE_LOGIT + LOGIT_PER_FOLD * folds)
        gates = self.gate_of.values()
        parts = logits.clamp(max=LOGIT_BOUND).split([gate.logits.numel() for gate in gates])
        for gate, part in zip(gates, parts, strict=True):
            gate.logits.copy_(part)

    def masks(self, noise_scale: float) -> dict[str, Tensor]:
        """Site name -> mask [C]; exact (the file's rule) when ``noise_scale`` is 0."""
        return {site: gate(self._noise(gate, noise_scale)) for site, gate in self.gate_of.items()}

    def penalty(self) -> Tensor:
        """The sparsity penalty: what the scores leave of the budget, a scalar with gradient.

        Counted in channels that is the mean of all scores, the original project's L1.
        """
        kept = {site: gate.score.sum() for site, gate in self.gate_of.items()}
        return self.budget.remaining(kept)

    def scores(self) -> dict[str, Tensor]:
        """Site name -> score [C] as it stands, detached, on the CPU."""
        return {site: gate.score.detach().float().cpu() for site, gate in self.gate_of.items()}

    def keep_sets(self) -> dict[str, Tensor]:
        return {site: score > THRESHOLD for site, score in self.scores().items()}

    def sparsity(self) -> float:
        """Pruned share of the budget under the file's rule."""
        return self.budget.pruned(self.keep_sets())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Hold the logits within their bounds, and the best of every site above the threshold."""
        for gate in self.gate_of.values():
            gate.logits.clamp_(-LOGIT_BOUND, LOGIT_BOUND)
        self._keep_floor_()

    @torch.no_grad()
    def settle_(self, target: float) -> None:
        """Cut by rank of the scores: move all logits alike until ``target`` is pruned.

        As near as a single channel allows; the order of the scores does not change, but for the
        channels that a floor keeps.
        """
        ordered = torch.cat([gate.logits for gate in self.gate_of.values()]).sort().values
        cuts = range(len(ordered))
        after = bisect_left(cuts, target, key=lambda cut: self.pruned_by(ordered[cut]))
        around = [cut for cut in (after - 1, after) if cut in cuts]
        nearest = min(around, key=lambda cut: abs(self.pruned_by(ordered[cut]) - target))
        for gate in self.gate_of.values():
            gate.logits.sub_(ordered[nearest])
        self._keep_floor_()

    def pruned_by(self, cut: Tensor) -> float:
        """The pruned share of the budget if channels up to the logit ``cut`` were pruned."""
        above = {
            site: gate.group * int((gate.logits > cut).sum()) for site, gate in self.gate_of.items()
        }
        counts = {site: max(count, self.least[site]) for site, count in above.items()}
        return 1.0 - self.budget.remaining(counts)

    def _keep_floor_(self) -> None:
        for site, gate in self.gate_of.items():
            best = torch.topk(gate.logits, self.least[site] // gate.group).indices
            gate.logits[best] = gate.logits[best].clamp(min=FLOOR_LOGIT)

    def _noise(self, gate: ChannelGate, scale: float) -> Tensor | None:
        if scale == 0:
            return None
        uniform = torch.rand(gate.logits.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        return (scale * torch.logit(uniform)).to(gate.logits.device)


def worths(effects: Mapping[str, Tensor], budget: Budget) -> dict[str, Tensor]:
    """What each channel does alone per share of the budget it takes: site name -> float64 [C]."""
    full = {site: effect.numel() for site, effect in effects.items()}
    weights = dict(zip(full, budget.weights(full), strict=True))
    return {site: effect.double() / weights[site] for site, effect in effects.items()}


def price_of(effects: Mapping[str, Tensor], budget: Budget, target: float | None) -> float:
    """The worth below which channels make up ``target`` of the budget: what λ has to be there.

    To first order, each channel taken alone, λ · unit of such a price prunes that share. At least
    the original project's share, also where there is no target: at the price of fewer channels only
    those would start within reach of the threshold, and what they do together stayed unlearned.
    """
    sparsity = max(target or 0.0, ORIGINAL_SPARSITY)
    found = worths(effects, budget)
    full = {site: worth.numel() for site, worth in found.items()}
    weights = dict(zip(full, budget.weights(full), strict=True))
    worth = torch.cat(list(found.values()))
    shares = torch.cat([torch.full_like(found[site], weights[site]) for site in full])
    order = worth.argsort()
    passed = shares[order].cumsum(0) >= sparsity * shares.sum() * (1 - 1e-9)
    return max(float(worth[order][passed][0]), 1e-30)


class SparsityController:
    """Moves λ so that the sparsity follows a ramp to the target.

    The further behind the ramp, by the larger a factor λ exceeds ``weight``. Ahead of it λ falls as
    fast, and below zero: of channels that do next to nothing few come back by themselves. Where the
    ramp has ended, what is still missing is summed as well: λ then settles where it holds the
    target, and the last steps compare the channels around the cut. On the ramp it is not summed: at
    high targets that sum outgrew the reconstruction and pruned blindly. Without a target λ stays
    what it is.
    """

    def __init__(self, weight: float, target: float | None, steps: int) -> None:
        self.weight = self._first = weight
        self.target = target
        self.steps = steps
        self._sum = 0.0

    def wanted(self, step: int) -> float | None:
        """The sparsity wanted at ``step``, rising to the target over the first part of the run."""
        if self.target is None:
            return None
        return self.target * min(1.0, (step + 1) / (RAMP_END * self.steps))

    def update(self, step: int, sparsity: float) -> None:
        wanted = self.wanted(step)
        if wanted is None:
            return
        missing = wanted - sparsity
        if wanted == self.target:
            self._sum = _bounded(self._sum + INTEGRAL * missing / self.steps)
        folds = _bounded(PROPORTIONAL * missing + self._sum)
        factor = 1 + math.copysign(math.expm1(abs(folds)), folds)
        self.weight = max(self._first, 1e-6) * factor

    def state_dict(self) -> dict[str, float]:
        return {"weight": self.weight, "sum": self._sum}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.weight, self._sum = state["weight"], state["sum"]


def _bounded(folds: float) -> float:
    return min(max(folds, -MOST_FOLDS), MOST_FOLDS)


def new_optimizer(learner: GateLearner, learning_rate: float, weight: float) -> torch.optim.Adam:
    """Adam on the logits.

    Its epsilon is a fifth of the pull of λ₀ on a single logit at the threshold: channels that
    hardly matter then move in proportion to λ, not all at full speed in the direction of its sign.
    """
    channels = sum(logits.numel() for logits in learner.parameters())
    return torch.optim.Adam(
        learner.parameters(),
        lr=learning_rate,
        betas=(0.9, 0.99),
        eps=max(0.05 * weight / channels, 1e-8),
    )


def default_learning_rate(steps: int) -> float:
    """Such that a logit can travel `TRAVEL` over the run, whatever its length."""
    return min(TRAVEL / steps, 0.3)


def noise_scale(step: int, steps: int) -> float:
    """Scale of the logistic noise on the logits: `NOISE`, then falling to `LAST_NOISE`."""
    left = min(max((FADE_END - step / steps) / (FADE_END - FADE_START), 0.0), 1.0)
    return LAST_NOISE + (NOISE - LAST_NOISE) * left


def learning_rate_factor(step: int, steps: int) -> float:
    """1 while the noise explores, then a cosine down to `LAST_LEARNING_RATE`."""
    progress = min(max((step / steps - FADE_START) / (1.0 - FADE_START), 0.0), 1.0)
    fall = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - LAST_LEARNING_RATE) * fall


def aligned_scores(
    scores: Mapping[str, Tensor],
    target: float | None,
    budget: Budget,
    sites: Sequence[Site],
    least: Mapping[str, int] | None = None,
    deviation: Callable[[Mapping[str, Tensor]], float] | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Move channels across the threshold until every kept count is aligned.

    Returns the scores and how many channels changed sides. Counts are balanced over the ``sites``,
    those of the scores, so that the target (without one: the learned sparsity) holds in the unit of
    the budget. The order of the scores within a site does not change.

    What another count costs is the ``deviation`` of the learned keep-sets (site name -> bool [C])
    with that of this site alone changed. Without it a channel's effect is taken for its weight in
    the budget times the odds of its score, score / (1 − score): those above the threshold are
    pruned less readily than as many below it are kept.
    """
    learned = {site: score > THRESHOLD for site, score in scores.items()}
    wanted = {site: int(keep.sum()) for site, keep in learned.items()}
    widths = [score.numel() for score in scores.values()]
    weights = budget.weights(wanted)
    # the budget seen from the learned counts, where it is straight over a few channels
    total = sum(w * c for w, c in zip(weights, wanted.values(), strict=True))
    if target is not None:
        total += 1.0 - budget.remaining(wanted) - target
    counts = aligned_counts(
        list(wanted.values()),
        widths,
        total,
        [site.multiple for site in sites],
        least=None if least is None else [least[site] for site in scores],
        weights=weights,
        slack=ALIGNMENT_SLACK,
        cost=_odds(scores, weights) if deviation is None else _measured(scores, deviation),
    )
    aligned: dict[str, Tensor] = {}
    moved = 0
    for (site, score), count in zip(scores.items(), counts, strict=True):
        keep = top_channels(score, count)
        moved += int((keep != learned[site]).sum())
        aligned[site] = _with_keep_set(score, keep)
    return aligned, moved


def _odds(scores: Mapping[str, Tensor], weights: Sequence[float]) -> Callable[[int, int], float]:
    moving = moving_cost([torch.logit(score, eps=1e-6).exp() for score in scores.values()], 1.0)
    return lambda site, count: weights[site] * moving(site, count)


def _measured(
    scores: Mapping[str, Tensor], deviation: Callable[[Mapping[str, Tensor]], float]
) -> Callable[[int, int], float]:
    """The deviation by site and count, each measured once."""
    learned = {site: score > THRESHOLD for site, score in scores.items()}
    names = list(scores)
    as_learned = cache(lambda: deviation(learned))

    @cache
    def cost(site: int, count: int) -> float:
        name = names[site]
        if count == int(learned[name].sum()):
            return as_learned()
        return deviation({**learned, name: top_channels(scores[name], count)})

    return cost


def _with_keep_set(score: Tensor, keep: Tensor) -> Tensor:
    """The nearest scores for which ``score > 0.5`` is ``keep``, in the same order."""
    above = torch.nextafter(torch.tensor(THRESHOLD), torch.tensor(1.0))
    return torch.where(keep, score.clamp(min=above.item()), score.clamp(max=THRESHOLD))
