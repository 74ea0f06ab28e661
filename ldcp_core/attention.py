"""What pruning a head of an attention means: the masked reference and its compact form.

A transformer's attention (Vaswani et al. 2017, arXiv:1706.03762) computes ``out(heads)`` with
``heads = concat_h softmax(q_h k_hᵀ / √d) v_h``, where q are rows of one layer, k and v of two
others that read the same map (self-attention) or the text (cross-attention). A head owns d rows of
each of the three and d columns of ``out``. A pruned one is replaced by its constant μ, a vector of
length d, so none of its rows need be computed and the attention runs on fewer heads; what the
columns make of μ is the same everywhere and joins the bias of ``out``. A head goes as a whole or
not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .blocks import Block, Cost, Latent, Padding, PrunedSite, SiteKind, SoftGate
from .linear import LinearWeights

HEADS = SiteKind(
    "heads", "to_v", "to_v", "to_out.0", axis=-1, type_name="Attention", replaces_output=False
)
#: the attention of q, k and v, each [B, N, H·d], in so many heads H
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Attention(Block):
    """A transformer's attention in ``heads`` heads, ``channels`` wide.

    ``context`` is the width of the text that keys and values are made of; None in self-attention.
    """

    channels: int
    heads: int
    context: int | None

    site_kinds = (HEADS,)
    pattern = "*.attn[12]"

    def widths(self, kind: SiteKind) -> tuple[int, int]:
        return self.context or self.channels, self.channels

    def outputs(self) -> int:
        return self.channels

    def group(self, kind: SiteKind) -> int:
        """The width of a head."""
        return self.channels // self.heads

    def row_parameters(self, kind: SiteKind) -> int:
        """Of queries, keys and values, none of which has a bias."""
        return self.channels + 2 * (self.context or self.channels)

    def cost(self, kept: Sequence[int], padding: Padding, latent: Latent) -> Cost:
        """Three rows and a column for each kept channel, and its part of both products.

        The constants of the others are part of the output bias.
        """
        (width,), channels = kept, self.channels
        queries = latent.positions(self.downsample)
        keys = queries if self.context is None else latent.batch * latent.tokens
        read = self.context or channels
        linear = 2 * channels * queries + 2 * read * keys
        products = 2 * queries * (keys // latent.batch)
        return Cost((2 * channels + 2 * read) * width + channels, 2 * (linear + products) * width)

    @staticmethod
    def gate(found: Sequence[PrunedSite | None], padding: Padding) -> PrunedSite | None:
        (heads,) = found
        return heads


@dataclass(frozen=True)
class AttentionWeights:
    """The layers that make queries [C, C], keys and values [C, T], and the output [C, C]."""

    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    out: LinearWeights


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's attention of [B, N, H·d] with [B, M, H·d] in H heads: [B, N, H·d]."""
    q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _projected(sources: Sequence[Tensor], layers: Sequence[LinearWeights]) -> Iterator[Tensor]:
    """Queries, keys and values of what they are made of."""
    for source, layer in zip(sources, layers, strict=True):
        yield F.linear(source, layer.weight, layer.bias)


def masked_attention(
    x: Tensor,
    context: Tensor,
    value: Tensor,
    weights: AttentionWeights,
    heads: int,
    gate: SoftGate | None,
    attend: Attend = attention,
) -> Tensor:
    """The reference on [B, N, C]: all is computed, then the pruned heads are replaced.

    Keys are made of ``context`` and values of ``value``, both [B, M, T].
    """
    q, k, v = _projected((x, context, value), (weights.q, weights.k, weights.v))
    found, out = attend(q, k, v, heads), weights.out
    if gate is not None:
        found = gate(found, axis=HEADS.axis)
        out = LinearWeights(*gate.reader(out.weight, out.bias))
    return F.linear(found, out.weight, out.bias)


class CompactAttention:
    """The kept heads of one attention, selected once, and its forward pass.

    It holds copies only, so the host may move the full weights away afterwards. ``gate`` must
    prune something, and whole ones of the ``heads`` heads.
    """

    def __init__(self, gate: PrunedSite, weights: AttentionWeights, heads: int) -> None:
        keep = gate.keep.cpu()
        whole = keep.view(heads, -1)
        self.heads = int(whole.any(1).sum())
        assert self.heads == int(whole.all(1).sum())
        kept = keep.nonzero()[:, 0].to(weights.out.weight.device)
        self.q, self.k, self.v = (w.rows(kept) for w in (weights.q, weights.k, weights.v))
        self.out = weights.out.reading(gate)

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        return [t for w in (self.q, self.k, self.v, self.out) for t in w.tensors()]

    def __call__(
        self, x: Tensor, context: Tensor, value: Tensor, attend: Attend = attention
    ) -> Tensor:
        """[B, N, C] to [B, N, C], equal to `masked_attention` of the same gate."""
        if self.heads == 0:
            return self.out.constant(x)
        q, k, v = _projected((x, context, value), (self.q, self.k, self.v))
        return F.linear(attend(q, k, v, self.heads), self.out.weight, self.out.bias)
