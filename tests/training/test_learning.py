"""Learning on problems whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from ldcp_core import THRESHOLD, Topology
from training.budget import Budget
from training.learning import (
    LAST_LEARNING_RATE,
    LAST_NOISE,
    NOISE,
    GateLearner,
    Landing,
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
    landing = Landing(learner, target, steps)
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
        landing.watch(step, learner.sparsity())
    landing.settle_()
    return learner


def error(keep: torch.Tensor, effects: torch.Tensor) -> float:
    return float(effects[~keep].sum(0).square().sum())


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
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


def test_the_controller_presses_when_too_little_is_pruned_and_pulls_when_too_much() -> None:
    controller = SparsityController(0.01, 0.3, 100)
    controller.update(99, 0.2)
    assert controller.weight > 0.01
    for step in range(100):
        controller.update(step, 0.6)
    assert controller.weight < 0


class TestLanding:
    """Sites of 32 channels: one channel is 0.8 points of sparsity."""

    def watched(self, kept: list[int], target: float | None) -> int:
        """Pruned channels after 100 steps of which the last pruned so many, in that order."""
        learner = GateLearner(Topology(widths=(16, 16, 32, 32)).sites("mid"), 0)
        landing = Landing(learner, target, 100)
        for step, count in enumerate([64] * (100 - len(kept)) + kept):
            logits = torch.where(torch.arange(128) < count, -1.0, 1.0)
            with torch.no_grad():
                for gate, part in zip(learner.gates, logits.chunk(4), strict=True):
                    gate.logits.copy_(part)
            landing.watch(step, learner.sparsity())
        landing.settle_()
        return round(128 * learner.sparsity())

    def test_the_latest_state_on_target_is_taken(self) -> None:
        assert self.watched([*[58] * 22, 65, 63, 58, 59], 0.5) == 63

    def test_the_nearest_where_none_is_on_target(self) -> None:
        assert self.watched([*[20] * 22, 30, 27, 40, 22], 0.5) == 40

    def test_only_the_final_phase_counts(self) -> None:
        assert self.watched([40] * 26, 0.5) == 40  # 64 of 128, the target, came before

    def test_without_a_target_nothing_is_undone(self) -> None:
        assert self.watched([64, 3], None) == 3

    def test_a_landing_comes_back_from_its_state(self) -> None:
        learner = GateLearner(Topology(widths=(16, 16, 32, 32)).sites("mid"), 0)
        landing = Landing(learner, 0.5, 100)
        found = torch.where(torch.arange(128) < 64, -1.0, 1.0)
        for logits in (found, torch.ones(128)):
            with torch.no_grad():
                for gate, part in zip(learner.gates, logits.chunk(4), strict=True):
                    gate.logits.copy_(part)
            landing.watch(90, learner.sparsity())
        again = Landing(learner, 0.5, 100)
        again.load_state_dict(landing.state_dict())
        again.watch(91, 0.0)  # as far off as the last one: what was found stays
        again.settle_()
        assert torch.equal(torch.cat([gate.logits.detach() for gate in learner.gates]), found)


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
        """Sites of 160 channels of which so many are kept; distances from 0.5 are all distinct."""
        found = {}
        for site, count in zip(SITES, kept, strict=True):
            order = torch.arange(160) - count + 0.5  # negative: kept
            found[site.name] = torch.sigmoid(-order / 40)
        return found

    def test_counts_become_multiples_of_8_with_the_target_held(self) -> None:
        scores = self.scores([113, 110, 115, 109])  # 447 of 640 kept: 30.2% pruned
        result = aligned_scores(scores, 0.3, Budget("channels", SITES))
        counts = [int((s > THRESHOLD).sum()) for s in result.scores.values()]
        assert all(count % 8 == 0 for count in counts)
        assert sum(counts) == 448  # 70% of 640
        # from 113, 110, 115, 109: down to 112 (1), up to 112 (2), 112 (3), 112 (3)
        assert counts == [112, 112, 112, 112]
        assert result.moved == 9

    def test_the_order_within_a_site_stays(self) -> None:
        scores = self.scores([113, 110, 115, 109])
        for site, aligned in aligned_scores(scores, 0.3, Budget("channels", SITES)).scores.items():
            assert (aligned[:-1] >= aligned[1:]).all()
            assert (scores[site] - aligned).abs().max() < 0.05

    def test_alignment_does_not_stand_in_for_learning(self) -> None:
        scores = self.scores([150, 150, 150, 150])  # 6% pruned, target 30%
        result = aligned_scores(scores, 0.3, Budget("channels", SITES))
        kept = sum(int((s > THRESHOLD).sum()) for s in result.scores.values())
        assert abs(kept - 600) <= 8


def test_a_start_at_what_channels_do_keeps_all_and_puts_the_cheapest_nearest() -> None:
    learner = GateLearner(SITES, 0)
    generator = torch.Generator().manual_seed(1)
    effects = {s.name: torch.rand(s.channels, generator=generator) ** 6 for s in SITES}
    learner.start_(effects)
    logits = torch.cat([gate.logits.detach() for gate in learner.gates])
    effect = torch.cat(list(effects.values()))
    assert learner.sparsity() == 0 and logits.min() == pytest.approx(0.2)
    order = effect.argsort()
    assert bool((logits[order][1:] >= logits[order][:-1]).all())
    below = effect < effect.sort().values[round(0.3 * CHANNELS) - 1]
    assert logits[below].max() < 1.0 <= logits[~below].min() + 1e-5
    # ten times the price is ln 10 folds above it
    price = price_of(effects, learner.budget) / CHANNELS
    assert logits[effect.argmax()].item() == pytest.approx(
        1 + 0.5 * math.log(effect.max().item() / price), abs=1e-4
    )


def test_the_price_is_where_the_share_of_the_budget_ends() -> None:
    effects = {s.name: torch.arange(160.0) + 1 for s in SITES}
    budget = Budget("channels", SITES)
    # of 640 channels, each worth its effect times 640, the cheapest 30% end at the 192nd
    assert price_of(effects, budget) == pytest.approx(48 * 640)
    assert price_of(effects, budget, 0.5) == pytest.approx(80 * 640)
