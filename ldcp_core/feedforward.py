"""What pruning a hidden channel of a feed-forward means: the masked reference and its compact form.

A transformer's feed-forward computes ``out(a · gelu(g))`` with ``a, g = proj(x)`` (GEGLU, Shazeer
2020, arXiv:2002.05202). Hidden channel j owns two rows of ``proj`` (that of a and that of g) and
one column of ``out``. A pruned one is replaced by its constant μ after the product, so its rows
need not be computed, and what its column makes of μ is the same everywhere and joins the bias of
``out``: two rows and a column go, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Block, Cost, Latent, Padding, PrunedSite, SiteKind, SoftGate
from .correction import Correction

HIDDEN = SiteKind("hidden", "net.0", "net.0.proj", "net.2", axis=-1, type_name="GEGLU", rows=2)


@dataclass(frozen=True)
class FeedForward(Block):
    """A transformer's feed-forward: GEGLU from ``channels`` to ``hidden``, then linear back."""

    channels: int
    hidden: int

    site_kinds = (HIDDEN,)
    pattern = "*.ff"

    def widths(self, kind: SiteKind) -> tuple[int, int]:
        return self.channels, self.hidden

    def outputs(self) -> int:
        return self.channels

    def cost(self, kept: Sequence[int], padding: Padding, latent: Latent) -> Cost:
        """Two rows and one column for each kept hidden channel.

        The constants of the others are part of the output bias.
        """
        (hidden,), channels = kept, self.channels
        return Cost(
            2 * (channels + 1) * hidden + (hidden + 1) * channels,
            6 * channels * hidden * latent.positions(self.downsample),
        )

    @staticmethod
    def gate(found: Sequence[PrunedSite | None], padding: Padding) -> FeedForwardGate:
        (hidden,) = found
        if hidden is None:
            return FeedForwardGate()
        return FeedForwardGate(hidden.keep, hidden.constant, hidden.correction)


@dataclass(frozen=True)
class LinearWeights:
    """Weight [O, I] and bias [O] of a linear layer as it would run now, patches included."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class FeedForwardGate:
    """What is kept of one feed-forward: bool keep-set [H] (None: not gated) and constants [H].

    ``correction`` is that of the layer that reads the hidden channels.
    """

    hidden: Tensor | None = None
    hidden_constant: Tensor | None = None
    correction: Correction | None = None


def geglu(x: Tensor, proj: LinearWeights) -> Tensor:
    """a · gelu(g) of [..., C]: [..., H] for a projection [2·H, C], a first."""
    value, gate = F.linear(x, proj.weight, proj.bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def masked_feed_forward(
    x: Tensor, proj: LinearWeights, out: LinearWeights, gate: SoftGate | None
) -> Tensor:
    """The reference on [..., C]: all is computed, then pruned hidden channels are replaced."""
    hidden = geglu(x, proj)
    if gate is not None:
        hidden = gate(hidden, axis=HIDDEN.axis)
        out = LinearWeights(*gate.reader(out.weight, out.bias))
    return F.linear(hidden, out.weight, out.bias)


class CompactFeedForward:
    """The kept rows and columns of one feed-forward, selected once, and its forward pass.

    It holds copies only, so the host may move the full weights away afterwards. ``gate`` must
    prune something.
    """

    def __init__(self, gate: FeedForwardGate, proj: LinearWeights, out: LinearWeights) -> None:
        assert gate.hidden is not None
        device, dtype = out.weight.device, out.weight.dtype
        keep = gate.hidden.cpu()
        kept, pruned = keep.nonzero()[:, 0].to(device), (~keep).nonzero()[:, 0].to(device)
        rows = torch.cat([kept, kept + keep.numel()])
        self.proj = LinearWeights(
            proj.weight.index_select(0, rows),
            None if proj.bias is None else proj.bias.index_select(0, rows),
        )
        bias = out.bias
        if gate.hidden_constant is not None:
            mu = gate.hidden_constant.to(device, torch.float32).index_select(0, pruned)
            constant = out.weight.index_select(1, pruned).float() @ mu
            bias = (constant if bias is None else bias.float() + constant).to(dtype)
        elif bias is not None:
            bias = bias.clone()
        weight = out.weight.index_select(1, kept).contiguous()
        if gate.correction is not None:
            weight, bias = gate.correction.added_(weight, bias)
        self.out = LinearWeights(weight, bias)

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        found = [self.proj.weight, self.proj.bias, self.out.weight, self.out.bias]
        return [t for t in found if t is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C], equal to `masked_feed_forward` of the same gate."""
        weight, bias = self.out.weight, self.out.bias
        if weight.shape[1] == 0:
            alone = x.new_zeros(weight.shape[0]) if bias is None else bias
            return alone.expand(*x.shape[:-1], -1)
        return F.linear(geglu(x, self.proj), weight, bias)
