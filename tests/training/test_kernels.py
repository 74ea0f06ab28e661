"""Frozen layers as matrix products: PyTorch's own results, where it pays, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import kernels
from training.model.gating import overridden
from training.model.kernels import fast_layers
from training.model.precision import _stored_forward, storage_of
from training.step.frozen import frozen_layers

LAYERS = {
    "convolution": (nn.Conv2d(256, 264, 3, padding=1), (2, 256, 4, 3)),
    "strided": (nn.Conv2d(256, 256, 3, stride=2, padding=1), (1, 256, 5, 4)),
    "pointwise": (nn.Conv2d(256, 264, 1), (2, 256, 16, 15)),
    "linear": (nn.Linear(256, 264), (2, 3, 256)),
    "without bias": (nn.Linear(256, 264, bias=False), (6, 256)),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all inputs that were multiplied."""
    seen: list[torch.Size] = []
    multiply = kernels._multiply

    def watched(x: Tensor, *others: Any) -> Tensor:
        seen.append(x.shape)
        return multiply(x, *others)

    monkeypatch.setattr(kernels, "_multiply", watched)
    return seen


def evaluated(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input under one fixed gradient of the output."""
    x = x.clone().requires_grad_()
    output = layer(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output.detach(), torch.autograd.grad(output, x, grad)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_pytorchs_own(name: str, counted: list[torch.Size]) -> None:
    layer, shape = LAYERS[name]
    layer.requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = evaluated(layer, x)
    assert not counted
    with frozen_layers([layer]), fast_layers([layer]):
        found = evaluated(layer, x)
    assert len(counted) == 2  # forward and backward
    assert found[0].is_contiguous()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert not {"forward", "_conv_forward"} & set(vars(layer))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(256, 256, 3, padding=1), (2, 256, 8, 8)),  # 128 positions: more than 256 / 8
        (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 1, 1)),  # few weights
        (nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"), (1, 256, 2, 2)),
        (nn.Conv2d(512, 512, 3, padding=1, groups=2), (1, 512, 1, 1)),
        (nn.Conv2d(256, 256, 3), (1, 256, 3, 3)),  # another padding
        (nn.Linear(256, 256).bfloat16(), (2, 256)),
    ],
)
def test_other_layers_are_left_to_pytorch(
    layer: nn.Module, shape: tuple[int, ...], counted: list[torch.Size]
) -> None:
    layer.requires_grad_(False)
    x = torch.randn(shape).to(layer.weight)
    expected = evaluated(layer, x)
    with fast_layers([layer]):
        found = evaluated(layer, x)
    assert not counted and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_layer_whose_weights_learn_is_left_alone(counted: list[torch.Size]) -> None:
    layer = nn.Linear(256, 256)
    with fast_layers([layer]):
        layer(torch.randn(2, 256)).sum().backward()
    assert not counted and layer.weight.grad is not None


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_weights_that_are_stored_in_few_bits_are_left_alone(
    precision: str, counted: list[torch.Size]
) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    storage = storage_of(precision, torch.device("cpu"))
    for name in ("linear", "pointwise"):
        layer, shape = LAYERS[name]
        layer, x = copy.deepcopy(layer).float().requires_grad_(False), torch.randn(shape)
        stored = nn.Parameter(storage.weight(layer.weight), requires_grad=False)
        expected = F.conv2d if name == "pointwise" else F.linear
        output = expected(x, storage.back(stored), layer.bias)
        layer.weight = stored
        with overridden(layer, {"": _stored_forward(layer, storage)}), fast_layers([layer]):
            torch.testing.assert_close(layer(x), output)


def test_backward_keeps_the_weights_and_no_activations() -> None:
    layer = nn.Linear(256, 256).requires_grad_(False)
    kept: list[Tensor] = []
    x = torch.randn(2, 256, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None),
        fast_layers([layer]),
    ):
        layer(x)
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]


def test_without_onednn_all_is_left_to_pytorch(
    counted: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = nn.Linear(256, 256).requires_grad_(False)
    with fast_layers([layer]):
        layer(torch.randn(2, 256))
    assert not counted
