"""What pruning a channel of a ResBlock means: the masked reference and its exact compact form.

A Stable Diffusion ResBlock has ``y = skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + emb)))``.

- *inner* gate: a pruned output channel of conv1 is replaced by its constant μ before the embedding
  is added. The channel becomes spatially constant, so conv2 can evaluate it in closed form.
- *residual* gate: a pruned output channel of conv2 is replaced by its constant.

`masked_resblock` says so literally and is what training differentiates; `CompactResBlock` computes
the same from the kept channels alone. With zero padding conv2 sees a constant plane fall to zero
at the border: rule ``zero`` reproduces that exactly from the nine taps of each pruned column.
Rule ``extend`` takes the constants to go on past the border, so that one tap-sum per column is
left; it is a different function, and gates must be trained under the rule they run with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .blocks import ALIGNMENT, Block, Cost, Latent, Padding, PrunedSite, SiteKind, SoftGate
from .channels import Channels, add_
from .correction import Correction
from .groupnorm import group_norm_silu

#: bytes of weights convolved at once on a CPU
CPU_PIECE = 24 * 2**20


INNER = SiteKind(
    "inner", "conv1", "conv1", "conv2", axis=1, type_name="Conv2d", taps=9, reader_taps=9
)
RESIDUAL = SiteKind("residual", "conv2", "conv2", None, axis=1, type_name="Conv2d", taps=9)


@dataclass(frozen=True)
class ResBlock(Block):
    """A ResBlock: conv1 maps ``in_channels`` to ``out_channels``, conv2 keeps the latter."""

    in_channels: int
    out_channels: int

    site_kinds = (INNER, RESIDUAL)
    pattern = "*.resnets.*"

    def widths(self, kind: SiteKind) -> tuple[int, int]:
        return self.in_channels if kind == INNER else self.out_channels, self.out_channels

    def outputs(self) -> int:
        return self.out_channels

    def cost(self, kept: Sequence[int], padding: Padding, latent: Latent) -> Cost:
        """conv1 and conv2 with so many kept inner and residual channels.

        conv1 keeps its inner rows, conv2 its residual ones. The pruned columns of conv2 stay as
        nine taps (rule ``zero``) or one tap-sum (``extend``), evaluated once per image instead of
        per position. Each pruned channel keeps its constant.
        """
        (inner, residual), channels = kept, self.out_channels
        positions, pruned = latent.positions(self.downsample), channels - inner
        columns = residual * pruned * (9 if padding == "zero" else 1)
        rows1, rows2 = 9 * self.in_channels * inner, 9 * inner * residual
        constants = pruned + (channels - residual)
        return Cost(
            rows1 + inner + rows2 + residual + columns + constants,
            2 * (rows1 + rows2) * positions + 2 * columns * latent.batch,
        )

    @staticmethod
    def gate(found: Sequence[PrunedSite | None], padding: Padding) -> ResBlockGate:
        inner, residual = found
        gate = ResBlockGate(padding)
        if inner is not None:
            gate = replace(
                gate, inner=inner.keep, inner_constant=inner.constant, correction=inner.correction
            )
        if residual is not None:
            gate = replace(gate, residual=residual.keep, residual_constant=residual.constant)
        return gate


class ResBlockOps(Protocol):
    """What a host provides of one of its ResBlocks. Maps are [B, C, H, W]."""

    #: whether the convolutions pad with zeros, so that constant planes can be folded
    folds: bool
    #: groups and epsilon of norm2
    groups: int
    eps: float

    def norm1(self, x: Tensor) -> Tensor:
        """silu(norm1(x))."""

    def norm2(self, h: Tensor) -> Tensor:
        """silu(norm2(h)), all channels."""

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of norm2, each [C], on the device of ``like``, best in float32."""

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The host's conv1 with the given rows instead of its own."""

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The host's conv2 with the given rows and columns instead of its own."""

    def skip(self, x: Tensor) -> Tensor:
        """The identity or 1x1 path around the block."""


@dataclass(frozen=True)
class ConvWeights:
    """Weight [O, I, 3, 3] and bias [O] of a convolution as it would run now, patches included."""

    weight: Tensor
    bias: Tensor | None


