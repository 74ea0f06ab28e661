"""What is pruned: which channels of each site stay, and what stands in for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import Padding, PrunedSite
from .sites import blocks_of, kind_of, sites_of

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
        found[block] = kind_of(block).gate(sites, padding_of(block, pruned))
    return found
