"""ComfyUI's ResBlocks and feed-forwards, seen as what `ldcp_core` prunes.

Convolutions run through ``_conv_forward``, so that extensions which override it (seamless tiling,
say) keep working. A block whose norm or padding is not what the folded form assumes loses rows
alone and runs the host's own modules otherwise; one with other changes is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from .changes import (
    CONVOLVE,
    Watch,
    changed_call,
    changed_class,
    changed_convolution,
    changed_function,
    hooks_on_all,
)
from .weights import NotCaptured, captured, captured_linear, captured_norm

Forward = Callable[..., Tensor]
#: what decides how a convolution treats the border
PADDING = ("padding_mode", "padding", "dilation")


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
    linear = _linear_layers(module)
    if not linear:
        kinds = [type(part).__name__ for part in getattr(module, "net", ())]
        return f"it is a {type(module).__name__} of {kinds}, not GEGLU, dropout and a linear layer"
    widths = [(layer.in_features, layer.out_features) for layer in linear]
    expected = [(block.channels, 2 * block.hidden), (block.hidden, block.channels)]
    if widths != expected:
        return f"its linear layers have widths {widths}, expected {expected}"
    return None


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    """The two linear layers of a feed-forward; none of one that is built in another way."""
    net = list(getattr(module, "net", ()))
    linear = [getattr(net[0], "proj", None), net[2]] if len(net) == 3 else []
    gated = bool(net) and type(net[0]).__name__ == "GEGLU"
    return linear if gated and all(isinstance(layer, nn.Linear) for layer in linear) else []


@dataclass(frozen=True)
class Judgement:
    """What other extensions have done to one block, in words that follow "has"; empty: nothing.

    ``bypassed`` is what every pruned form of the block would undo, ``folded`` what the folded form
    would. It is good for as long as ``holds()``, and of these ``layers``.
    """

    bypassed: str
    folded: str
    layers: list[nn.Module]
    holds: Callable[[], bool]


def judge(block: nn.Module) -> Judgement:
    """Look at everything that pruning may leave out of ``block``, but for its own ``forward``."""
    return _judge_res_block(block) if hasattr(block, "in_layers") else _judge_feed_forward(block)


def _judge_res_block(block: nn.Module) -> Judgement:
    containers = [block.in_layers, block.out_layers]
    layers, convs = [*block.in_layers, *block.out_layers], [part[-1] for part in containers]
    plain = all(isinstance(conv, nn.Conv2d) for conv in convs)
    if not plain or [len(part) for part in containers] != [3, 4]:
        return _rebuilt(block, containers, layers)
    norm, silu, dropout, conv2 = block.out_layers
    bypassed = [hooks_on_all(), changed_class(type(block)), *map(changed_call, containers)]
    bypassed += [changed_call(conv, any_class=True) for conv in convs]
    folded = [changed_call(norm, any_class=True), changed_call(silu), changed_call(dropout)]
    folded += [changed_function("group_norm"), changed_function("silu")]
    folded += [_instead(norm, nn.GroupNorm), _instead(silu, nn.SiLU), _dropping(dropout)]
    folded += [changed_convolution(conv2), changed_padding(conv2)]
    watch = Watch(
        [*containers, *convs, norm, silu, dropout],
        [type(block)],
        ["group_norm", "silu", "conv2d"],
        [(conv, name) for conv in convs for name in (CONVOLVE, *PADDING)],
    )
    return Judgement(_first(bypassed), _first(folded), layers, watch.holds)


def _judge_feed_forward(block: nn.Module) -> Judgement:
    if not _linear_layers(block):
        return _rebuilt(block, [block.net], list(block.net))
    geglu, dropout, out = block.net
    layers, functions = [geglu, dropout, geglu.proj, out], ["linear", "gelu"]
    bypassed = [hooks_on_all(), changed_class(type(block))]
    bypassed += map(changed_call, (block.net, geglu, dropout))
    bypassed += [changed_call(layer, any_class=True) for layer in (geglu.proj, out)]
    bypassed += map(changed_function, functions)
    bypassed.append(_dropping(dropout))
    watch = Watch([block.net, *layers], [type(block)], functions)
    return Judgement(_first(bypassed), "", layers, watch.holds)


def _rebuilt(block: nn.Module, containers: list[nn.Module], layers: list[nn.Module]) -> Judgement:
    """Of a block whose layers are not the ones that pruning knows."""
    return Judgement(f"rebuilt a {type(block).__name__}", "", layers, Watch(containers).holds)


def _instead(layer: nn.Module, kind: type[nn.Module]) -> str:
    same = isinstance(layer, kind)
    return "" if same else f"put a {type(layer).__name__} in the place of a {kind.__name__}"


def _dropping(dropout: nn.Module) -> str:
    active = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p
    return "switched dropout on" if active else _instead(dropout, nn.Dropout)


def changed_padding(conv: nn.Module) -> str:
    """Whether a convolution no longer pads one ring of zeros, as the folded form assumes."""
    same = (conv.padding_mode, conv.padding, conv.dilation) == ("zeros", (1, 1), (1, 1))
    return "" if same else f"set the padding of a {type(conv).__name__}"


def _first(found: Iterable[str]) -> str:
    return next(filter(None, found), "")


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
    #: why it loses rows alone, in words that follow "has"; empty where it loses all that it can
    rows_only: str = ""


def compact(
    module: nn.Module,
    gate: BlockGate | FeedForwardGate,
    device: torch.device,
    dtype: torch.dtype,
    rows_only: str = "",
) -> Compact | None:
    """This block computing only what ``gate`` keeps; None when that is all of it.

    ``device`` and ``dtype`` are those of the maps in the run that is about to start. For the reason
    ``rows_only``, if there is one, the host's norm runs on all channels. Raises NotCaptured when
    the weights can't be had.
    """
    if isinstance(gate, FeedForwardGate):
        return _compact_feed_forward(module, gate, device, dtype)
    return _compact_res_block(module, gate, device, dtype, rows_only)


def _compact_res_block(
    block: nn.Module, gate: BlockGate, device: torch.device, dtype: torch.dtype, rows_only: str
) -> Compact | None:
    prunes1, prunes2 = _prunes(gate.inner), _prunes(gate.residual)
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
            rows_only = f"it has {error}"
    ops = ComfyResBlockOps(block, affine, unchanged.weight)
    core = CompactResBlock(gate, conv1, conv2, folds=ops.folds)

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        return core(ops, x, block.emb_layers(emb).to(x.dtype))

    pruned = [first] * prunes1 + [last] * prunes2
    replaced = [first] * prunes1
    if core.conv2 is not conv2:  # rows or columns of it were copied
        replaced.append(last)
    return Compact(forward, core.tensors(), pruned, replaced, rows_only if prunes1 else "")


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
