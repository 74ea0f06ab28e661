"""Large frozen layers on a CPU as matrix products.

PyTorch lays the weights of a convolution out anew on every call, forward and backward. On the small
maps of a U-Net's lower levels that takes longer than the convolution itself, and a product with the
unfolded map needs no layout. The products go to oneDNN, whose float32 is twice as fast as MKL's on
processors that are not Intel's. The result is PyTorch's own up to the order of summation. Whole
steps at SD1.5's size are 1.25 times as fast for both; the demo's layers are too small to gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldcp_core.diffusers import replaced

#: weights of fewer values are left to PyTorch: there the calls cost more than the arithmetic
LEAST_WEIGHT = 2**16
#: a 3×3 convolution is a matrix product where its output has fewer positions than channels / this
CHANNELS_PER_POSITION = 8


def fast_layers(modules: Iterable[nn.Module]) -> Any:
    """Context in which those that are large frozen float32 layers on a CPU are matrix products."""
    layers = [module for module in modules if _applies(module)]
    return replaced(
        (layer, "forward", _linear_of(layer))
        if isinstance(layer, nn.Linear)
        else (layer, "_conv_forward", _convolution_of(layer))
        for layer in layers
    )


def _applies(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        same = tuple((side - 1) // 2 for side in module.kernel_size)
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding == same
        if not plain or module.padding_mode != "zeros":
            return False
    elif type(module) is not nn.Linear:
        return False
    weight = module.weight
    return (
        "forward" not in vars(module)  # its own, for weights that are stored in few bits, say
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LEAST_WEIGHT
        and not any(parameter.requires_grad for parameter in module.parameters())
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _linear_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: _Product.apply(x, layer.weight, layer.bias)


def _convolution_of(conv: nn.Conv2d) -> Callable[..., Tensor]:
    usual = conv._conv_forward

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        size = [(side - 1) // step + 1 for side, step in zip(x.shape[2:], conv.stride, strict=True)]
        positions = x.shape[0] * math.prod(size)
        small = CHANNELS_PER_POSITION * positions <= min(weight.shape[:2])
        if conv.kernel_size != (1, 1) and not small:
            return usual(x, weight, bias)
        columns = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        rows: Tensor = _Product.apply(columns.transpose(1, 2), weight.flatten(1), bias)
        return rows.transpose(1, 2).unflatten(2, size).contiguous()

    return forward


class _Product(torch.autograd.Function):
    """``x`` [..., I] times ``weight`` [O, I], plus ``bias`` [O]; no gradient for the latter two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _multiply(grad, weight.t(), None), None, None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
