"""Learning on problems whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from ldcp_core import THRESHOLD, Topology
from training.learning.budget import Budget
from training.learning.learner import (
    LAST_LEARNING_RATE,
    LAST_NOISE,
    MOST_FOLDS,
    NOISE,
    GateLearner,
    SparsityController,
    aligned_scores,
    learning_rate_factor,
    new_optimizer,
    noise_scale,
    price_of,
)

SITES = Topology(widths=(16, 32, 96, 160)).sites("mid")
CHANNELS = 4 * 160


def learn(target: float, steps: int, effects: torch.Tensor, seed: int = 0) -> GateLearner:
    """Gates for the loss |Σ pruned effects|², scaled to 1 when everything is pruned."""
    learner = GateLearner(SITES, seed)
    optimizer = new_optimizer(learner, 0.05, 0.01)
    controller = SparsityController(0.01, target, steps)
    whole = effects.sum(0).square().sum()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * learning_rate_factor(step, steps)
        mask = torch.cat(list(learner.masks(noise_scale(step, steps)).values()))
        loss = ((1 - mask) @ effects).square().sum() / whole
        (loss + controller.weight * learner.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.clamp_()
        controller.update(step, learner.sparsity())
    learner.settle_(target)
    return learner


def error(keep: torch.Tensor, effects: torch.Tensor) -> float:
    return float(effects[~keep].sum(0).square().sum())


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7])
def test_learning_meets_the_target_and_beats_ranking_by_each_channels_own_effect(
    target: float,
) -> None:
    generator = torch.Generator().manual_seed(5)
    size = torch.exp(torch.randn(CHANNELS, 1, generator=generator))
    effects = torch.randn(CHANNELS, 80, generator=generator) * size
    learner = learn(target, 400, effects)
    assert learner.sparsity() == pytest.approx(target, abs=0.01)

    keep = torch.cat(list(learner.keep_sets().values()))
    ranked = torch.zeros(CHANNELS, dtype=torch.bool)
    ranked[effects.square().sum(1).argsort(descending=True)[: int(keep.sum())]] = True
    # ranking by own effect is blind to how errors cancel; learning sees their sum
    assert error(keep, effects) < 0.8 * error(ranked, effects)


def test_channels_without_effect_go_first() -> None:
    effects = torch.ones(CHANNELS, 1)
    useless = torch.arange(CHANNELS) % 4 == 0
    effects[useless] = 0.0
    effects[1::2] *= -1
    effects += (
        0.1
        * torch.randn(CHANNELS, 1, generator=torch.Generator().manual_seed(0))
        * (~useless[:, None])
    )
    spread = torch.eye(CHANNELS) * effects  # no two channels can cancel
    learner = learn(0.25, 300, spread)
    keep = torch.cat(list(learner.keep_sets().values()))
    assert (~keep[useless]).float().mean() > 0.95


def test_without_a_target_lambda_stays_fixed() -> None:
    controller = SparsityController(0.01, None, 10)
    for step in range(10):
        controller.update(step, 0.9)
    assert controller.weight == 0.01


def test_the_controller_presses_when_too_little_is_pruned_and_lets_go_when_too_much() -> None:
    controller = SparsityController(0.01, 0.3, 100)
    controller.update(99, 0.2)
    assert controller.weight > 0.01
    controller.update(99, 0.31)
    assert 0 < controller.weight < 0.01
    controller.update(99, 0.4)
    assert controller.weight < -0.01  # channels that do nothing don't come back by themselves


def test_lambda_is_back_when_the_sparsity_is_however_far_it_lagged_behind_the_ramp() -> None:
    controller = SparsityController(0.01, 0.6, 150)
    for step in range(59):  # the ramp takes 60
        controller.update(step, 0.0)
    assert controller.weight > 1e3 * 0.01
    controller.update(59, 0.6)
    assert controller.weight == pytest.approx(0.01)


def test_lambda_stays_where_it_brought_the_sparsity_to_the_target() -> None:
    controller = SparsityController(0.01, 0.6, 150)
    for step in range(60, 80):
        controller.update(step, 0.59)
    controller.update(80, 0.6)
    # 20 steps of 150 a point short: 300 · 0.01 · 20/150 = 0.4 e-folds
    assert controller.weight == pytest.approx(0.01 * math.exp(0.4))
    again = SparsityController(0.01, 0.6, 150)
    again.load_state_dict(controller.state_dict())
    again.update(81, 0.6)
    assert again.weight == pytest.approx(controller.weight)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_lambda_stays_within_bounds_however_long_the_target_is_missed(sparsity: float) -> None:
    controller = SparsityController(0.01, 0.6, 150)
    for step in range(150):
        controller.update(step, sparsity)
    assert abs(controller.weight / 0.01 - 1) == pytest.approx(math.expm1(MOST_FOLDS))
    for step in range(150, 160):  # and comes back within a few steps
        controller.update(step, 1.0 - sparsity)
    assert (controller.weight - 0.01) * (sparsity - 0.5) > 0


class TestSettling:
    """Four sites of 32 channels with random logits: one channel is 0.8 points of sparsity."""

    SITES = Topology(widths=(16, 16, 32, 32)).sites("mid")

    def learner(self, budget: str = "channels", floor: float = 0.0) -> GateLearner:
        learner = GateLearner(self.SITES, 0, Budget(budget, self.SITES), floor)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for gate in learner.gates:
                gate.logits.copy_(torch.randn(32, generator=generator))
        return learner

    def logits(self, learner: GateLearner) -> torch.Tensor:
        return torch.cat([gate.logits.detach() for gate in learner.gates])

    @pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("budget", ["channels", "parameters", "flops"])
    def test_the_target_is_met_to_a_channel_in_every_budget(self, budget, target) -> None:
        learner = self.learner(budget)
        before = self.logits(learner)
        learner.settle_(target)
        after = self.logits(learner)
        assert learner.sparsity() == pytest.approx(target, abs=0.01)
        # all moved alike: the order is what was learned
        assert torch.allclose(after - before, (after - before)[0], atol=1e-6)

    def test_a_floor_holds_and_the_other_sites_make_up_for_it(self) -> None:
        learner = self.learner(floor=0.25)
        with torch.no_grad():
            learner.gates[0].logits -= 4  # a site that would be emptied
        learner.settle_(0.5)
        kept = [int(keep.sum()) for keep in learner.keep_sets().values()]
        assert kept[0] == 8 and sum(kept) == 64


def test_the_masks_of_a_learner_are_the_files_rule_when_there_is_no_noise() -> None:
    learner = GateLearner(SITES, 0)
    with torch.no_grad():
        learner.gates[0].logits[:5] = torch.tensor([-1.0, 0.0, 1e-3, 2.0, -3.0])
    mask = learner.masks(0.0)[SITES[0].name]
    assert mask[:5].tolist() == [0, 0, 1, 1, 0]  # sigmoid(0) = 0.5 is pruned
    assert torch.equal(mask.bool(), learner.keep_sets()[SITES[0].name])


def test_the_course_of_noise_and_learning_rate() -> None:
    assert (noise_scale(0, 100), noise_scale(99, 100)) == (NOISE, LAST_NOISE)
    assert learning_rate_factor(0, 100) == 1.0
    assert math.isclose(learning_rate_factor(100, 100), LAST_LEARNING_RATE)


class TestAlignment:
    def scores(self, kept: list[int]) -> dict[str, torch.Tensor]:
        """Sites of 160 channels of which so many are kept."""
        order = {site.name: torch.arange(160) - k for site, k in zip(SITES, kept, strict=True)}
        return {site: torch.sigmoid(-(rank + 0.5) / 40) for site, rank in order.items()}

    def aligned(
        self,
        kept: list[int],
        effects: list[float],
        target: float | None = None,
    ) -> tuple[list[int], int, int]:
        """Kept counts, how many channels moved, and how often the deviation was asked for.

        A pruned channel adds to the deviation, the more the better its rank, at each site by
        another factor.
        """
        scores, asked, by_rank = self.scores(kept), [], torch.arange(160, 0, -1)

        def deviation(keep: Mapping[str, torch.Tensor]) -> float:
            asked.append(tuple(int(k.sum()) for k in keep.values()))
            parts = zip(effects, keep.values(), strict=True)
            return sum(effect * float(by_rank[~kept].sum()) for effect, kept in parts)

        budget = Budget("channels", SITES)
        found, moved = aligned_scores(scores, target, budget, SITES, deviation=deviation)
        assert len(set(asked)) == len(asked)  # none twice
        for site, aligned in found.items():
            assert (aligned[:-1] >= aligned[1:]).all()  # the order within a site stays
            assert (scores[site] - aligned).abs().max() < 0.1
        return [int((score > THRESHOLD).sum()) for score in found.values()], moved, len(asked)

    def test_counts_become_multiples_of_8_with_the_target_held(self) -> None:
        # 447 of 640 kept, 30.2% pruned; 448 are 30%
        counts, moved, _ = self.aligned([113, 110, 115, 109], [1.0, 1.0, 1.0, 1.0], 0.3)
        assert counts == [112, 112, 112, 112]
        assert moved == 1 + 2 + 3 + 3

    def test_the_sites_whose_channels_do_least_give_them(self) -> None:
        kept = [100, 100, 100, 100]
        assert self.aligned(kept, [1.0, 1.0, 4.0, 4.0])[0] == [96, 96, 104, 104]
        assert self.aligned(kept, [4.0, 1.0, 4.0, 1.0])[0] == [104, 96, 104, 96]

    def test_without_a_measure_channels_above_the_threshold_go_less_readily_than_those_below_stay(
        self,
    ) -> None:
        scores = self.scores([80, 80, 80, 80])
        logits = torch.tensor([3.0] * 152 + [0.4] * 4 + [-0.45] * 4)
        scores[SITES[0].name] = torch.sigmoid(logits)
        found, moved = aligned_scores(scores, None, Budget("channels", SITES), SITES)
        assert int((found[SITES[0].name] > THRESHOLD).sum()) == 160 and moved == 4

    def test_without_a_target_the_learned_sparsity_is_held(self) -> None:
        scores = self.scores([150, 150, 150, 150])
        found, _ = aligned_scores(scores, None, Budget("channels", SITES), SITES)
        kept = sum(int((s > THRESHOLD).sum()) for s in found.values())
        assert abs(kept - 600) <= 8

    def test_counts_that_fit_as_they_are_ask_for_nothing(self) -> None:
        assert self.aligned([80, 160, 96, 8], [1.0, 1.0, 1.0, 1.0]) == ([80, 160, 96, 8], 0, 0)


def test_a_start_at_what_channels_do_keeps_all_and_puts_the_cheapest_nearest() -> None:
    learner = GateLearner(SITES, 0)
    generator = torch.Generator().manual_seed(1)
    effects = {s.name: torch.rand(s.channels, generator=generator) ** 6 for s in SITES}
    price = price_of(effects, learner.budget, None)
    learner.start_(effects, price)
    logits = torch.cat([gate.logits.detach() for gate in learner.gates])
    effect = torch.cat(list(effects.values()))
    assert learner.sparsity() == 0 and logits.min() == pytest.approx(0.2)
    order = effect.argsort()
    assert bool((logits[order][1:] >= logits[order][:-1]).all())
    below = effect < effect.sort().values[round(0.3 * CHANNELS) - 1]
    assert logits[below].max() < 1.0 <= logits[~below].min() + 1e-5
    # ten times the price is ln 10 folds above it
    price /= CHANNELS
    assert logits[effect.argmax()].item() == pytest.approx(
        1 + 0.5 * math.log(effect.max().item() / price), abs=1e-4
    )


def test_the_price_is_where_the_share_of_the_budget_ends() -> None:
    effects = {s.name: torch.arange(160.0) + 1 for s in SITES}
    budget = Budget("channels", SITES)
    # of 640 channels, each worth its effect times 640, the cheapest 30% end at the 192nd
    assert price_of(effects, budget, None) == pytest.approx(48 * 640)
    # at a lower target too, so that more channels than that are within reach
    assert price_of(effects, budget, 0.1) == pytest.approx(48 * 640)
    assert price_of(effects, budget, 0.5) == pytest.approx(80 * 640)
