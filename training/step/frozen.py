"""Nothing kept for backward that no gate needs.

Weights are frozen and gates sit in a few blocks, so PyTorch records nothing before the first of
them by itself. But a convolution keeps its input for the gradient of its weight, which nobody asks
for, and GEGLU its activation, which is quickly had again: both get a backward of their own, with
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from ldcp_core.diffusers import replaced


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight needs no gradient: the weight is all that backward keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.conv, ctx.shape = conv, x.shape
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        conv = ctx.conv
        found = torch.ops.aten.convolution_backward(
            grad,
            grad.new_empty(ctx.shape),  # only its shape counts for the gradient of the input
            weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            (True, False, False),
        )
        return found[0], None, None, None


class _FrozenGEGLU(torch.autograd.Function):
    """`x · gelu(gate)` of [..., 2C]: the input is all that backward keeps."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        x, gate = projected.chunk(2, dim=-1)
        return x * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        x, gate = projected.chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(grad * x, gate)
        return torch.cat([grad * F.gelu(gate), of_gate], dim=-1)


def frozen_layers(modules: Iterable[nn.Module]) -> Any:
    """Context in which those that are frozen keep no more for backward than they need."""
    modules = list(modules)
    convolutions = [
        module
        for module in modules
        if isinstance(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]
    activations = [module for module in modules if isinstance(module, GEGLU)]

    def convolution_of(conv: nn.Conv2d) -> Any:
        return lambda x, weight, bias: _FrozenConvolution.apply(x, conv, weight, bias)

    def activation_of(geglu: GEGLU) -> Any:
        return lambda x, *arguments, **options: _FrozenGEGLU.apply(geglu.proj(x))

    return replaced(
        [
            *((conv, "_conv_forward", convolution_of(conv)) for conv in convolutions),
            *((geglu, "forward", activation_of(geglu)) for geglu in activations),
        ]
    )
