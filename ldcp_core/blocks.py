"""What a kind of block is: the one interface that the rest of the code knows blocks by.

A kind is a subclass of `Block` in a file of its own, which says how many channels its sites have,
what pruning them means and what that saves. `ldcp_core.sites` names the kinds there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .correction import Correction

Padding = Literal["zero", "extend"]
PADDINGS: tuple[Padding, ...] = ("zero", "extend")
#: kept counts are multiples of this, so that the convolution backends take their fast paths
ALIGNMENT = 8


@dataclass(frozen=True)
class Cost:
    """Parameters held and FLOPs of one forward pass."""

    parameters: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.flops - other.flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.parameters * times, self.flops * times)


@dataclass(frozen=True)
class Latent:
    """The input of one forward pass: latent height and width, the batch with CFG included, and the
    tokens of each prompt.
    """

    height: int = 64
    width: int = 64
    batch: int = 2
    tokens: int = 77

    def positions(self, downsample: int) -> int:
        """Positions of the map at a depth, over the batch; each halving rounds up."""
        return self.batch * -(-self.height // downsample) * -(-self.width // downsample)


@dataclass(frozen=True)
class PrunedSite:
    """The channels that are kept, bool [C], and what stands in for the others, float [C].

    Without a constant that is zero; a ``correction`` is what the layer that reads the channels
    makes up for beyond it. ``padding`` is the rule of the gates that this comes from.
    """

    keep: Tensor
    constant: Tensor | None = None
    padding: Padding = "zero"
    correction: Correction | None = None


@dataclass(frozen=True)
class SoftGate:
    """What pruning does to a site's channels, by a mask [C] of zeros and ones and constants [C].

    The mask is differentiable in training. Every masked reference says by this what is pruned, and
    every compact form is tested against one. ``correction`` is that of the layer that reads the
    channels.
    """

    mask: Tensor
    constant: Tensor
    correction: Correction | None = None

    @classmethod
    def of(cls, site: PrunedSite) -> SoftGate:
        """The same as a mask; zero where there is no constant."""
        constant = torch.zeros(site.keep.numel()) if site.constant is None else site.constant
        return cls(site.keep.float(), constant, site.correction)

    def __call__(self, h: Tensor, axis: int = 1) -> Tensor:
        """m·h + (1 − m)·μ, with the channels in dimension ``axis`` of ``h``."""
        shape = [1] * h.dim()
        shape[axis] = -1
        mask = self.mask.to(h).view(shape)
        return mask * h + (1 - mask) * self.constant.to(h).view(shape)

    def reader(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [O, C, ...] and bias [O] of the layer that reads the channels."""
        if self.correction is None:
            return weight, bias
        return self.correction.added(weight, bias, self.mask > 0)


@dataclass(frozen=True)
class SiteKind:
    """What the sites of one kind have in common. Layers are named as diffusers does, in the block.

    ``layer`` is the one whose output channels are gated, ``owner`` the one with their weights, of
    which each channel has ``rows`` rows of ``taps`` weights per input. ``reader`` is the layer
    that reads the channels, ``reader_taps`` weights per output; None where a sum reads them.
    ``axis`` is the dimension that counts them between the two. ``type_name`` is what tables call
    the layer. A constant replaces the output of ``layer``, or where not ``replaces_output`` what
    ``reader`` gets.
    """

    name: str
    layer: str
    owner: str
    reader: str | None
    axis: int
    type_name: str
    rows: int = 1
    taps: int = 1
    reader_taps: int = 1
    replaces_output: bool = True

    def rows_of(self, weight: Tensor) -> Tensor:
        """What each channel has of the owner's weight [rows·C, ...]: [C, ...]."""
        return weight if self.rows == 1 else torch.cat(weight.chunk(self.rows), dim=1)


@dataclass(frozen=True)
class Site:
    """A gated layer: one kind of site in one block."""

    block: Block
    kind: SiteKind

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.kind.layer}"

    @property
    def channels(self) -> int:
        return self.block.widths(self.kind)[1]

    @property
    def group(self) -> int:
        """How many channels in a row are kept or pruned together, and have one score."""
        return self.block.group(self.kind)

    @property
    def multiple(self) -> int:
        """What kept counts are a multiple of, but for that of all channels."""
        return ALIGNMENT if self.group == 1 else self.group

    def shared(self, values: Tensor) -> Tensor:
        """Values [C] as they are for a whole group: in each channel of it the mean."""
        if self.group == 1:
            return values
        return values.view(-1, self.group).mean(1).repeat_interleave(self.group)

    @property
    def row_parameters(self) -> int:
        """Weights and biases in the rows of one channel."""
        return self.block.row_parameters(self.kind)

    @property
    def weight(self) -> str:
        """The name of the owner's weight in diffusers' state dict."""
        return f"{self.block.name}.{self.kind.owner}.weight"

    @property
    def reader(self) -> str | None:
        """The name of the layer that reads the channels; None where a sum does."""
        return self.kind.reader and f"{self.block.name}.{self.kind.reader}"


def groups_of(sites: Iterable[Site]) -> dict[str, int]:
    """Site name -> how many channels in a row have one score, where these are more than one."""
    return {site.name: site.group for site in sites if site.group > 1}


@dataclass(frozen=True)
class Block(ABC):
    """A block of the U-Net whose channels can be gated, by diffusers' name.

    ``downsample`` is the side of the latent divided by the side of the block's map (8 in the mid
    block).
    """

    name: str
    downsample: int

    #: in the order in which they run
    site_kinds: ClassVar[tuple[SiteKind, ...]]
    #: what the names of such blocks match, for `fnmatch`
    pattern: ClassVar[str]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(self, kind) for kind in self.site_kinds)

    @abstractmethod
    def widths(self, kind: SiteKind) -> tuple[int, int]:
        """How many channels the layer of a site reads and how many it has."""

    @abstractmethod
    def outputs(self) -> int:
        """How many outputs the layers have that read its sites."""

    def group(self, kind: SiteKind) -> int:
        """How many channels of a site are kept or pruned together."""
        return 1

    def row_parameters(self, kind: SiteKind) -> int:
        """Weights and biases in the rows of one channel of a site."""
        return kind.rows * (kind.taps * self.widths(kind)[0] + 1)

    @abstractmethod
    def cost(self, kept: Sequence[int], padding: Padding, latent: Latent) -> Cost:
        """The gated layers with so many channels kept at the sites, in their order.

        Counts that are tensors give a cost that can be differentiated.
        """

    @staticmethod
    @abstractmethod
    def gate(found: Sequence[PrunedSite | None], padding: Padding) -> Any:
        """The gate of a block from how each of its sites is pruned, None for one that is not."""
