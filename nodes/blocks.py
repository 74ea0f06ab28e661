"""ComfyUI's ResBlocks and feed-forwards, seen as what `ldcp_core` prunes.

Convolutions run through ``_conv_forward``, so that extensions which override it (seamless tiling,
say) keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ldcp_core import (
    Block,
    BlockGate,
    CompactFeedForward,
    CompactResBlock,
    ConvWeights,
    FeedForward,
    FeedForwardGate,
    ResBlock,
)
from .weights import captured, captured_linear, folds, norm_affine

Forward = Callable[..., Tensor]


class ComfyResBlockOps:
    """`ldcp_core.ResBlockOps` of one ResBlock, for the length of one run."""

    def __init__(self, block: nn.Module, affine: tuple[Tensor, Tensor], unchanged: Tensor) -> None:
        self._norm1, self._silu1, self._conv1 = block.in_layers
        self._norm2, self._silu2, self._dropout, self._conv2 = block.out_layers
        self._affine = affine[0].float(), affine[1].float()
        self._unchanged = unchanged
        self.skip = block.skip_connection
        self.groups: int = self._norm2.num_groups
        self.eps: float = self._norm2.eps
        self.folds = folds(self._conv2)

    def norm1(self, x: Tensor) -> Tensor:
        return self._silu1(self._norm1(x))

    def norm2(self, h: Tensor) -> Tensor:
        return self._dropout(self._silu2(self._norm2(h)))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight is self._unchanged:
            return self._conv1(x)
        return self._conv1._conv_forward(x, weight, bias)

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv2._conv_forward(x, weight, bias)


def check_block(module: nn.Module, block: Block) -> str | None:
    """Why this module is not the block that can be pruned; None when it is."""
    if isinstance(block, FeedForward):
        return _check_feed_forward(module, block)
    return _check_res_block(module, block)


def _check_res_block(module: nn.Module, block: ResBlock) -> str | None:
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


def _check_feed_forward(module: nn.Module, block: FeedForward) -> str | None:
    net = list(getattr(module, "net", ()))
    kinds = [type(part).__name__ for part in net]
    linear = [getattr(net[0], "proj", None), net[2]] if len(net) == 3 else []
    if not linear or kinds[0] != "GEGLU" or not all(isinstance(li, nn.Linear) for li in linear):
        return f"it is a {type(module).__name__} of {kinds}, not GEGLU, dropout and a linear layer"
    widths = [(layer.in_features, layer.out_features) for layer in linear]
    expected = [(block.channels, 2 * block.hidden), (block.hidden, block.channels)]
    if widths != expected:
        return f"its linear layers have widths {widths}, expected {expected}"
    return None


def override(module: nn.Module) -> str | None:
    """Which of the modules that pruning bypasses somebody else has changed; None: none.

    An extension that puts its own ``forward`` or a hook on them (ComfyUI's bypass LoRA does) would
    silently lose its effect, so such a block is left to run as it is.
    """
    if "forward" in vars(module):
        return "its forward"
    res_block = hasattr(module, "in_layers")
    paths = ("in_layers.2", "out_layers.0", "out_layers.3")
    for path in paths if res_block else ("net", "net.0", "net.0.proj", "net.2"):
        part = module.get_submodule(path)
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return path
    return None


@dataclass(frozen=True)
class Compact:
    """A pruned forward of one block and what it needs of the compute device."""

    forward: Forward
    #: what it holds there
    tensors: list[Tensor]
    #: the layers it prunes
    pruned: list[nn.Module]
    #: those of them whose full weights it no longer needs
    replaced: list[nn.Module]


def compact(
    module: nn.Module, gate: BlockGate | FeedForwardGate, device: torch.device, dtype: torch.dtype
) -> Compact | None:
    """This block computing only what ``gate`` keeps; None when that is all of it.

    ``device`` and ``dtype`` are those of the maps in the run that is about to start. Raises
    NotCaptured when the weights can't be had.
    """
    if isinstance(gate, FeedForwardGate):
        return _compact_feed_forward(module, gate, device, dtype)
    return _compact_res_block(module, gate, device, dtype)


def _compact_res_block(
    block: nn.Module, gate: BlockGate, device: torch.device, dtype: torch.dtype
) -> Compact | None:
    prunes1, prunes2 = _prunes(gate.inner), _prunes(gate.residual)
    if not (prunes1 or prunes2):
        return None
    conv2 = captured(block.out_layers[3], device, dtype)
    # a convolution that loses nothing runs as the host's own module
    unchanged = ConvWeights(conv2.weight.new_empty(0), None)
    conv1 = captured(block.in_layers[2], device, dtype) if prunes1 else unchanged
    ops = ComfyResBlockOps(block, norm_affine(block.out_layers[0], device, dtype), unchanged.weight)
    core = CompactResBlock(gate, conv1, conv2, folds=ops.folds)

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        return core(ops, x, block.emb_layers(emb).to(x.dtype))

    pruned = [block.in_layers[2]] * prunes1 + [block.out_layers[3]] * prunes2
    replaced = [block.in_layers[2]] * prunes1
    if core.conv2 is not conv2:  # rows or columns of it were copied
        replaced.append(block.out_layers[3])
    return Compact(forward, core.tensors(), pruned, replaced)


def _compact_feed_forward(
    block: nn.Module, gate: FeedForwardGate, device: torch.device, dtype: torch.dtype
) -> Compact | None:
    if not _prunes(gate.hidden):
        return None
    layers = [block.net[0].proj, block.net[2]]
    core = CompactFeedForward(gate, *(captured_linear(layer, device, dtype) for layer in layers))
    return Compact(core, core.tensors(), layers, layers)


def _prunes(keep: Tensor | None) -> bool:
    return keep is not None and not bool(keep.all())