def masked_conv2(
    ops: ResBlockOps, a: Tensor, conv2: ConvWeights, inner: SoftGate | None, padding: Padding
) -> Tensor:
    """What conv2 makes of ``a`` [B, C, H, W], in which the inner gate has set constants."""
    if inner is None:
        return ops.conv2(a, conv2.weight, conv2.bias)
    conv2 = ConvWeights(*inner.reader(conv2.weight, conv2.bias))
    if padding == "zero":
        return ops.conv2(a, conv2.weight, conv2.bias)
    mask = inner.mask.to(a)[:, None, None]
    constant_planes = F.pad(a * (1 - mask), (1, 1, 1, 1), mode="replicate")
    return ops.conv2(a * mask, conv2.weight, conv2.bias) + F.conv2d(constant_planes, conv2.weight)


def masked_resblock(
    ops: ResBlockOps,
    x: Tensor,
    emb: Tensor,
    conv1: ConvWeights,
    conv2: ConvWeights,
    inner: SoftGate | None,
    residual: SoftGate | None,
    padding: Padding,
) -> Tensor:
    """The reference of a ResBlock: everything is computed, then pruned channels are replaced.

    ``x`` [B, I, H, W], ``emb`` [B, C] (the projected time embedding), result [B, O, H, W].
    """
    h = ops.conv1(ops.norm1(x), conv1.weight, conv1.bias)
    if inner is not None:
        h = inner(h)
    y = masked_conv2(ops, ops.norm2(h + emb[:, :, None, None]), conv2, inner, padding)
    if residual is not None:
        y = residual(y)
    return ops.skip(x) + y


@dataclass(frozen=True)
class ResBlockGate:
    """What is kept of one ResBlock: bool keep-sets [C] (None: not gated) and constants [C].

    ``correction`` is that of conv2, which reads the inner channels.
    """

    padding: Padding
    inner: Tensor | None = None
    inner_constant: Tensor | None = None
    residual: Tensor | None = None
    residual_constant: Tensor | None = None
    correction: Correction | None = None


