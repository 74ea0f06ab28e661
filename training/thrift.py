"""No wasted work in a step: nothing computed twice, nothing kept that no gate needs.

Weights are frozen and gates sit in a few blocks, so PyTorch records nothing before the first of
them by itself. Two things it can't know. What lies before the first gate, what later sees timestep
or prompt alone, and what skip connections bring (`training.skips`) is the same for the dense
teacher and for the gated model, so it is computed once and replayed. And a convolution keeps its
input for the gradient of its weight, which nobody asks for, and GEGLU its activation, so they are
given a backward of their own. All but the skip connections' part leaves every bit of output and
gradient as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from training.gating import overridden, replaced
from training.skips import SkipShare, changing_channels, completing, cut_skips, splitting


def stages_before(unet: UNet2DConditionModel, blocks: Iterable[str]) -> list[str]:
    """The top-level parts of the U-Net that run before the first of the named blocks, in order."""
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    stages = ["conv_in", *down, "mid_block", *up]
    gated = {stage for stage in stages for block in blocks if block.startswith(stage + ".")}
    first = min((stages.index(stage) for stage in gated), default=len(stages))
    return stages[:first]


def _beside_gates(unet: UNet2DConditionModel, stages: Iterable[str]) -> list[str]:
    """The parts after ``stages`` that see timestep or prompt alone, which no gate changes."""
    before = tuple(stage + "." for stage in stages)
    ends = ("time_embedding", ".time_emb_proj", ".attn2.to_k", ".attn2.to_v")
    return [
        name
        for name, _ in unet.named_modules()
        if name.endswith(ends) and not name.startswith(before)
    ]


@contextmanager
def recording(unet: UNet2DConditionModel, gated: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Run the U-Net as it is, and keep what gates in the blocks ``gated`` don't change.

    Name of a part -> its output, or the `SkipShare` of a ResBlock; complete after the context.
    """
    gated = list(gated)
    stages = stages_before(unet, gated)
    changing = changing_channels(unet, stages, gated)
    outputs: dict[str, Any] = {}

    def forward_of(name: str) -> Any:
        plain = unet.get_submodule(name).forward

        def forward(*arguments: Any, **options: Any) -> Any:
            outputs[name] = plain(*arguments, **options)
            return outputs[name]

        return forward

    forwards = {name: forward_of(name) for name in [*stages, *_beside_gates(unet, stages)]}
    forwards |= {name: splitting(unet, name, changing[name], outputs) for name in changing}
    with overridden(unet, forwards):
        yield outputs
    cut_skips(unet, changing, outputs)


def replaying(unet: UNet2DConditionModel, outputs: dict[str, Any]) -> Any:
    """Context in which parts give what `recording` kept instead of computing it.

    Valid for the very inputs of the recording.
    """

    def forward_of(name: str) -> Any:
        if isinstance(outputs[name], SkipShare):
            return completing(unet, name, outputs[name])
        return lambda *arguments, **options: outputs[name]

    return overridden(unet, {name: forward_of(name) for name in outputs})


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


def thrifty_layers(modules: Iterable[nn.Module]) -> Any:
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
