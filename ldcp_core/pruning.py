"""What is pruned: which channels of each site stay, and what stands in for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .blocks import Padding
from .sites import blocks_of, kind_of, sites_of


@dataclass(frozen=True)
class PrunedSite:
    """The channels that are kept, bool [C], and what stands in for the others, float [C].

    Without a constant that is zero. ``padding`` is the rule of the gates that this comes from.
    """

    keep: Tensor
    constant: Tensor | None = None
    padding: Padding = "zero"


#: site name -> how it is pruned. Of several gates that name a site the later ones count, so they
#: are merged as dicts are: ``{**earlier, **later}``
Pruned = Mapping[str, PrunedSite]


def padding_of(block: str, pruned: Pruned) -> Padding:
    """The rule of a block: that of its first site, the only one that it concerns."""
    first = pruned.get(sites_of(block)[0])
    return "zero" if first is None else first.padding


def block_gates(pruned: Pruned) -> dict[str, Any]:
    """The same by blocks: block name -> the gate of its kind."""
    found = {}
    for block in blocks_of(pruned):
        sites = [pruned.get(site) for site in sites_of(block)]
        pairs = [(None, None) if site is None else (site.keep, site.constant) for site in sites]
        found[block] = kind_of(block).gate(pairs, padding_of(block, pruned))
    return found
