"""What skip connections bring is computed once: the same answers, from fewer channels."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldcp_core import SoftGate, blocks_of
from training import kernels, thrift
from training.data import Batch
from training.denoising import Denoising, Problem
from training.gating import deviation, topology_of
from training.models import DiffusionModel
from training.skips import SkipShare, changing_channels
from training.thrift import stages_before

#: WIDTHS and groups of the test's model: of 48 channels in groups of 6, 32 fill no whole number
CHANGING = {
    "up_blocks.0.resnets.0": 32, "up_blocks.0.resnets.1": 32, "up_blocks.0.resnets.2": 32,
    "up_blocks.1.resnets.0": 32, "up_blocks.1.resnets.1": 32, "up_blocks.1.resnets.2": 36,
    "up_blocks.2.resnets.0": 36, "up_blocks.2.resnets.1": 16, "up_blocks.2.resnets.2": 16,
    "up_blocks.3.resnets.0": 16, "up_blocks.3.resnets.1": 16, "up_blocks.3.resnets.2": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(model: DiffusionModel) -> DiffusionModel:
    """In float64, where only the order of summation is left to differ."""
    return replace(model, unet=deepcopy(model.unet).double())


@pytest.fixture
def problem(exact: DiffusionModel) -> Problem:
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Denoising(exact, 0).problem(Batch(pixels, [""] * 3, ["a", "b", "c"]))


def changing(model: DiffusionModel, scope: str) -> dict[str, int]:
    gated = blocks_of(site.name for site in topology_of(model.unet).sites(scope))
    return changing_channels(model.unet, stages_before(model.unet, gated), gated)


def step(model: DiffusionModel, problem: Problem, scope: str) -> list[Tensor]:
    """Dense and gated output and the gradients of the masks, half of which are closed."""
    generator = torch.Generator().manual_seed(1)
    masks = {
        site.name: (torch.rand(site.channels, generator=generator) > 0.5).double()
        for site in topology_of(model.unet).sites(scope)
    }
    gates = {
        site: SoftGate(mask.requires_grad_(), torch.randn(mask.numel(), generator=generator))
        for site, mask in masks.items()
    }
    with Denoising(model, 0).compared(problem, gates, "zero") as (dense, output):
        gradients = torch.autograd.grad(deviation(output, dense), masks.values())
    return [dense, output.detach(), *gradients]


def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thrift, "changing_channels", lambda *_: {})


def test_whose_channels_change(model: DiffusionModel) -> None:
    assert changing(model, "mid") == CHANGING
    after = [name for name in CHANGING if name >= "up_blocks.2"]
    gated = ["up_blocks.1.resnets.0.conv1", "up_blocks.3.resnets.1.conv1"]
    alone = {name: CHANGING[name] for name in ["up_blocks.1.resnets.1", "up_blocks.1.resnets.2"]}
    alone |= {name: CHANGING[name] for name in after if name != "up_blocks.3.resnets.1"}
    assert changing(model, ",".join(gated)) == alone
    assert changing(model, "all") == changing(model, "down") == {}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["mid", "up", "up_blocks.1.resnets.2.conv1", "all"])
def test_answers_and_gradients_are_those_of_whole_blocks(
    exact: DiffusionModel, problem: Problem, scope: str, checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if checkpointing:
        exact.unet.enable_gradient_checkpointing()
    try:
        found = step(exact, problem, scope)
    finally:
        exact.unet.disable_gradient_checkpointing()
    whole_blocks(monkeypatch)
    for a, b in zip(found, step(exact, problem, scope), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 1e-10, atol=0)
        assert bool(b.any())


def test_a_step_does_less(
    exact: DiffusionModel, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            step(exact, problem, "mid")
        return counter.get_total_flops()

    found = flops()
    whole_blocks(monkeypatch)
    assert found < 0.9 * flops()  # 0.84 here


def test_of_a_skip_connection_only_what_is_still_read_is_kept(
    exact: DiffusionModel, problem: Problem
) -> None:
    sites = [site.name for site in topology_of(exact.unet).sites("mid")]
    shared = Denoising(exact, 0).answered(problem, sites).shared
    skips = [shared["conv_in"], *(s for i in range(4) for s in shared[f"down_blocks.{i}"][1])]
    # read last to first; the others share no group with what the block before them gives
    widths = {6: 4, 5: 4}
    assert [skip.shape[1] for skip in reversed(skips)] == [widths.get(i, 0) for i in range(12)]
    kept = {tensor.untyped_storage().nbytes() for tensor in skips if tensor.shape[1] == 0}
    assert kept == {0}
    assert shared["down_blocks.3"][0].shape[1] == 32  # what the mid block reads


def test_where_the_weight_is_what_takes_time_blocks_stay_whole(
    exact: DiffusionModel, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(kernels, "CHANNELS_PER_POSITION", 0)
    sites = [site.name for site in topology_of(exact.unet).sites("mid")]
    shared = Denoising(exact, 0).answered(problem, sites).shared
    assert not any(isinstance(output, SkipShare) for output in shared.values())
    assert [skip.shape[1] for skip in shared["down_blocks.0"][1]] == [16, 16, 16]
    assert all(bool(tensor.any()) for tensor in step(exact, problem, "mid"))
