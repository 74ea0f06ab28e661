"""Frozen layers on a CPU as plain matrix products.

PyTorch lays the weights of a convolution out anew on every call, forward and backward. On the small
maps of a U-Net's lower levels that takes several times as long as the convolution itself (1280
channels on a 2x2 map: 33 of 38 ms), and a matrix product with the unfolded map needs no layout.
Products themselves go to oneDNN, whose float32 is twice as fast as MKL's on processors that are not
Intel's. Both give PyTorch's own result up to the order of summation, and keep no inputs for
backward, since the weights need no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.gating import replaced

#: weights of fewer values are left to PyTorch: there the calls cost more than the arithmetic
LEAST_WEIGHT = 2**16
#: a convolution is a matrix product where its output has fewer positions than channels / this
CHANNELS_PER_POSITION = 8


@contextmanager
def fast_layers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which those that are large frozen layers on a CPU run as matrix products.

    Elsewhere nothing changes, nor for layers that need a gradient or don't pad with zeros.
    """
    layers = [module for module in modules if _applies(module)]
    forwards: list[tuple[nn.Module, str, Callable[..., Tensor]]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            forwards.append((layer, "forward", _linear_of(layer)))
        else:
            forwards.append((layer, "_conv_forward", _convolution_of(layer)))
    with replaced(forwards):
        yield


def _applies(module: nn.Module) -> bool:
    if "forward" in vars(module):  # its own, for weights that are stored in few bits, say
        return False
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        if not plain or isinstance(module.padding, str):
            return False
    elif type(module) is not nn.Linear:
        return False
    weight = module.weight
    large = weight.device.type == "cpu" and weight.numel() >= LEAST_WEIGHT
    return large and not any(p is not None and p.requires_grad for p in (weight, module.bias))


def _linear_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: product(x, layer.weight, layer.bias)


def _convolution_of(conv: nn.Conv2d) -> Callable[..., Tensor]:
    usual = conv._conv_forward

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _small(conv, x, weight):
            return _convolved(conv, x, weight, bias)
        return usual(x, weight, bias)

    return forward


def _small(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """Whether laying out the weight takes longer than unfolding the map."""
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
        return True
    vertical, horizontal = conv.stride
    positions = x.shape[0] * (x.shape[2] // vertical) * (x.shape[3] // horizontal)
    return CHANNELS_PER_POSITION * positions <= min(weight.shape[:2])


def _convolved(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if conv.kernel_size == (1, 1):
        size, columns = x.shape[2:], x.flatten(2)
    else:
        size = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, padding, dilation, kernel, stride in zip(
                x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        ]
        columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    rows = product(columns.transpose(1, 2), weight.flatten(1), bias)
    return rows.transpose(1, 2).unflatten(2, size).contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` [..., I] times ``weight`` [O, I], plus ``bias`` [O]; no gradient for the latter two."""
    result: Tensor = _FrozenProduct.apply(x, weight, bias)
    return result


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _multiply(grad, weight.t(), None), None, None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype not in _onednn_dtypes():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What this processor and this build of PyTorch multiply by oneDNN."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return ()
    if hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported():
        return torch.float32, torch.bfloat16
    return (torch.float32,)
