"""ComfyUI's ResBlock.

Convolutions run through ``_conv_forward``, so that extensions which override it (seamless tiling,
say) keep working. A block whose norm or padding is not what the folded form assumes loses rows
alone and runs the host's own modules otherwise; one with other changes is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...ldcp_core import (
    CompactResBlock,
    ConvWeights,
    Padding,
    ResBlock,
    ResBlockGate,
    See,
    SiteKind,
    SoftGate,
    expected_output,
    watch_conv2,
)
from .blocks import Compact, Judgement, Watched, dropping, first_of, instead, prunes, rebuilt
from .changes import (
    CONVOLVE,
    Watch,
    changed_call,
    changed_class,
    changed_convolution,
    changed_function,
    hooks_on_all,
)
from .weights import NotCaptured, captured, captured_norm

#: what decides how a convolution treats the border
BORDER = ("padding_mode", "padding", "dilation")


class ComfyResBlock:
    """A `HostBlock`."""

    layers = {"conv1": "in_layers.2", "conv2": "out_layers.3"}

    def __init__(self, unet: nn.Module, path: str) -> None:
        self.module = unet.get_submodule(path)

    def check(self, block: ResBlock) -> str | None:
        module = self.module
        convs = [getattr(module, name, [None])[-1] for name in ("in_layers", "out_layers")]
        if not all(isinstance(conv, nn.Conv2d) for conv in convs):
            return f"it is a {type(module).__name__} without the two 2D convolutions of a ResBlock"
        widths = [(conv.in_channels, conv.out_channels) for conv in convs]
        inputs, outputs = block.in_channels, block.out_channels
        if widths != [(inputs, outputs), (outputs, outputs)]:
            return f"its convolutions have widths {widths}, expected {inputs} to {outputs}"
        if any((c.kernel_size, c.stride, c.groups) != ((3, 3), (1, 1), 1) for c in convs):
            return "its convolutions are not plain 3x3 ones"
        if module.updown or module.use_scale_shift_norm:
            return "it resamples inside or scales by the embedding"
        if module.skip_t_emb or module.exchange_temb_dims or hasattr(module, "time_stack"):
            return "it belongs to a video model or takes no time embedding"
        return None

    def judge(self) -> Judgement:
        block = self.module
        containers = [block.in_layers, block.out_layers]
        layers, convs = [*block.in_layers, *block.out_layers], [part[-1] for part in containers]
        plain = all(isinstance(conv, nn.Conv2d) for conv in convs)
        if not plain or [len(part) for part in containers] != [3, 4]:
            return rebuilt(block, containers, layers)
        norm, silu, dropout, conv2 = block.out_layers
        bypassed = [hooks_on_all(), changed_class(type(block)), *map(changed_call, containers)]
        bypassed += [changed_call(conv, any_class=True) for conv in convs]
        folded = [changed_call(norm, any_class=True), changed_call(silu), changed_call(dropout)]
        folded += [changed_function("group_norm"), changed_function("silu")]
        folded += [instead(norm, nn.GroupNorm), instead(silu, nn.SiLU), dropping(dropout)]
        folded += [changed_convolution(conv2), changed_padding(conv2)]
        watch = Watch(
            [*containers, *convs, norm, silu, dropout],
            [type(block)],
            ["group_norm", "silu", "conv2d"],
            [(conv, name) for conv in convs for name in (CONVOLVE, *BORDER)],
        )
        return Judgement(first_of(bypassed), first_of(folded), layers, watch.holds)

    def passed_over(self, options: Mapping[str, Any]) -> str:
        return ""

    def compact(
        self, gate: ResBlockGate, device: torch.device, dtype: torch.dtype, rows_only: str = ""
    ) -> Compact | None:
        block = self.module
        prunes1, prunes2 = prunes(gate.inner), prunes(gate.residual)
        if not (prunes1 or prunes2):
            return None
        first, norm, last = block.in_layers[2], block.out_layers[0], block.out_layers[3]
        conv2 = captured(last, device, dtype)
        # a convolution that loses nothing runs as the host's own module
        unchanged = ConvWeights(conv2.weight.new_empty(0), None)
        conv1 = captured(first, device, dtype) if prunes1 else unchanged
        affine = None
        if prunes1 and not rows_only:
            try:
                affine = captured_norm(norm, device, dtype)
            except NotCaptured as error:
                rows_only = f"of {error}"
        ops = ComfyResBlockOps(block, affine, unchanged.weight)
        core = CompactResBlock(gate, conv1, conv2, folds=ops.folds)

        def forward(x: Tensor, emb: Tensor) -> Tensor:
            return core(ops, x, block.emb_layers(emb).to(x.dtype))

        layers, replaced = [*[first] * prunes1, last], [first] * prunes1
        if core.conv2 is not conv2:  # rows or columns of it were copied
            replaced.append(last)
        return Compact(forward, core.tensors(), layers, replaced, rows_only if prunes1 else "")

    def watched(self, kind: SiteKind) -> Watched:
        conv1, conv2 = self.module.in_layers[-1], self.module.out_layers[-1]
        return Watched(conv1, conv2) if kind.reader else Watched(conv2, None)

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        if self.judge().bypassed:
            return nullcontext()
        block, (inner, residual) = self.module, gates
        conv1, norm2, conv2 = block.in_layers[-1], block.out_layers[0], block.out_layers[-1]
        ops = ComfyResBlockOps(block, None, conv2.weight.new_empty(0))

        def weights(fed: Tensor) -> ConvWeights:
            return captured(conv2, fed.device, fed.dtype)

        return watch_conv2(ops, (conv1, norm2, conv2), weights, inner, residual, padding, see)

    def estimates(
        self, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for part in (self.module.in_layers, self.module.out_layers):
            conv = captured(part[-1], device, dtype)
            yield conv.weight, expected_output(conv, *captured_norm(part[0], device, dtype))


class ComfyResBlockOps:
    """`ldcp_core.ResBlockOps` of one ResBlock, for the length of one run."""

    def __init__(
        self, block: nn.Module, affine: tuple[Tensor, Tensor] | None, unchanged: Tensor
    ) -> None:
        self._norm1, self._silu1, self._conv1 = block.in_layers
        self._norm2, self._silu2, self._dropout, self._conv2 = block.out_layers
        self._affine = affine and (affine[0].float(), affine[1].float())
        self._unchanged = unchanged
        self._block = block
        self.folds = affine is not None
        if self.folds:
            self.groups: int = self._norm2.num_groups
            self.eps: float = self._norm2.eps

    def norm1(self, x: Tensor) -> Tensor:
        return self._silu1(self._norm1(x))

    def norm2(self, h: Tensor) -> Tensor:
        return self._dropout(self._silu2(self._norm2(h)))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self._affine is not None
        return self._affine

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is self._unchanged:
            return self._conv1(x)
        return self._conv1._conv_forward(x, weight, bias)

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv2._conv_forward(x, weight, bias)

    def skip(self, x: Tensor) -> Tensor:
        return self._block.skip_connection(x)


def changed_padding(conv: nn.Module) -> str:
    """Whether a convolution no longer pads one ring of zeros, as the folded form assumes."""
    same = (conv.padding_mode, conv.padding, conv.dilation) == ("zeros", (1, 1), (1, 1))
    return "" if same else f"set the padding of a {type(conv).__name__}"