class CompactResBlock:
    """The kept rows and columns of one ResBlock, selected once, and its forward pass.

    Built from the weights as they would run now. Of a convolution that loses rows or columns it
    holds copies only, so the host may move the full weights away afterwards; a convolution that
    loses nothing is held as given. When ``folds`` is false (a host that pads circularly, say),
    conv2 runs on all inner channels and only rows are removed.

    A fast GPU computes a block sooner than the host can launch many small operations on it, so the
    forward pass is made of few: `python -m training.benchmark launches` counts them. Only tensors
    made here are written into.
    """

    def __init__(
        self, gate: ResBlockGate, conv1: ConvWeights, conv2: ConvWeights, *, folds: bool = True
    ) -> None:
        device, dtype = conv2.weight.device, conv2.weight.dtype
        self.padding = gate.padding
        self.folds = folds
        self.inner = _channels(gate.inner, device)
        self.residual = _channels(gate.residual, device)
        #: Per inner channel what is added to its map: a pruned one's constant, and where columns
        #: are folded a kept one's bias, which moves the mean and so needs no pass of its own.
        self.shifts: Tensor | None = None
        #: The same per residual channel.
        self.planes: Tensor | None = None
        #: What conv2 makes of the pruned constants.
        self.columns: Tensor | None = None
        self._inside: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

        if gate.correction is not None and gate.inner is not None and not folds:
            conv2 = ConvWeights(*gate.correction.added(conv2.weight, conv2.bias, gate.inner))
        self.conv1 = conv1 if self.inner is None else _rows(conv1, self.inner.kept)
        self.conv2 = conv2 if self.residual is None else _rows(conv2, self.residual.kept)
        if self.residual is not None:
            self.planes = _planes(self.residual, gate.residual_constant, dtype)
        if self.inner is None:
            return
        self.shifts = _planes(self.inner, gate.inner_constant, dtype)
        if folds or gate.padding == "extend":
            pruned = self.conv2.weight.index_select(1, self.inner.pruned)
            self.columns = _fold_columns(pruned, gate.padding)
        if not folds:
            return
        self.shifts = _with_bias(self.shifts.float(), self.inner, self.conv1.bias)
        self.conv1 = ConvWeights(self.conv1.weight, None)
        weight, bias = self.conv2.weight.index_select(1, self.inner.kept), self.conv2.bias
        if gate.correction is not None:
            rows = None if self.residual is None else self.residual.kept
            weight, bias = gate.correction.added_(weight.contiguous(), bias, rows)
        if self.planes is not None and self.residual is not None:
            self.planes, bias = _with_bias(self.planes, self.residual, bias), None
        self.conv2 = ConvWeights(weight.contiguous(), None if bias is None else bias.clone())

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        found = [self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias]
        found += [self.columns, self.shifts, self.planes, *self._inside.values()]
        for channels in (self.inner, self.residual):
            found += [] if channels is None else channels.tensors()
        return [t for t in found if t is not None]

    def __call__(self, ops: ResBlockOps, x: Tensor, emb: Tensor) -> Tensor:
        """[B, I, H, W] and [B, C] to [B, O, H, W], equal to `masked_resblock` of the same gate."""
        if self.conv2.weight.shape[0] == 0:  # no residual channel is kept: only constants are left
            y = x.new_empty(x.shape[0], 0, *x.shape[2:])
        elif self.inner is not None and self.folds:
            return self._folded(ops, x, emb, self.inner)
        elif self.inner is None:
            h = _convolve(ops.conv1, ops.norm1(x), self.conv1)
            y = _convolve(ops.conv2, ops.norm2(h + emb[:, :, None, None]), self.conv2)
        else:
            y = self._rows_only(ops, x, emb, self.inner)
        return self._joined(ops.skip(x), y)

    def _joined(self, skip: Tensor, y: Tensor) -> Tensor:
        """The computed rows and the constants of the residual gate, beside the skip path."""
        if self.residual is None or self.planes is None:
            return skip + y
        out = skip + self.planes.to(skip.dtype)[:, None, None]
        return add_(out, y, self.residual)

    def _rows_only(self, ops: ResBlockOps, x: Tensor, emb: Tensor, channels: Channels) -> Tensor:
        assert self.shifts is not None
        kept = self._conv1_rows(ops, x)
        h = self.shifts.to(kept.dtype)[:, None, None].repeat(x.shape[0], 1, *kept.shape[2:])
        h = h.index_add_(1, channels.kept, kept)  # to zeros
        a = ops.norm2(h + emb[:, :, None, None])
        if self.columns is None:
            return _convolve(ops.conv2, a, self.conv2)
        y = _convolve(ops.conv2, a.index_fill(1, channels.pruned, 0), self.conv2)
        constants = a[:, :, 0, 0].index_select(1, channels.pruned)
        return y + self._taps(constants)[:, :, None, None]

    def _folded(self, ops: ResBlockOps, x: Tensor, emb: Tensor, channels: Channels) -> Tensor:
        assert self.shifts is not None
        h = self._conv1_rows(ops, x)
        affine = ops.norm2_affine(h)
        a, constants = group_norm_silu(h, emb, self.shifts, channels, affine, ops.groups, ops.eps)
        taps = self._taps(constants)
        if a.shape[1]:
            y = _convolve(ops.conv2, a, self.conv2)
        else:
            y = taps.new_zeros(x.shape[0], self.conv2.weight.shape[0], *x.shape[2:])
            y = y if self.conv2.bias is None else y.add_(self.conv2.bias[:, None, None])
        taps, skip = taps.to(y.dtype), ops.skip(x)
        if fused.usable(y, skip):
            return fused.join(skip, y, taps, self.residual, self.planes)
        return self._joined(skip, self._add_taps_(y, taps))

    def _conv1_rows(self, ops: ResBlockOps, x: Tensor) -> Tensor:
        if self.conv1.weight.shape[0] == 0:
            return x.new_empty(x.shape[0], 0, *x.shape[2:])
        return _convolve(ops.conv1, ops.norm1(x), self.conv1)

    def _taps(self, constants: Tensor) -> Tensor:
        """What the folded columns make of constants [B, P]: [B, 9·O], or [B, O] of tap-sums."""
        assert self.columns is not None
        constants = constants.to(self.columns.dtype)
        if constants.device.type != "cpu":
            return F.linear(constants, self.columns)
        # the tall matrix first: thrice as fast as F.linear there, which puts the B rows first
        return torch.mm(self.columns, constants.T).T

    def _add_taps_(self, y: Tensor, taps: Tensor) -> Tensor:
        """Add what constant planes leave behind conv2 to [B, O, H, W].

        With zero padding only the taps count, at each position, that do not fall on the padding.
        """
        if self.padding == "extend":
            return y.add_(taps[:, :, None, None])
        size, batch = y.shape[2:], y.shape[0]
        inside = self._taps_inside(size, y).expand(batch, -1, -1)
        # flattening copies where channels come last
        return y.flatten(2).baddbmm_(taps.reshape(batch, -1, 9), inside).view(y.shape)

    def _taps_inside(self, size: torch.Size, like: Tensor) -> Tensor:
        """[9, H·W] of ones where a tap lies inside; kept, but for inside torch.compile."""
        if torch.compiler.is_compiling():
            return _taps_inside(size, like)
        key = size, like.dtype, like.device
        if key not in self._inside:
            with torch.inference_mode(False):  # another evaluation may ask for derivatives
                self._inside[key] = _taps_inside(size, like)
        return self._inside[key]


