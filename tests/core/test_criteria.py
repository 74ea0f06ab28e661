"""Magnitudes, the scores made of them, and the data-free constant, against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldcp_core import (
    HIDDEN,
    RANKINGS,
    ConvWeights,
    Gates,
    LinearWeights,
    expected_hidden,
    expected_output,
    magnitude,
    scores_at,
)
from ldcp_core.criteria import expected_silu

A, B = (f"mid_block.resnets.0.conv{c}" for c in (1, 2))

quick = settings(max_examples=150, deadline=None, derandomize=True)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def two_channel_weight() -> Tensor:
    """Rows of 18 weights: channel 0 all -0.5; channel 1 a single 3 and a single -4."""
    weight = torch.zeros(2, 2, 3, 3)
    weight[0] = -0.5
    weight[1, 0, 0, 0], weight[1, 1, 2, 2] = 3.0, -4.0
    return weight


@st.composite
def random_importances(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to four sites of different scales; few distinct values, so that ties are common."""
    widths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    levels = draw(st.sampled_from([1, 4, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return {
        f"site{i}": 10.0**i * torch.randint(0, levels + 1, (w,), generator=generator)
        for i, w in enumerate(widths)
    }


def test_l1_is_the_sum_and_l2_the_length_of_a_row() -> None:
    weight = two_channel_weight()
    # l1: 18 * 0.5 = 9 and 3 + 4 = 7; l2: sqrt(18 * 0.25) = 2.1213 and sqrt(9 + 16) = 5
    assert magnitude(weight, "l1").tolist() == [9.0, 7.0]
    assert magnitude(weight, "l2").tolist() == pytest.approx([math.sqrt(4.5), 5.0])


def test_half_precision_neither_overflows_nor_vanishes_nor_loses_small_differences() -> None:
    weight = torch.full((2, 1280, 3, 3), 60.0, dtype=torch.float16)
    weight[1, 0, 0, 0] = 61.0
    # 11520 * 60 = 691200, far above float16's 65504
    assert magnitude(weight, "l1").tolist() == [691200.0, 691201.0]
    first, second = magnitude(weight, "l2").tolist()
    assert first == pytest.approx(60 * math.sqrt(11520)) and second > first
    # 2^-14 squared is 2^-28, and float16 ends at 2^-24
    assert magnitude(torch.full((1, 4, 2, 2), 2.0**-14).half(), "l2").tolist() == [2.0**-12]


def test_an_unknown_criterion_or_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown criterion 'l3'; known are l1, l2"):
        magnitude(torch.ones(2, 2, 3, 3), "l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known are per layer, global"):
        scores_at({A: torch.ones(8)}, 0.5, "layer")  # type: ignore[arg-type]


def test_scores_are_the_ranks_with_the_cut_at_one_half() -> None:
    importance = torch.arange(16.0)
    (scores,) = scores_at({A: importance}, 0.5, "per layer").values()
    # the rank r of 16 has (r + 0.5) / 16 of the channels below it; with the cut at 8 / 16 the map
    # is the identity: channel 0 gets 1 / 32 = 0.03125, channel 8 gets 17 / 32 = 0.53125
    assert scores.tolist() == [(r + 0.5) / 16 for r in range(16)]
    (scores,) = scores_at({A: importance}, 0.25, "per layer").values()
    # round(0.75 * 16) = 12 is no multiple of 8, and 8 and 16 are equally far: the
    # rounded-down count stays
    assert (scores > 0.5).nonzero()[:, 0].tolist() == list(range(8, 16))


def test_per_layer_prunes_the_same_share_of_each_and_global_where_it_hurts_least() -> None:
    even, uneven = torch.full((16,), 100.0), torch.tensor([0.1] * 8 + [1.9] * 8)
    importances = {A: even, B: uneven}
    per_layer = scores_at(importances, 0.25, "per layer")
    # 12 of 16 is half-way between two multiples of 8, the rounded-down one stays
    assert [int((s > 0.5).sum()) for s in per_layer.values()] == [8, 8]
    together = scores_at(importances, 0.25, "global")
    assert [int((s > 0.5).sum()) for s in together.values()] == [16, 8]
    together = scores_at(importances, 0.5, "global")
    # divided by their means A is 1.0 throughout and B 0.1 or 1.9: the 8 small ones of B go, then 8
    # of A, although in absolute size all of B is smaller than all of A
    assert [int((s > 0.5).sum()) for s in together.values()] == [8, 8]
    assert (together[B] > 0.5).tolist() == [False] * 8 + [True] * 8


def test_neighbouring_numbers_keep_their_order() -> None:
    below_two = (2.0 - torch.arange(16, 0, -1, dtype=torch.float64) * 2**-23).float()
    importance = torch.cat([torch.zeros(8), below_two])  # mean 1.33: quotients in float32 would tie
    assert (importance[8:].diff() > 0).all()
    (scores,) = scores_at({A: importance}, 0.5, "per layer").values()
    assert (scores[8:].diff() > 0).all()


def test_ties_are_broken_by_site_then_index() -> None:
    same = {A: torch.ones(16), B: torch.ones(16)}
    together = scores_at(same, 0.5, "global")
    assert (together[A] > 0.5).all() and not (together[B] > 0.5).any()
    per_layer = scores_at(same, 0.5, "per layer")
    for site in (A, B):
        assert (per_layer[site] > 0.5).tolist() == [True] * 8 + [False] * 8


@quick
@given(random_importances(), st.floats(0, 1), st.sampled_from(RANKINGS))
def test_scores_lie_in_0_to_1_and_rise_with_the_importance(importances, sparsity, ranking) -> None:
    scores = scores_at(importances, sparsity, ranking)
    assert list(scores) == list(importances)
    for site, importance in importances.items():
        score = scores[site]
        assert score.dtype == torch.float32 and score.shape == importance.shape
        assert score.min() >= 0 and score.max() <= 1
        order = torch.sort(importance, stable=True).indices
        more = importance[order].diff() > 0
        assert (score[order].diff()[more] >= 0).all()
        # of equal channels the earlier one ranks higher
        assert (score[order].diff()[~more] <= 0).all()


@quick
@given(random_importances(), st.floats(0, 1), st.sampled_from(RANKINGS))
def test_exactly_the_chosen_channels_are_kept(importances, sparsity, ranking) -> None:
    keep = {site: s > 0.5 for site, s in scores_at(importances, sparsity, ranking).items()}
    if ranking == "global":
        relative = {s: i.double() / max(i.double().mean(), 1e-300) for s, i in importances.items()}
        wanted = Gates(relative).keep_sets_at(sparsity)
    else:
        wanted = {s: Gates({s: i}).keep_sets_at(sparsity)[s] for s, i in importances.items()}
    for site, chosen in wanted.items():
        assert torch.equal(keep[site], chosen)
        assert int(chosen.sum()) % 8 == 0 or chosen.all()


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_per_layer_a_cut_elsewhere_is_what_an_estimate_there_gives(first, second, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    importances = {s: torch.rand(320, generator=generator) for s in (A, B)}
    # multiples of 1 / 40 of 320 channels are multiples of 8: nothing is left to align
    gates = Gates(scores_at(importances, first / 40, "per layer"))
    there = Gates(scores_at(importances, second / 40, "per layer"))
    for site, keep in gates.keep_sets_at(second / 40).items():
        assert torch.equal(keep, there.keep_sets()[site])


@quick
@given(random_importances(), st.floats(0, 1), st.sampled_from(RANKINGS))
def test_a_cut_at_the_same_sparsity_changes_nothing(importances, sparsity, ranking) -> None:
    gates = Gates(scores_at(importances, sparsity, ranking))
    for site, keep in gates.keep_sets_at(gates.sparsity).items():
        assert torch.equal(keep, gates.keep_sets()[site])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_nothing_and_everything_can_be_pruned(ranking) -> None:
    importances = {A: torch.rand(20), B: torch.zeros(20)}
    assert all((s > 0.5).all() for s in scores_at(importances, 0.0, ranking).values())
    assert not any((s > 0.5).any() for s in scores_at(importances, 1.0, ranking).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_importances_that_mean_nothing_are_refused(bad) -> None:
    with pytest.raises(ValueError, match=f"importances of {A} are not all finite"):
        scores_at({A: torch.tensor([1.0, bad])}, 0.5, "global")


def test_a_sparsity_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="sparsity 1.5 is outside"):
        scores_at({A: torch.ones(8)}, 1.5, "per layer")


def test_a_constant_input_gives_the_constant_of_the_interior() -> None:
    weight = two_channel_weight()
    conv = ConvWeights(weight, torch.tensor([0.25, -1.0]))
    # gain 0: each input channel is silu(beta) everywhere, s(1) = 0.73106 and s(-2) = -0.23841.
    # Channel 0: 0.25 - 0.5 * 9 * (s(1) + s(-2)); channel 1: -1 + 3 s(1) - 4 s(-2)
    expected = [0.25 - 4.5 * (silu(1) + silu(-2)), -1 + 3 * silu(1) - 4 * silu(-2)]
    found = expected_output(conv, torch.zeros(2), torch.tensor([1.0, -2.0]))
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected)
    maps = torch.tensor([silu(1), silu(-2)]).view(1, 2, 1, 1).expand(1, 2, 5, 5)
    output = F.conv2d(maps, weight, conv.bias, padding=1)[0]
    assert output[:, 1:-1, 1:-1].mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-6)
    # zero padding takes five of nine taps away in a corner: other values there
    assert float(output[0, 0, 0]) == pytest.approx(0.25 - 2.0 * (silu(1) + silu(-2)), abs=1e-6)


def test_a_convolution_without_bias_has_none() -> None:
    conv = ConvWeights(two_channel_weight(), None)
    found = expected_output(conv, torch.zeros(2), torch.zeros(2))
    assert found.tolist() == [0.0, 0.0]


def test_the_expectation_of_silu_is_the_integral() -> None:
    # E[silu(z)] = 0.20662096 by the trapezoidal rule; E[silu(-2)] with gain 0 is exact
    assert float(expected_silu(torch.ones(1), torch.zeros(1))) == pytest.approx(
        0.20662096, abs=1e-8
    )
    grid = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    gamma = torch.tensor([0.0, 0.1, -1.0, 2.0, 3.0, 5.0])
    for beta in (-2.0, 0.0, 1.5):
        wanted = (F.silu(gamma.double()[:, None] * grid + beta) * density).sum(1)
        error = (expected_silu(gamma, torch.full_like(gamma, beta)) - wanted).abs()
        assert error[:-1].max() < 1e-6 and error[-1] < 2e-4


def test_the_constant_is_what_a_monte_carlo_estimate_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 6, 3, 3, generator=generator), torch.randn(4, generator=generator)
    gamma, beta = torch.randn(2, 6, generator=generator)
    z = torch.randn(100_000, 6, 3, 3, generator=generator)
    patches = F.silu(gamma[:, None, None] * z + beta[:, None, None])
    outputs = F.conv2d(patches, weight, bias)[:, :, 0, 0].double()
    found = expected_output(ConvWeights(weight, bias), gamma, beta)
    deviation = (found - outputs.mean(0)).abs() / (outputs.std(0) / math.sqrt(100_000))
    assert deviation.max() < 4  # standard errors


def test_a_hidden_channel_owns_its_two_rows() -> None:
    proj = torch.arange(12.0).view(6, 2)  # three hidden channels of width 2
    assert HIDDEN.rows_of(proj).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_the_expected_hidden_value_is_that_of_many_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, generator=generator)
    bias = torch.randn(12, generator=generator)
    gamma, beta = torch.rand(5, generator=generator) + 0.5, torch.randn(5, generator=generator)
    z = torch.randn(400_000, 5, generator=generator, dtype=torch.float64)
    value, gate = ((z * gamma + beta) @ weight.T.double() + bias).chunk(2, dim=1)
    samples = value * torch.nn.functional.gelu(gate)
    found = expected_hidden(LinearWeights(weight, bias), gamma, beta)
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((found - samples.mean(0)).abs() < 4 * error).all())


def test_a_hidden_channel_whose_gate_is_constant_has_a_known_value() -> None:
    # the gate's rows are zero: E[a] · gelu(b_g)
    weight = torch.cat([torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2)])
    found = expected_hidden(
        LinearWeights(weight, torch.tensor([0.5, 1.0])), torch.ones(2), torch.tensor([1.0, -1.0])
    )
    assert found.item() == pytest.approx((2 - 1 + 0.5) * 0.8413447, rel=1e-5)
