"""One budget over all gated layers: what the pruned share is a share of.

A budget counts channels, parameters or FLOPs. The same closed form (`Block.cost`) gives
the pruned share of hard counts, which the target is about, and of sums of scores, whose
differentiable rest is the sparsity penalty: λ then weighs every channel by what it costs, and how
much each layer gives is learned. Counted in channels the penalty is the mean score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from ldcp_core import Block, Latent, Padding, Site

BudgetKind = Literal["channels", "parameters", "flops"]


class Budget:
    """The cost of the gated layers of ``sites`` in one unit, as a function of kept counts.

    ``latent`` matters for FLOPs alone. Parameters and FLOPs are those of the layers that the sites'
    blocks can lose (both convolutions of a ResBlock, the feed-forward's two linear layers).
    """

    def __init__(
        self,
        kind: BudgetKind,
        sites: Sequence[Site],
        padding: Padding = "zero",
        latent: Latent | None = None,
    ) -> None:
        self.kind = kind
        self._widths = {site.name: site.channels for site in sites}
        self._blocks: list[Block] = list(dict.fromkeys(site.block for site in sites))
        self._padding = padding
        self._latent = latent or Latent()
        self._whole = self._cost(self._widths)

    @overload
    def remaining(self, counts: Mapping[str, int]) -> float: ...

    @overload
    def remaining(self, counts: Mapping[str, Tensor]) -> Tensor: ...

    def remaining(self, counts: Mapping[str, Any]) -> Any:
        """The share of the whole that is left with so many channels kept per site.

        Differentiable where the counts are tensors (sums of scores, say).
        """
        return self._cost(counts) / self._whole

    def pruned(self, keep_sets: Mapping[str, Tensor]) -> float:
        """The share of the whole that these keep-sets prune."""
        return 1.0 - self.remaining({site: int(keep.sum()) for site, keep in keep_sets.items()})

    def most(self, least: Mapping[str, int]) -> float:
        """The largest share that can be pruned when ``least`` channels of every site stay."""
        return 1.0 - self.remaining(least)

    def weights(self, counts: Mapping[str, int]) -> list[float]:
        """What one channel of each site counts at these counts, as a share of the whole."""
        here = self.remaining(counts)
        found = []
        for site, count in counts.items():
            step = -1 if count else 1
            found.append(abs(here - self.remaining({**counts, site: count + step})))
        return found

    def _cost(self, counts: Mapping[str, Any]) -> Any:
        if self.kind == "channels":
            return sum(counts.values())
        total = 0
        for block in self._blocks:
            kept = [counts.get(site.name, site.channels) for site in block.sites]
            cost = block.cost(kept, self._padding, self._latent)
            total = total + (cost.parameters if self.kind == "parameters" else cost.flops)
        return total
