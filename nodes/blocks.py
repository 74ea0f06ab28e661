"""ComfyUI's ResBlock, seen as the operations that `ldcp_core` prunes.

Everything that depends on how ComfyUI stores and casts weights is here. Weights are taken as the
host itself would use them: the convolution's own forward runs on an empty input while its
``_conv_forward`` is replaced by a function that catches weight and bias. What arrives includes
LoRA, hooks, low-VRAM casts and quantised formats. Convolutions run through ``_conv_forward``, so
that extensions which override it (seamless tiling, say) keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ldcp_core import BlockGate, CompactResBlock, ConvWeights

Forward = Callable[[Tensor, Tensor], Tensor]


class ComfyResBlockOps:
    """`ldcp_core.ResBlockOps` of one ResBlock, for the length of one run."""

    def __init__(self, block: nn.Module, affine: tuple[Tensor, Tensor], unchanged: Tensor) -> None:
        self._norm1, self._silu1, self._conv1 = block.in_layers
        self._norm2, self._silu2, self._dropout, self._conv2 = block.out_layers
        self._affine = affine
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


def check_block(block: nn.Module, in_channels: int, out_channels: int) -> str | None:
    """Why this module is not a ResBlock that can be pruned; None when it is."""
    convs = [getattr(block, name, [None])[-1] for name in ("in_layers", "out_layers")]
    if not all(isinstance(conv, nn.Conv2d) for conv in convs):
        return f"it is a {type(block).__name__} without the two 2D convolutions of a ResBlock"
    widths = [(conv.in_channels, conv.out_channels) for conv in convs]
    if widths != [(in_channels, out_channels), (out_channels, out_channels)]:
        return f"its convolutions have widths {widths}, expected {in_channels} to {out_channels}"
    if any((c.kernel_size, c.stride, c.groups) != ((3, 3), (1, 1), 1) for c in convs):
        return "its convolutions are not plain 3x3 ones"
    if block.updown or block.use_scale_shift_norm:
        return "it resamples inside or scales by the embedding"
    if block.skip_t_emb or block.exchange_temb_dims or hasattr(block, "time_stack"):
        return "it belongs to a video model or takes no time embedding"
    return None


def override(block: nn.Module) -> str | None:
    """Which of the modules that pruning bypasses somebody else has changed; None: none.

    An extension that puts its own ``forward`` or a hook on them (ComfyUI's bypass LoRA does) would
    silently lose its effect, so such a block is left to run as it is.
    """
    if "forward" in vars(block):
        return "its forward"
    for path in ("in_layers.2", "out_layers.0", "out_layers.3"):
        module = block.get_submodule(path)
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return path
    return None


def folds(conv: nn.Conv2d) -> bool:
    """Whether the convolution pads one ring of zeros, as the folded form assumes."""
    own = "_conv_forward" in vars(conv) or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    padding = (conv.padding_mode, conv.padding, conv.dilation)
    return not own and padding == ("zeros", (1, 1), (1, 1))


@dataclass(frozen=True)
class Compact:
    """A pruned forward of one ResBlock and what it needs of the compute device."""

    forward: Forward
    #: what it holds there
    tensors: list[Tensor]
    #: the convolutions it prunes
    pruned: list[nn.Conv2d]
    #: those of them whose full weights it no longer needs
    replaced: list[nn.Conv2d]


def compact(
    block: nn.Module, gate: BlockGate, device: torch.device, dtype: torch.dtype
) -> Compact | None:
    """This ResBlock computing only what ``gate`` keeps; None when that is all of it.

    ``device`` and ``dtype`` are those of the maps in the run that is about to start.
    """
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


def _prunes(keep: Tensor | None) -> bool:
    return keep is not None and not bool(keep.all())


def captured(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> ConvWeights:
    """Weight and bias with which the host would now run ``conv`` on such an input."""
    found: list[ConvWeights] = []

    def catch(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        # a cast weight may lie in a buffer that the host uses again: keep a copy
        kept = weight if weight is conv.weight else weight.clone()
        found.append(ConvWeights(kept.detach(), None if bias is None else bias.detach().clone()))
        return x

    earlier = vars(conv).get("_conv_forward")
    conv._conv_forward = catch
    try:
        type(conv).forward(conv, torch.empty(0, conv.in_channels, 1, 1, device=device, dtype=dtype))
    finally:
        del conv._conv_forward
        if earlier is not None:
            conv._conv_forward = earlier
    return found[0]


def norm_affine(
    norm: nn.GroupNorm, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm through the host's own casting, as copies.

    The one place that knows `comfy.ops.cast_bias_weight`. Newer hosts lend an offloaded weight and
    want it back (``offloadable``, ``uncast_bias_weight``); older ones know neither.
    """
    if not hasattr(norm, "comfy_cast_weights"):
        return norm.weight.detach().to(device, dtype), norm.bias.detach().to(device, dtype)
    import comfy.ops

    hands_back = getattr(comfy.ops, "uncast_bias_weight", None)
    offloadable = {"offloadable": True} if hands_back else {}
    lent = comfy.ops.cast_bias_weight(
        norm, dtype=dtype, bias_dtype=dtype, device=device, **offloadable
    )
    weight, bias = (t.detach().clone() for t in lent[:2])
    if hands_back:
        hands_back(norm, *lent)
    return weight, bias
