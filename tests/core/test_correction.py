"""Corrections: least squares that finds what is there, says no where nothing is, and adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ldcp_core.correction
from ldcp_core import RANK, SD15, Correction, Gates, Regression

CHANNELS, OUTPUTS = 12, 8
KEEP = torch.arange(CHANNELS) % 3 != 0
SITE = "mid_block.resnets.0.conv1"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(kind: str, seed: int, batch: int = 4) -> Tensor:
    return (
        random(batch, CHANNELS, 6, 5, seed=seed)
        if kind == "conv"
        else random(batch, 30, CHANNELS, seed=seed)
    )


def read(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1) if x.dim() == 4 else F.linear(x, weight, bias)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_what_the_kept_channels_tell_is_found(kind: str) -> None:
    """What is missing is a linear function of rank 2 of what is fed, and a bias."""
    taps = (3, 3) if kind == "conv" else ()
    true = Correction(
        random(OUTPUTS, 2, seed=1), random(2, 8 * 9 ** bool(taps), seed=2), random(OUTPUTS, seed=3)
    )
    update, shift = true.added(torch.zeros(OUTPUTS, CHANNELS, *taps), torch.zeros(OUTPUTS), KEEP)
    regression = Regression(KEEP)
    for seed in range(40):
        x = maps(kind, seed)
        regression.add(x, read(x, update, shift), held_out=seed % 5 == 4)
    found = regression.correction(rank=2)
    assert found is not None and found.left.dtype == found.right.dtype == torch.float16
    assert found.left.shape == (OUTPUTS, 2) and found.bias.dtype == torch.float32
    weight, bias = found.added(torch.zeros(OUTPUTS, CHANNELS, *taps), torch.zeros(OUTPUTS), KEEP)
    size = update.square().mean().sqrt()
    assert (weight - update).square().mean().sqrt() < 0.01 * size
    assert not weight[:, ~KEEP].any()
    assert bias is not None and torch.allclose(bias, shift, atol=0.02)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_larger_rank_leaves_less(kind: str) -> None:
    taps = (3, 3) if kind == "conv" else ()
    weight = random(OUTPUTS, CHANNELS, *taps, seed=1) * KEEP.view(1, CHANNELS, *(1 for _ in taps))
    regression = Regression(KEEP)
    for seed in range(40):
        x = maps(kind, seed)
        regression.add(x, read(x, weight), held_out=seed % 5 == 4)
    left = []
    for rank in (1, 4, 8):
        found = regression.correction(rank)
        assert found is not None
        corrected, _ = found.added(torch.zeros_like(weight), None, KEEP)
        left.append(float((corrected - weight).square().mean()))
    assert left[0] > left[1] > left[2]
    assert left[2] < 1e-4 * left[0]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_large_maps_are_gathered_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taps = (3, 3) if kind == "conv" else ()
    sums = []
    for at_once in (ldcp_core.correction.ROWS_AT_ONCE, 7):
        monkeypatch.setattr(ldcp_core.correction, "ROWS_AT_ONCE", at_once)
        regression = Regression(KEEP)
        x = maps(kind, 0)
        regression.add(x, read(x, random(OUTPUTS, CHANNELS, *taps)))
        sums.append((regression._moments, regression._products))
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-4, atol=1e-3)


class Allocated(TorchDispatchMode):
    """Counts the float32 matrices of a shape that operations put in new memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape, self.places = shape, set[int]()
        self._alive: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self._shape:
            self._alive.append(result)  # so that no place is used twice
            self.places.add(result.data_ptr())
        return result


def test_gathering_a_large_map_takes_one_matrix_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it may be a gigabyte."""
    monkeypatch.setattr(ldcp_core.correction, "ROWS_AT_ONCE", 7)
    features, x = 9 * int(KEEP.sum()) + 1, maps("conv", 0)
    with Allocated((features, features)) as found:
        Regression(KEEP).add(x, read(x, random(OUTPUTS, CHANNELS, 3, 3)))
    assert len(found.places) == 1


def test_what_does_not_hold_for_other_rows_is_not_a_correction() -> None:
    """Noise that few rows let a regression explain, and other rows don't."""
    regression = Regression(KEEP)
    for seed in range(2):
        regression.add(
            maps("conv", seed, 1), random(1, OUTPUTS, 6, 5, seed=seed + 9), held_out=seed == 1
        )
    assert regression.correction() is None


def test_without_rows_to_check_with_there_is_no_correction() -> None:
    regression = Regression(KEEP)
    x = maps("linear", 0)
    regression.add(x, x[..., :OUTPUTS])
    assert regression.correction() is None


def test_rows_held_out_are_bounded() -> None:
    regression = Regression(KEEP)
    for seed in range(20):
        x = maps("linear", seed, 50)
        regression.add(x, x[..., :OUTPUTS], held_out=True)
    rows = [len(x) for x, _ in regression._held]
    assert 0 < sum(rows) <= Regression.HELD_OUT and min(rows) == max(rows) > 0


def test_values_that_are_not_finite_give_no_correction() -> None:
    regression = Regression(KEEP)
    for seed in range(5):
        x = maps("linear", seed)
        regression.add(x, x[..., :OUTPUTS] * (torch.inf if seed == 2 else 1), held_out=seed == 4)
    assert regression.correction() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_adds_to_whatever_weight_there_is_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    correction = Correction(random(OUTPUTS, RANK), random(RANK, 8, seed=1), random(OUTPUTS, seed=2))
    weight, bias = random(OUTPUTS, CHANNELS, seed=3).to(dtype), random(OUTPUTS, seed=4).to(dtype)
    added, shifted = correction.added(weight, bias, KEEP)
    expected = weight.float()
    expected[:, KEEP] += correction.left @ correction.right
    assert added.dtype == dtype and torch.equal(added, expected.to(dtype))
    assert shifted is not None
    assert torch.equal(shifted, (bias.float() + correction.bias).to(dtype))


def test_it_belongs_to_the_channels_that_it_was_made_for() -> None:
    score = torch.linspace(0, 1, 1280)
    kept = int((score > 0.5).sum())
    correction = Correction(torch.ones(1280, 1), torch.ones(1, 9 * kept), torch.ones(1280))
    gates = Gates({SITE: score}, topology=SD15, corrections={SITE: correction})
    assert gates.pruned()[SITE].correction is correction
    assert gates.pruned({SITE: score > 0.5})[SITE].correction is correction
    assert gates.pruned(gates.keep_sets_at(0.3))[SITE].correction is None
    assert gates.pruned(gates.keep_sets_at(0.0))[SITE].correction is None
