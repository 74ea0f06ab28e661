"""Moments of activations, and the importance made of them, against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldcp_core import Calibration, Moments, column_norms, fluctuation

quick = settings(max_examples=150, deadline=None, derandomize=True)


def by_hand() -> torch.Tensor:
    """[2, 2, 1, 2]: channel 0 is 1, 2 and 3, 6; channel 1 is -5 everywhere."""
    return torch.tensor([[[[1.0, 2.0]], [[-5.0, -5.0]]], [[[3.0, 6.0]], [[-5.0, -5.0]]]])


def test_moments_are_the_count_the_mean_and_the_squared_deviations() -> None:
    seen = Moments.of(by_hand())
    # channel 0: mean (1 + 2 + 3 + 6) / 4 = 3; deviations -2, -1, 0, 3, squares 4 + 1 + 0 + 9 = 14
    assert seen.count == 4
    assert seen.mean.tolist() == [3.0, -5.0] and seen.m2.tolist() == [14.0, 0.0]
    assert seen.variance.tolist() == [3.5, 0.0]
    assert seen.mean.dtype == seen.m2.dtype == torch.float64


def test_the_last_dimension_can_count_channels() -> None:
    seen = Moments.of(by_hand().movedim(1, -1), channels=-1)
    assert seen.count == 4 and seen.mean.tolist() == [3.0, -5.0]


def test_parts_add_up_to_the_whole_by_hand() -> None:
    first, second = (Moments.of(part[None]) for part in by_hand())
    # 1, 2: mean 1.5, m2 0.5; 3, 6: mean 4.5, m2 4.5; together 0.5 + 4.5 + 3² · 2 · 2 / 4 = 14
    assert first.m2.tolist() == [0.5, 0.0] and second.m2.tolist() == [4.5, 0.0]
    both = first + second
    assert (both.count, both.mean.tolist(), both.m2.tolist()) == (4, [3.0, -5.0], [14.0, 0.0])


@quick
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_parts_of_any_size_add_up_to_the_whole(sizes: list[int], mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) + mean
    total = None
    for part in x.split(sizes):
        new = Moments.of(part)
        total = new if total is None else total + new
    assert total is not None and total.count == len(x)
    assert torch.allclose(total.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(total.variance, x.var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_a_small_variation_about_a_large_mean_is_not_lost() -> None:
    """In float32, E[x²] − m² of these numbers is 0 or worse: 1000² has a spacing of 0.0625."""
    x = 1000 + 0.01 * torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0))
    seen = Moments.of(x)
    exact = x.double().var((0, 2), correction=0)
    assert torch.allclose(seen.variance, exact, rtol=1e-3)
    naive = x.square().mean((0, 2)) - x.mean((0, 2)).square()
    assert ((naive - exact).abs() > 0.1 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((4096, 1), 60.0, dtype=dtype)
    x[0] = 64.0  # sum 245764, beyond float16; m2 = 16 · 4095 / 4096
    seen = Moments.of(x)
    assert seen.mean.item() == pytest.approx(60 + 4 / 4096, rel=1e-6)
    assert seen.m2.item() == pytest.approx(16 * 4095 / 4096, rel=1e-3)


def test_column_norms_are_those_of_the_weights_that_read_a_channel() -> None:
    weight = torch.zeros(2, 3, 3, 3)
    weight[0, 0] = 1.0  # nine taps of 1: 9
    weight[0, 2, 1, 1], weight[1, 2, 0, 0] = 3.0, -4.0  # 9 + 16 = 25
    assert column_norms(weight).tolist() == [9.0, 0.0, 25.0]
    assert column_norms(weight.half()).tolist() == [9.0, 0.0, 25.0]
    # a linear layer [out, in]: 1 + 9, 4 + 16
    assert column_norms(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [10.0, 20.0]


def test_fluctuation_is_the_variance_times_the_norm_of_the_readers() -> None:
    variance, columns = torch.tensor([2.0, 0.0, 0.5]), torch.tensor([9.0, 100.0, 25.0])
    assert fluctuation(variance, columns).tolist() == [18.0, 0.0, 12.5]
    assert fluctuation(variance).tolist() == [2.0, 0.0, 0.5]
    assert fluctuation(variance, columns).dtype == torch.float32


def test_fluctuation_is_the_squared_error_that_the_mean_leaves() -> None:
    """At the output of the layer that reads: a 1x1 kernel, independent channels."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(2000, 3, 4, 4, generator=generator)
        * torch.tensor([0.2, 1.0, 3.0])[:, None, None]
    )
    x = x + torch.tensor([5.0, -1.0, 0.0])[:, None, None]
    weight = torch.randn(6, 3, 1, 1, generator=generator)
    seen = Moments.of(x)
    scores = fluctuation(seen.variance, column_norms(weight))
    for c in range(3):
        pruned = x.clone()
        pruned[:, c] = seen.mean[c].float()
        error = torch.nn.functional.conv2d(x - pruned, weight).square().sum(1).mean()
        assert scores[c].item() == pytest.approx(error.item(), rel=1e-4)


def watched_once(scale: float = 1.0) -> Calibration:
    seen = Calibration(evaluations=1)
    for site in ("a.conv1", "a.conv2"):
        seen.saw_output(site, scale * by_hand())
    seen.saw_input("a.conv1", scale * by_hand() + 1)
    seen.read_with("a.conv1", torch.tensor([2.0, 7.0]))
    return seen


def test_a_calibration_gives_means_and_importances() -> None:
    seen = watched_once()
    assert seen.constants()["a.conv1"].tolist() == [3.0, -5.0]
    # what conv2 reads varies by 3.5 and 0; its columns have norms 2 and 7
    assert seen.importances()["a.conv1"].tolist() == [7.0, 0.0]
    # the residual sum reads with weight one
    assert seen.importances()["a.conv2"].tolist() == [3.5, 0.0]


def test_two_calibrations_count_both() -> None:
    both = watched_once() + watched_once(3.0)
    # means 3 and 9; m2 14 + 126 + 6² · 4 · 4 / 8 = 212, over 8
    assert both.evaluations == 2
    assert both.constants()["a.conv2"].tolist() == [6.0, -10.0]
    assert both.importances()["a.conv2"][0].item() == 212 / 8
    assert both.columns["a.conv1"].mean.tolist() == [2.0, 7.0]
    assert both.columns["a.conv1"].count == 2


def test_calibrations_of_other_layers_are_refused() -> None:
    other = Calibration(evaluations=1)
    other.saw_output("a.conv2", torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"2 sites \(4 channels\) and of 1 site \(5 channels\)"):
        watched_once() + other


def test_what_is_no_number_stays_visible() -> None:
    seen = Calibration()
    seen.saw_output("a", torch.tensor([[1.0], [math.inf]]))
    seen.saw_output("a", torch.tensor([[1.0], [1.0]]))
    assert not torch.isfinite(seen.outputs["a"].m2).any()
