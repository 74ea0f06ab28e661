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
from .linear import LinearWeights

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
    def gate(found: Sequence[PrunedSite | None], padding: Padding) -> PrunedSite | None:
        (hidden,) = found
        return hidden


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

    def __init__(self, gate: PrunedSite, proj: LinearWeights, out: LinearWeights) -> None:
        keep = gate.keep.cpu()
        kept = keep.nonzero()[:, 0].to(proj.weight.device)
        self.proj = proj.rows(torch.cat([kept, kept + keep.numel()]))
        self.out = out.reading(gate)

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        return [*self.proj.tensors(), *self.out.tensors()]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C], equal to `masked_feed_forward` of the same gate."""
        if self.out.weight.shape[1] == 0:
            return self.out.constant(x)
        return F.linear(geglu(x, self.proj), self.out.weight, self.out.bias)
