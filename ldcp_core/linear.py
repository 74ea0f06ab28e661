"""What linear layers lose when channels between them are pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import PrunedSite


@dataclass(frozen=True)
class LinearWeights:
    """Weight [O, I] and bias [O] of a linear layer as it would run now, patches included."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, rows: Tensor) -> LinearWeights:
        """A copy of these outputs of it."""
        bias = None if self.bias is None else self.bias.index_select(0, rows)
        return LinearWeights(self.weight.index_select(0, rows), bias)

    def reading(self, site: PrunedSite) -> LinearWeights:
        """A copy that reads what is kept of a site; what it makes of the constants is in its bias.

        Shares no memory with the original.
        """
        device, dtype = self.weight.device, self.weight.dtype
        keep = site.keep.cpu()
        kept, pruned = keep.nonzero()[:, 0].to(device), (~keep).nonzero()[:, 0].to(device)
        bias = self.bias
        if site.constant is not None:
            mu = site.constant.to(device, torch.float32).index_select(0, pruned)
            constant = self.weight.index_select(1, pruned).float() @ mu
            bias = (constant if bias is None else bias.float() + constant).to(dtype)
        elif bias is not None:
            bias = bias.clone()
        weight = self.weight.index_select(1, kept).contiguous()
        if site.correction is not None:
            weight, bias = site.correction.added_(weight, bias)
        return LinearWeights(weight, bias)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def constant(self, x: Tensor) -> Tensor:
        """Its output for [..., I] where nothing is read: the bias alone."""
        alone = x.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias
        return alone.expand(*x.shape[:-1], -1)