def _channels(keep: Tensor | None, device: torch.device) -> Channels | None:
    if keep is None or bool(keep.all()):
        return None  # everything kept: the host's own path, bit for bit
    return Channels.of(keep, device)


def _planes(channels: Channels, constant: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The constants [C] in their places, zero for kept channels."""
    pruned = channels.pruned
    planes = torch.zeros(pruned.numel() + channels.kept.numel(), dtype=dtype, device=pruned.device)
    if constant is None:
        return planes
    return planes.index_add_(0, pruned, constant.to(planes).index_select(0, pruned))


def _with_bias(planes: Tensor, channels: Channels, bias: Tensor | None) -> Tensor:
    """``planes`` with the bias [K] in the places of the kept channels, in place."""
    return planes if bias is None else planes.index_add_(0, channels.kept, bias.to(planes.dtype))


def _convolve(
    convolution: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, conv: ConvWeights
) -> Tensor:
    """``conv`` on ``x``, on a CPU in pieces of rows that stay below `CPU_PIECE` bytes.

    PyTorch's CPU convolution lays its weights out anew on every call; above the C library's largest
    threshold for that buffer (32 MiB in glibc) fresh pages are mapped and cleared each time, which
    took as long as the convolution itself. In a graph it is whole.
    """
    # not .nbytes: torch.compile knows no symbolic size of it
    size = conv.weight.numel() * conv.weight.element_size()
    cuts = conv.weight.device.type == "cpu" and not torch.compiler.is_compiling()
    pieces = -(-size // CPU_PIECE) if cuts else 1
    if pieces <= 1:
        return convolution(x, conv.weight, conv.bias)
    rows = -(-conv.weight.shape[0] // pieces)
    rows += -rows % ALIGNMENT
    weights = torch.split(conv.weight, rows)
    biases = [None] * len(weights) if conv.bias is None else torch.split(conv.bias, rows)
    return torch.cat([convolution(x, w, b) for w, b in zip(weights, biases, strict=True)], 1)


def _rows(conv: ConvWeights, kept: Tensor) -> ConvWeights:
    bias = None if conv.bias is None else conv.bias.index_select(0, kept)
    return ConvWeights(conv.weight.index_select(0, kept), bias)


def _fold_columns(weight: Tensor, padding: Padding) -> Tensor:
    """Pruned columns [O, P, 3, 3] as a matrix on constants: [9·O, P], or [O, P] of tap-sums."""
    if padding == "extend":
        return weight.float().sum((2, 3)).to(weight.dtype)
    return weight.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _taps_inside(size: torch.Size, like: Tensor) -> Tensor:
    """[9, H·W] of ones where a tap of a 3x3 window centred on a position lies inside the map."""
    height, width = size
    ones = F.pad(torch.ones(size, dtype=like.dtype, device=like.device), (1, 1, 1, 1))
    taps = [ones[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.stack(taps).flatten(1)
