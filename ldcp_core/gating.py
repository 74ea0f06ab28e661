"""From keep-sets of sites to gates of blocks: the one place that knows every kind of block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .feedforward import FeedForwardGate
from .gates import Padding
from .resblock import BlockGate
from .sites import SUFFIXES, blocks_of, sites_of


def block_gates(
    keep_sets: Mapping[str, Tensor], constants: Mapping[str, Tensor], padding: Padding
) -> dict[str, BlockGate | FeedForwardGate]:
    """Group per-site keep-sets by block: block name -> its gate."""
    return {block: _gate(block, keep_sets, constants, padding) for block in blocks_of(keep_sets)}


def _gate(
    block: str, keep_sets: Mapping[str, Tensor], constants: Mapping[str, Tensor], padding: Padding
) -> BlockGate | FeedForwardGate:
    found = [(keep_sets.get(site), constants.get(site)) for site in sites_of(block)]
    if block + SUFFIXES["hidden"] in sites_of(block):
        return FeedForwardGate(*found[0])
    return BlockGate(padding, *found[0], *found[1])
