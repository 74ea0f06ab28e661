"""What pruning a channel of a ResBlock means: the masked reference and its exact compact form.

A ResBlock of SD1.5 computes ``y = skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + emb)))``.

- *inner* gate: a pruned output channel of conv1 is replaced by its constant μ before the embedding
  is added. The channel becomes spatially constant, so conv2 can evaluate it in closed form.
- *residual* gate: a pruned output channel of conv2 is replaced by its constant.

`masked_forward` says so literally and is what training differentiates; `CompactResBlock` computes
the same from the kept channels alone. With zero padding conv2 sees a constant plane fall to zero
at the border: rule ``zero`` reproduces that exactly from the nine taps of each pruned column.
Rule ``extend`` takes the constants to go on past the border, so that one tap-sum per column is
left; it is a different function, and gates must be trained under the rule they run with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import ALIGNMENT, Padding
from .sites import SiteKind

#: bytes of weights convolved at once on a CPU
CPU_PIECE = 24 * 2**20


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
        """Weight and bias of norm2, each [C], on the device of ``like``."""

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


@dataclass(frozen=True)
class SoftGate:
    """A mask [C] of zeros and ones (differentiable in training) and constants [C]."""

    mask: Tensor
    constant: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """m·h + (1 − m)·μ, per channel of [B, C, H, W]."""
        mask = self.mask.to(h)[:, None, None]
        return mask * h + (1 - mask) * self.constant.to(h)[:, None, None]


def masked_forward(
    ops: ResBlockOps,
    x: Tensor,
    emb: Tensor,
    conv1: ConvWeights,
    conv2: ConvWeights,
    inner: SoftGate | None,
    residual: SoftGate | None,
    padding: Padding,
) -> Tensor:
    """The reference: everything is computed, then pruned channels are replaced.

    ``x`` [B, I, H, W], ``emb`` [B, C] (the projected time embedding), result [B, O, H, W].
    """
    h = ops.conv1(ops.norm1(x), conv1.weight, conv1.bias)
    if inner is not None:
        h = inner(h)
    a = ops.norm2(h + emb[:, :, None, None])
    if inner is not None and padding == "extend":
        mask = inner.mask.to(a)[:, None, None]
        y = ops.conv2(a * mask, conv2.weight, conv2.bias)
        constant_planes = F.pad(a * (1 - mask), (1, 1, 1, 1), mode="replicate")
        y = y + F.conv2d(constant_planes, conv2.weight)
    else:
        y = ops.conv2(a, conv2.weight, conv2.bias)
    if residual is not None:
        y = residual(y)
    return ops.skip(x) + y


@dataclass(frozen=True)
class BlockGate:
    """What is kept of one ResBlock: bool keep-sets [C] (None: not gated) and constants [C]."""

    padding: Padding
    inner: Tensor | None = None
    inner_constant: Tensor | None = None
    residual: Tensor | None = None
    residual_constant: Tensor | None = None

    def soft(self, kind: SiteKind) -> SoftGate | None:
        """The gate of one kind as a mask for `masked_forward`."""
        keep = self.inner if kind == "inner" else self.residual
        constant = self.inner_constant if kind == "inner" else self.residual_constant
        if keep is None:
            return None
        return SoftGate(keep.float(), torch.zeros(keep.numel()) if constant is None else constant)


class CompactResBlock:
    """The kept rows and columns of one ResBlock, selected once, and its forward pass.

    Built from the weights as they would run now. Of a convolution that loses rows or columns it
    holds copies only, so the host may move the full weights away afterwards; a convolution that
    loses nothing is held as given. When ``folds`` is false (a host that pads circularly, say),
    conv2 runs on all inner channels and only rows are removed.
    """

    def __init__(
        self, gate: BlockGate, conv1: ConvWeights, conv2: ConvWeights, *, folds: bool = True
    ) -> None:
        device, dtype = conv2.weight.device, conv2.weight.dtype
        self.padding = gate.padding
        out_channels, inner_channels = conv2.weight.shape[:2]

        self.inner = _Split.of(gate.inner, gate.inner_constant, device, dtype)
        self.residual = _Split.of(gate.residual, gate.residual_constant, device, dtype)
        self.out_channels: int = out_channels
        self.inner_channels: int = inner_channels
        self.folds = folds

        self.conv1 = conv1 if self.inner is None else _rows(conv1, self.inner.kept)
        rows = conv2 if self.residual is None else _rows(conv2, self.residual.kept)
        self.columns: Tensor | None = None
        if self.inner is None or not folds:
            self.conv2 = rows
        else:
            self.conv2 = ConvWeights(
                rows.weight.index_select(1, self.inner.kept).contiguous(),
                None if rows.bias is None else rows.bias.clone(),
            )
            self.columns = _fold_columns(
                rows.weight.index_select(1, self.inner.pruned), gate.padding
            )

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        found = [self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias]
        found.append(self.columns)
        for split in (self.inner, self.residual):
            if split is not None:
                found += [split.kept, split.pruned, split.order, split.constant]
        return [t for t in found if t is not None]

    def __call__(self, ops: ResBlockOps, x: Tensor, emb: Tensor) -> Tensor:
        """[B, I, H, W] and [B, C] to [B, O, H, W], equal to `masked_forward` of the same gate."""
        if self.conv2.weight.shape[0] == 0:  # no residual channel is kept: only constants are left
            return ops.skip(x) + self._scatter(x.new_empty(x.shape[0], 0, *x.shape[2:]))
        if self.inner is None:
            h = _convolve(ops.conv1, ops.norm1(x), self.conv1)
            y = _convolve(ops.conv2, ops.norm2(h + emb[:, :, None, None]), self.conv2)
        elif self.folds:
            y = self._folded(ops, x, emb, self.inner)
        else:
            y = self._rows_only(ops, x, emb, self.inner)
        return ops.skip(x) + self._scatter(y)

    def _rows_only(self, ops: ResBlockOps, x: Tensor, emb: Tensor, split: _Split) -> Tensor:
        kept = self._conv1_rows(ops, x)
        planes = split.constant.to(kept)[None, :, None, None]
        h = split.merge(kept, planes.expand(kept.shape[0], -1, *kept.shape[2:]))
        a = ops.norm2(h + emb[:, :, None, None])
        if self.padding == "zero":
            return _convolve(ops.conv2, a, self.conv2)
        kept_only = a.index_fill(1, split.pruned, 0)
        y = _convolve(ops.conv2, kept_only, self.conv2)
        constants = a.index_select(1, split.pruned)[:, :, 0, 0]
        tap_sums = self.conv2.weight.index_select(1, split.pruned).sum((2, 3))
        return y + F.linear(constants, tap_sums)[:, :, None, None]

    def _folded(self, ops: ResBlockOps, x: Tensor, emb: Tensor, split: _Split) -> Tensor:
        h = self._conv1_rows(ops, x) + emb.index_select(1, split.kept)[:, :, None, None]
        constants = split.constant.to(h) + emb.index_select(1, split.pruned)
        a, a_constant = self._norm2(ops, h, constants, split)
        assert self.columns is not None
        # the tall matrix first: on a CPU thrice as fast as F.linear, which puts the B rows first
        taps = torch.mm(self.columns, a_constant.T).T
        spread = taps[:, :, None, None] if self.padding == "extend" else _spread(taps, h.shape[2:])
        if a.shape[1] == 0:
            bias = 0 if self.conv2.bias is None else self.conv2.bias[:, None, None]
            return (spread + bias).expand(-1, -1, *h.shape[2:])
        return _convolve(ops.conv2, a, self.conv2).add_(spread)

    def _conv1_rows(self, ops: ResBlockOps, x: Tensor) -> Tensor:
        if self.conv1.weight.shape[0] == 0:
            return x.new_empty(x.shape[0], 0, *x.shape[2:])
        return _convolve(ops.conv1, ops.norm1(x), self.conv1)

    def _norm2(
        self, ops: ResBlockOps, h: Tensor, constants: Tensor, split: _Split
    ) -> tuple[Tensor, Tensor]:
        """silu(norm2) of kept maps [B, K, H, W] and of pruned constants [B, P].

        A channel's variance about its group's mean is its own variance plus the squared distance
        of its mean; channels all have H·W values, so their average is the group's (Chan et al.
        1979, the parallel formula, for equal counts). A constant has variance zero. In float32.
        """
        batch = h.shape[0]
        if h.shape[1] == 0:
            variance = mean = constants.new_empty((batch, 0), dtype=torch.float32)
        else:
            mean = h.mean((2, 3), dtype=torch.float32)
            # in two passes: on a CPU torch.var_mean over the last dimensions takes 17 times as long
            variance = (h.float() - mean[:, :, None, None]).square().mean((2, 3))
        means = split.merge(mean, constants.float())
        variances = split.merge(variance, torch.zeros_like(constants, dtype=torch.float32))
        grouped = means.view(batch, ops.groups, -1)
        group_mean = grouped.mean(2, keepdim=True)
        group_variance = (variances.view_as(grouped) + (grouped - group_mean).square()).mean(
            2, keepdim=True
        )
        weight, bias = (t.float() for t in ops.norm2_affine(h))
        scale = torch.rsqrt(group_variance + ops.eps).expand_as(grouped).reshape(batch, -1) * weight
        shift = bias - group_mean.expand_as(grouped).reshape(batch, -1) * scale
        scale_kept = scale.index_select(1, split.kept)[:, :, None, None]
        shift_kept = shift.index_select(1, split.kept)[:, :, None, None]
        kept = torch.addcmul(shift_kept, h.float(), scale_kept).to(h.dtype)
        pruned = torch.addcmul(
            shift.index_select(1, split.pruned),
            constants.float(),
            scale.index_select(1, split.pruned),
        )
        return F.silu(kept, inplace=True), F.silu(pruned.to(h.dtype))

    def _scatter(self, rows: Tensor) -> Tensor:
        """Put the computed rows in their places among the constants of the residual gate."""
        if self.residual is None:
            return rows
        planes = self.residual.constant.to(rows)[None, :, None, None]
        return self.residual.merge(rows, planes.expand(rows.shape[0], -1, *rows.shape[2:]))


@dataclass(frozen=True)
class _Split:
    """Kept and pruned channel indices, the way back to channel order, and the pruned constants."""

    kept: Tensor
    pruned: Tensor
    order: Tensor
    constant: Tensor

    @classmethod
    def of(
        cls, keep: Tensor | None, constant: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> _Split | None:
        if keep is None or bool(keep.all()):
            return None  # everything kept: the host's own path, bit for bit
        keep = keep.cpu()
        kept, pruned = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        mu = torch.zeros(keep.numel()) if constant is None else constant.cpu()
        return cls(
            kept.to(device),
            pruned.to(device),
            torch.argsort(torch.cat([kept, pruned])).to(device),
            mu[pruned].to(device, dtype),
        )

    def merge(self, kept: Tensor, pruned: Tensor) -> Tensor:
        """[B, K, ...] and [B, P, ...] to [B, C, ...] in channel order."""
        return torch.cat([kept, pruned], 1).index_select(1, self.order)


def _convolve(
    convolution: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, conv: ConvWeights
) -> Tensor:
    """``conv`` on ``x``, on a CPU in pieces of rows that stay below `CPU_PIECE` bytes.

    PyTorch's CPU convolution lays its weights out anew on every call; above the C library's largest
    threshold for that buffer (32 MiB in glibc) fresh pages are mapped and cleared each time, which
    took as long as the convolution itself.
    """
    pieces = -(-conv.weight.nbytes // CPU_PIECE) if conv.weight.device.type == "cpu" else 1
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


def _spread(taps: Tensor, size: torch.Size) -> Tensor:
    """What constant planes leave behind a zero-padded conv2: [B, 9·O] per tap to [B, O, H, W].

    At position (y, x) only the taps count that do not fall on the padding.
    """
    height, width = size
    inside = torch.kron(_taps_inside(height, taps), _taps_inside(width, taps))
    return (taps.view(taps.shape[0], -1, 9) @ inside.T).reshape(taps.shape[0], -1, height, width)


def _taps_inside(size: int, like: Tensor) -> Tensor:
    """[size, 3] of ones where tap t of a 3-tap window centred on position p lies inside."""
    position = torch.arange(size, device=like.device)[:, None]
    tap = position + torch.arange(-1, 2, device=like.device)[None, :]
    return ((tap >= 0) & (tap < size)).to(like.dtype)
