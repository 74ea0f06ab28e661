"""What pruning saves, counted: parameters, bytes and FLOPs in closed form.

These are counts of the architecture, not measurements; a FLOP is one multiplication or addition
of a convolution, linear layer or attention product, everything else is left out (as
`torch.utils.flop_counter` does). Shares are of the whole U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .attention import Attention
from .blocks import Cost, Latent, Padding
from .feedforward import FeedForward
from .sites import Place, Topology

ZERO_COST = Cost(0, 0)


@dataclass(frozen=True)
class SiteSaving:
    """What one site gives: kept of so many channels, and the cost that goes away."""

    site: str
    kept: int
    channels: int
    saved: Cost


@dataclass(frozen=True)
class Savings:
    """What a set of kept counts saves against the whole U-Net."""

    sites: tuple[SiteSaving, ...]
    unet: Cost

    @property
    def saved(self) -> Cost:
        return sum((s.saved for s in self.sites), ZERO_COST)

    @property
    def kept(self) -> int:
        return sum(s.kept for s in self.sites)

    @property
    def channels(self) -> int:
        return sum(s.channels for s in self.sites)

    @property
    def sparsity(self) -> float:
        """Pruned share of all gated channels."""
        return 1.0 - self.kept / self.channels if self.channels else 0.0

    @property
    def parameter_share(self) -> float:
        """Saved share of the U-Net's parameters (and so of its weight bytes)."""
        return self.saved.parameters / self.unet.parameters

    @property
    def flop_share(self) -> float:
        """Saved share of the U-Net's FLOPs."""
        return self.saved.flops / self.unet.flops

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        return self.saved.parameters * bytes_per_parameter


def savings(
    topology: Topology,
    kept: Mapping[str, int],
    padding: Padding,
    latent: Latent | None = None,
) -> Savings:
    """Savings per site for ``kept[site]`` channels.

    Where both convolutions of a block are gated their savings overlap: the inner site is counted
    first, the residual site gets the rest, so that the sites add up to the whole. A fully kept
    site saves nothing and costs nothing. Raises ValueError for a site the topology does not have.
    """
    latent = latent or Latent()
    unknown = set(kept) - {site.name for site in topology.all_sites()}
    if unknown:
        raise ValueError(f"no such sites: {', '.join(sorted(unknown))}")
    rows: list[SiteSaving] = []
    for block in topology.blocks():
        counts = [site.channels for site in block.sites]
        before = block.cost(counts, padding, latent)
        for place, site in enumerate(block.sites):
            if site.name not in kept:
                continue
            counts[place] = kept[site.name]
            after = block.cost(counts, padding, latent)
            rows.append(SiteSaving(site.name, kept[site.name], site.channels, before - after))
            before = after
    return Savings(tuple(rows), unet_cost(topology, latent))


def unet_cost(topology: Topology, latent: Latent) -> Cost:
    """The whole U-Net, dense. SD1.5: 859,520,964 parameters, 1.61 TFLOP at the default latent."""
    w, full = topology.widths, latent.positions(1)
    embedding = 4 * w[0]
    total = _embedding(w[0], embedding, latent) + _conv(topology.in_channels, w[0], full)
    if topology.pooled_width:
        total += _embedding(topology.pooled_width, embedding, latent)
    total += Cost(2 * w[0], 0) + _conv(w[0], topology.out_channels, full)
    for place in topology.places():
        total += _res_block(place, embedding, latent)
        if place.depth:
            total += _transformer(place, latent)
    for level, width in enumerate(w[:-1]):
        # downsampler here, upsampler of the next deeper level
        total += _conv(width, width, latent.positions(2 ** (level + 1)))
        total += _conv(w[level + 1], w[level + 1], latent.positions(2**level))
    return total


def _embedding(inputs: int, width: int, latent: Latent) -> Cost:
    """Two linear layers on a vector per image."""
    return _linear(inputs, width, latent.batch) + _linear(width, width, latent.batch)


def _conv(in_channels: int, out_channels: int, positions: int, taps: int = 9) -> Cost:
    weights = taps * in_channels * out_channels
    return Cost(weights + out_channels, 2 * weights * positions)


def _linear(inputs: int, outputs: int, rows: int, bias: bool = True) -> Cost:
    return Cost(inputs * outputs + bias * outputs, 2 * inputs * outputs * rows)


def _res_block(place: Place, embedding: int, latent: Latent) -> Cost:
    i, o = place.in_channels, place.width
    positions = latent.positions(place.downsample)
    shortcut = _conv(i, o, positions, taps=1) if i != o else ZERO_COST
    convs = _conv(i, o, positions) + _conv(o, o, positions)
    return convs + _linear(embedding, o, latent.batch) + shortcut + Cost(2 * i + 2 * o, 0)


def _transformer(place: Place, latent: Latent) -> Cost:
    """A spatial transformer: projections around blocks of attention and GEGLU feed-forward."""
    c, n = place.width, latent.positions(place.downsample)
    block = Cost(3 * 2 * c, 0)
    for context in (None, place.context_width):
        attention = Attention("", place.downsample, c, heads=1, context=context)
        block += attention.cost([c], "zero", latent)
    block += FeedForward("", place.downsample, c, 4 * c).cost([4 * c], "zero", latent)
    return _conv(c, c, n, taps=1) * 2 + Cost(2 * c, 0) + block * place.depth
