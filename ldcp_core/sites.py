"""The places of an SD1.5 U-Net whose output channels can be gated.

A site is one convolution, named as diffusers names it. The whole U-Net is described by a handful
of widths (`Topology`), so the same code serves the full model and the small demo model, and a new
scope is one line in `SCOPES`. Hosts map these names to their own modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SiteKind = Literal["inner", "residual"]

#: scope name -> prefixes of the block names it covers
SCOPES: Mapping[str, tuple[str, ...]] = {"mid": ("mid_block.",)}
DEFAULT_SCOPE = "mid"


@dataclass(frozen=True)
class ResBlock:
    """A ResBlock: ``conv1`` maps in_channels to out_channels, ``conv2`` keeps out_channels.

    ``downsample`` is the side of the latent divided by the side of the block's map (8 in the
    mid block).
    """

    name: str
    in_channels: int
    out_channels: int
    downsample: int


@dataclass(frozen=True)
class Site:
    """A gated convolution: conv1 of a ResBlock ("inner") or its conv2 ("residual")."""

    block: ResBlock
    kind: SiteKind

    @property
    def name(self) -> str:
        return f"{self.block.name}.{'conv1' if self.kind == 'inner' else 'conv2'}"

    @property
    def channels(self) -> int:
        return self.block.out_channels


@dataclass(frozen=True)
class Topology:
    """The shape of a U-Net of the SD1.5 family; the defaults are SD1.5 itself.

    ``widths`` are the channels of the four levels; ``attention`` tells which of them carry
    transformers in the down and the up path.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    context_width: int = 768
    in_channels: int = 4
    out_channels: int = 4

    def __post_init__(self) -> None:
        if len(self.widths) != 4 or len(self.attention) != 4:
            raise ValueError(
                f"an SD1.5 U-Net has four levels, found widths {self.widths} and attention "
                f"{self.attention}"
            )
        if not all(isinstance(a, bool) for a in self.attention):
            raise ValueError(f"attention must be four booleans, found {self.attention}")
        numbers = (
            *self.widths,
            self.layers_per_block,
            self.context_width,
            self.in_channels,
            self.out_channels,
        )
        if not all(type(n) is int and 0 < n <= 65536 for n in numbers):  # True is an int, too
            raise ValueError(f"widths and depths must be positive integers, found {numbers}")
        if self.layers_per_block > 8:
            raise ValueError(
                f"a U-Net with {self.layers_per_block} layers per block is not SD1.5's"
            )

    @classmethod
    def from_json(cls, value: Any) -> Topology:
        """Inverse of `to_json`; raises ValueError on anything that is not a topology."""
        try:
            return cls(
                widths=tuple(value["widths"]),
                attention=tuple(value["attention"]),
                layers_per_block=value["layers_per_block"],
                context_width=value["context_width"],
                in_channels=value["in_channels"],
                out_channels=value["out_channels"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of an SD1.5 U-Net: {value!r}") from error

    def to_json(self) -> dict[str, Any]:
        return {
            "widths": list(self.widths),
            "attention": list(self.attention),
            "layers_per_block": self.layers_per_block,
            "context_width": self.context_width,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
        }

    def res_blocks(self) -> list[ResBlock]:
        """All ResBlocks in the order in which they run (22 for SD1.5)."""
        w, layers = self.widths, self.layers_per_block
        blocks: list[ResBlock] = []
        skips = [w[0]]  # channels the down path hands over to the up path
        channels = w[0]
        for level, width in enumerate(w):
            for r in range(layers):
                blocks.append(
                    ResBlock(f"down_blocks.{level}.resnets.{r}", channels, width, 2**level)
                )
                channels = width
                skips.append(channels)
            if level < len(w) - 1:
                skips.append(channels)
        deepest = 2 ** (len(w) - 1)
        for r in range(2):
            blocks.append(ResBlock(f"mid_block.resnets.{r}", w[-1], w[-1], deepest))
        for up, (level, width) in enumerate(reversed(list(enumerate(w)))):
            for r in range(layers + 1):
                blocks.append(
                    ResBlock(f"up_blocks.{up}.resnets.{r}", channels + skips.pop(), width, 2**level)
                )
                channels = width
        return blocks

    def sites(self, scope: str = DEFAULT_SCOPE) -> list[Site]:
        """The sites of a scope in the order in which they run.

        Raises ValueError when the scope is unknown.
        """
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; known are {', '.join(sorted(SCOPES))}")
        return [s for s in self.all_sites() if s.block.name.startswith(SCOPES[scope])]

    def all_sites(self) -> list[Site]:
        """Every site a gate file may name, in the order in which they run."""
        kinds: Sequence[SiteKind] = ("inner", "residual")
        return [Site(block, kind) for block in self.res_blocks() for kind in kinds]


SD15 = Topology()


def blocks_of(sites: Iterable[str]) -> list[str]:
    """The ResBlocks that these sites lie in, each once, in the order of the sites.

    >>> blocks_of(["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"])
    ['mid_block.resnets.0']
    """
    return list(dict.fromkeys(site.rsplit(".", 1)[0] for site in sites))
