"""The places of an SD1.5 U-Net whose channels can be gated.

A site is a layer whose output channels can be gated, named as diffusers names it. The whole
U-Net is described by a handful of widths (`Topology`), so the same code serves the full model and
the small demo model. Hosts map these names to their own modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .blocks import Block, Site
from .feedforward import FeedForward
from .resblock import ResBlock
from .text import one_line, quoted

#: every kind of block there is
BLOCK_KINDS: tuple[type[Block], ...] = (ResBlock, FeedForward)

#: part of the U-Net -> prefixes of the names of its blocks
PARTS: Mapping[str, tuple[str, ...]] = {
    "mid": ("mid_block.",),
    "up": ("up_blocks.",),
    "down": ("down_blocks.",),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}
FEED_FORWARD = "ff"
#: the scopes worth a name in a menu; `Topology.sites` takes more
SCOPES: tuple[str, ...] = (
    "mid",
    "up",
    "down",
    "mid+up",
    "all",
    "mid+ff",
    "up+ff",
    "down+ff",
    "mid+up+ff",
    "all+ff",
    "ff",
)
DEFAULT_SCOPE = "mid"
LONGEST_SCOPE = 10_000  # characters: several times the names of all sites
_SEPARATORS = re.compile(r"[\s+,;\"'`\u2018\u2019\u201c\u201d]+")  # quotes come with a copied text
_KINDS_OF_SCOPE = (
    f"a scope is {', '.join(PARTS)}, several of them joined by '+', '+ff' with them, or site names "
    "such as 'mid_block.resnets.0.conv1' separated by commas"
)


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
                f"an SD1.5 U-Net has four levels, found widths {one_line(self.widths, 60)} and "
                f"attention {one_line(self.attention, 60)}"
            )
        if not all(isinstance(a, bool) for a in self.attention):
            raise ValueError(f"attention must be four booleans, found {one_line(self.attention)}")
        numbers = (
            *self.widths,
            self.layers_per_block,
            self.context_width,
            self.in_channels,
            self.out_channels,
        )
        if not all(type(n) is int and 0 < n <= 65536 for n in numbers):  # True is an int, too
            raise ValueError(
                f"widths and depths must be positive integers, found {one_line(numbers)}"
            )
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
            raise ValueError(
                f"not the description of an SD1.5 U-Net: {one_line(repr(value))}"
            ) from error

    def to_json(self) -> dict[str, Any]:
        return {
            "widths": list(self.widths),
            "attention": list(self.attention),
            "layers_per_block": self.layers_per_block,
            "context_width": self.context_width,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
        }

    def blocks(self) -> list[Block]:
        """All ResBlocks and feed-forwards in the order in which they run (22 and 16 for SD1.5)."""
        w, layers = self.widths, self.layers_per_block
        blocks: list[Block] = []
        skips = [w[0]]  # channels the down path hands over to the up path
        channels = w[0]

        def attend(stage: str, number: int, width: int, downsample: int) -> None:
            name = f"{stage}.attentions.{number}.transformer_blocks.0.ff"
            blocks.append(FeedForward(name, downsample, width, 4 * width))

        for level, width in enumerate(w):
            stage = f"down_blocks.{level}"
            for r in range(layers):
                blocks.append(ResBlock(f"{stage}.resnets.{r}", 2**level, channels, width))
                if self.attention[level]:
                    attend(stage, r, width, 2**level)
                channels = width
                skips.append(channels)
            if level < len(w) - 1:
                skips.append(channels)
        deepest = 2 ** (len(w) - 1)
        blocks.append(ResBlock("mid_block.resnets.0", deepest, w[-1], w[-1]))
        attend("mid_block", 0, w[-1], deepest)
        blocks.append(ResBlock("mid_block.resnets.1", deepest, w[-1], w[-1]))
        for up, (level, width) in enumerate(reversed(list(enumerate(w)))):
            stage = f"up_blocks.{up}"
            for r in range(layers + 1):
                wide = channels + skips.pop()
                blocks.append(ResBlock(f"{stage}.resnets.{r}", 2**level, wide, width))
                if self.attention[level]:
                    attend(stage, r, width, 2**level)
                channels = width
        return blocks

    def res_blocks(self) -> list[ResBlock]:
        """All ResBlocks in the order in which they run."""
        return [block for block in self.blocks() if isinstance(block, ResBlock)]

    def sites(self, scope: str = DEFAULT_SCOPE) -> list[Site]:
        """The sites of a scope in the order in which they run.

        A scope is ``mid``, ``up``, ``down`` or ``all`` (the ResBlocks of that part of the U-Net),
        several of them, and ``ff`` with them for the feed-forwards of the same parts; ``ff`` alone
        is all feed-forwards. It may hold names of sites as well, in which ``*`` stands for
        anything. They are joined by ``+``, commas or spaces, in any case, quoted or not. Raises
        ValueError for anything else, and for a name that no site has.

        >>> [len(SD15.sites(scope)) for scope in ("mid+up", "Mid, up", '"mid"', "ff, mid_block.*")]
        [28, 28, 4, 20]
        """
        if len(scope) > LONGEST_SCOPE:
            raise ValueError(f"a scope of {len(scope):,} characters is none; {_KINDS_OF_SCOPE}")
        items = [item for item in _SEPARATORS.split(scope.lower()) if item] or [scope]
        words = {item for item in items if item in PARTS or item == FEED_FORWARD}
        parts = [PARTS[word] for word in words if word != FEED_FORWARD] or [PARTS["all"]]
        prefixes = tuple(prefix for part in parts for prefix in part)
        kinds: set[type[Block]] = {FeedForward} if FEED_FORWARD in words else set()
        kinds |= {ResBlock} if words - {FEED_FORWARD} else set()
        wanted: set[str] = set()
        for pattern in items:
            found = {s.name for s in self.all_sites() if fnmatchcase(s.name, pattern)}
            if not found and pattern not in words:
                raise ValueError(f"unknown scope or site {quoted(pattern)}; {_KINDS_OF_SCOPE}")
            wanted |= found
        return [
            site
            for site in self.all_sites()
            if site.name in wanted or (type(site.block) in kinds and site.name.startswith(prefixes))
        ]

    def all_sites(self) -> list[Site]:
        """Every site a gate file may name, in the order in which they run."""
        return [site for block in self.blocks() for site in block.sites]


SD15 = Topology()


def kind_of(block: str) -> type[Block]:
    """The kind of the block of a name; raises ValueError where none has such names."""
    for kind in BLOCK_KINDS:
        if fnmatchcase(block, kind.pattern):
            return kind
    raise ValueError(f"{block!r} is not the name of a block")


def block_of(site: str) -> str:
    """The name of the block that a site lies in; raises ValueError for what names no site.

    >>> block_of("mid_block.resnets.0.conv1")
    'mid_block.resnets.0'
    """
    for kind in BLOCK_KINDS:
        for site_kind in kind.site_kinds:
            block = site.removesuffix(f".{site_kind.layer}")
            if block != site and fnmatchcase(block, kind.pattern):
                return block
    raise ValueError(f"{site!r} is not the name of a site")


def blocks_of(sites: Iterable[str]) -> list[str]:
    """The blocks that these sites lie in, each once, in the order of the sites.

    >>> blocks_of(["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"])
    ['mid_block.resnets.0']
    """
    return list(dict.fromkeys(map(block_of, sites)))


def sites_of(block: str) -> tuple[str, ...]:
    """The names of the sites that a block has.

    >>> sites_of("mid_block.resnets.0")
    ('mid_block.resnets.0.conv1', 'mid_block.resnets.0.conv2')
    >>> sites_of("mid_block.attentions.0.transformer_blocks.0.ff")
    ('mid_block.attentions.0.transformer_blocks.0.ff.net.0',)
    """
    return tuple(f"{block}.{site_kind.layer}" for site_kind in kind_of(block).site_kinds)


def short_name(site: str) -> str:
    """A site's name without what all names of its kind share, for tables.

    >>> short_name("mid_block.attentions.0.transformer_blocks.0.ff.net.0")
    'mid_block.attentions.0.ff'
    """
    return site.replace(".transformer_blocks.0.ff.net.0", ".ff")
