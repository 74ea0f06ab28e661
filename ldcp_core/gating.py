"""From keep-sets of sites to gates of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .blocks import Padding
from .sites import blocks_of, kind_of, sites_of


def block_gates(
    keep_sets: Mapping[str, Tensor], constants: Mapping[str, Tensor], padding: Padding
) -> dict[str, Any]:
    """Group per-site keep-sets by block: block name -> the gate of its kind."""
    found = {}
    for block in blocks_of(keep_sets):
        pairs = [(keep_sets.get(site), constants.get(site)) for site in sites_of(block)]
        found[block] = kind_of(block).gate(pairs, padding)
    return found
