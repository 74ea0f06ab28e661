"""The places of a Stable Diffusion U-Net whose channels can be gated.

A site is a layer whose output channels can be gated, named as diffusers names it. The whole
U-Net is described by a handful of widths and depths (`Topology`), which each host finds in its own
model; so the same code serves every family of U-Nets that is built of these blocks, at every width.
Hosts map the names to their own modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from .attention import Attention
from .blocks import Block, Site
from .feedforward import FeedForward
from .resblock import ResBlock
from .text import one_line, quoted

#: every kind of block there is
BLOCK_KINDS: tuple[type[Block], ...] = (ResBlock, FeedForward, Attention)

#: area of the U-Net that a scope names -> prefixes of the names of its blocks
AREAS: Mapping[str, tuple[str, ...]] = {
    "mid": ("mid_block.",),
    "up": ("up_blocks.",),
    "down": ("down_blocks.",),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}
#: words of a scope -> the kind of block they add to its parts
KINDS: Mapping[str, type[Block]] = {"ff": FeedForward, "heads": Attention}
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
    "all+ff+heads",
    "ff",
    "heads",
)
DEFAULT_SCOPE = "mid"
LONGEST_SCOPE = 20_000  # characters: the names of all sites of SDXL take 13,124
_SEPARATORS = re.compile(r"[\s+,;\"'`\u2018\u2019\u201c\u201d]+")  # quotes come with a copied text
_KINDS_OF_SCOPE = (
    f"a scope is {', '.join(AREAS)}, several of them joined by '+', '+ff' and '+heads' with them, "
    "or site names such as 'mid_block.resnets.0.conv1' separated by commas"
)


@dataclass(frozen=True)
class Place:
    """A ResBlock of a U-Net, and how many transformer blocks come behind it.

    ``stage`` and ``number`` are those of diffusers' names. The map of ``downsample`` has
    ``in_channels`` before and ``width`` channels behind the ResBlock. Attention has ``heads``
    heads, 0 where that is not known, and reads a text of ``context_width`` channels.
    """

    stage: str
    number: int
    downsample: int
    in_channels: int
    width: int
    depth: int
    heads: int
    context_width: int

    def blocks(self) -> Iterator[Block]:
        """The ResBlock, then attention and feed-forward in turn, in the order in which they run."""
        name = f"{self.stage}.resnets.{self.number}"
        yield ResBlock(name, self.downsample, self.in_channels, self.width)
        for depth in range(self.depth):
            name = f"{self.stage}.attentions.{self.number}.transformer_blocks.{depth}"
            if self.heads:
                sizes = self.downsample, self.width, self.heads
                yield Attention(f"{name}.attn1", *sizes, context=None)
                yield Attention(f"{name}.attn2", *sizes, context=self.context_width)
            yield FeedForward(f"{name}.ff", self.downsample, self.width, 4 * self.width)


@dataclass(frozen=True)
class Topology:
    """The shape of a Stable Diffusion U-Net; the defaults are SD1.5's.

    ``widths`` are the channels of the three or four levels. ``down``, ``mid`` and ``up`` say how
    many transformer blocks come behind each ResBlock, level by level in the order in which they
    run; ``mid`` is empty where there is no mid block. ``context_width`` is that of the text
    embeddings, ``pooled_width`` that of what joins the time embedding (SDXL: pooled text and
    sizes), 0 for nothing. ``linear_projections``: the transformers' projections are linear layers
    (SD2 and later) instead of convolutions. ``heads`` are those of a level's attention, 0 where it
    has none; empty where nothing is known of them.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    down: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    mid: tuple[int, ...] = (1, 0)
    up: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    context_width: int = 768
    pooled_width: int = 0
    linear_projections: bool = False
    in_channels: int = 4
    out_channels: int = 4
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lists = (self.widths, *self.down, self.mid, self.heads)
        if not all(isinstance(level, tuple) for level in lists):
            raise ValueError(f"widths and depths must be lists, found {one_line(vars(self))}")
        levels = len(self.widths)
        if levels not in (3, 4) or len(self.down) != levels or len(self.up) != levels:
            raise ValueError(
                f"a Stable Diffusion U-Net has three or four levels, found widths "
                f"{one_line(self.widths, 60)}, down {one_line(self.down, 60)} and up "
                f"{one_line(self.up, 60)}"
            )
        numbers = (*self.widths, self.context_width, self.in_channels, self.out_channels)
        # True is an int, too
        if not all(type(n) is int and 0 < n <= 65536 for n in numbers):
            raise ValueError(f"widths must be positive integers, found {one_line(numbers)}")
        if type(self.pooled_width) is not int or not 0 <= self.pooled_width <= 65536:
            raise ValueError(f"pooled_width must be 0 or more, found {one_line(self.pooled_width)}")
        linear: object = self.linear_projections
        if not isinstance(linear, bool):
            raise ValueError(f"linear_projections must be a boolean, found {one_line(linear)}")
        layers = self.layers_per_block
        if not 0 < layers <= 8 or any(len(level) != layers for level in self.down):
            raise ValueError(f"no Stable Diffusion U-Net has such levels: {one_line(self.down)}")
        if len(self.mid) > 2 or any(len(level) != layers + 1 for level in self.up):
            found = one_line((self.mid, self.up))
            raise ValueError(f"no Stable Diffusion U-Net has such a mid block and levels: {found}")
        depths = [depth for level in (*self.down, self.mid, *self.up) for depth in level]
        if not all(type(depth) is int and 0 <= depth <= 24 for depth in depths):
            raise ValueError(f"depths must be integers from 0 to 24, found {one_line(depths)}")
        if self.heads:
            self._check_heads()

    def _check_heads(self) -> None:
        if len(self.heads) != len(self.widths):
            raise ValueError(
                f"heads must be none, or one number for each of {len(self.widths)} levels, found "
                f"{one_line(self.heads)}"
            )
        for heads, width, attends in zip(self.heads, self.widths, self.attends, strict=True):
            if (
                type(heads) is not int
                or heads < 0
                or bool(heads) != attends
                or width % (heads or 1)
            ):
                expected = "a divisor of the width" if attends else "0 where nothing attends"
                raise ValueError(
                    f"a level {width} channels wide can't have {one_line(heads)} heads, expected "
                    f"{expected}"
                )

    def __str__(self) -> str:
        depths = " | ".join(" ".join(map(str, d)) for d in (*self.down, self.mid, *self.up))
        return (
            f"{self.family} (widths {' '.join(map(str, self.widths))}, text width "
            f"{self.context_width}, transformer blocks {depths})"
        )

    @property
    def layers_per_block(self) -> int:
        """ResBlocks of a level on the way down; on the way up it has one more."""
        return len(self.down[0])

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether there is attention at a level, level by level."""
        levels = zip(self.down, reversed(self.up), strict=True)
        found = [any(down) or any(up) for down, up in levels]
        return (*found[:-1], found[-1] or any(self.mid))

    def fits(self, other: Topology) -> bool:
        """Whether gates made for one are gates for the other.

        Inpainting models have more channels at the input, which no gate concerns. Nor do heads,
        where one of the two does not know them.
        """
        heads = other.heads if other.heads and self.heads else ()
        known = replace(self, heads=self.heads if heads else ())
        return known == replace(other, in_channels=self.in_channels, heads=heads)

    @property
    def family(self) -> str:
        """What this kind of U-Net is called, whatever its widths."""
        if not self.linear_projections:
            return "Stable Diffusion 1.5"
        if not self.pooled_width:
            return "Stable Diffusion 2"
        if len(self.widths) == 3:
            return "SDXL"
        return "SDXL refiner" if max(self.down[1]) > 1 else "Stable Diffusion 2 unCLIP"

    @classmethod
    def from_json(cls, value: Any) -> Topology:
        """Inverse of `to_json`; raises ValueError on anything that is not a topology."""
        try:
            known = {field.name for field in fields(cls)}
            if set(value) != {*known, "family"}:
                raise KeyError("fields")
            found = cls(**{name: _tuples(value[name]) for name in known})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a U-Net: {one_line(repr(value))}") from error
        if value["family"] != found.family:
            raise ValueError(
                f"the description of a U-Net of {found.family} says that it is one of "
                f"{one_line(value['family'], 60)}"
            )
        return found

    @classmethod
    def from_version_2(cls, value: Any) -> Topology:
        """The topology that a gate file of version 2 describes, which does not say the heads.

        Raises ValueError on anything that is not one.
        """
        if not isinstance(value, dict) or "heads" in value:
            raise ValueError(f"not the description of a U-Net: {one_line(repr(value))}")
        return cls.from_json({**value, "heads": []})

    @classmethod
    def from_version_1(cls, value: Any) -> Topology:
        """The topology that a gate file of version 1 describes: SD1.5's, at any width.

        Raises ValueError on anything that is not one.
        """
        try:
            attention, layers = value["attention"], value["layers_per_block"]
            if len(attention) != 4 or not all(isinstance(a, bool) for a in attention):
                raise ValueError(f"attention must be four booleans, found {one_line(attention)}")
            if type(layers) is not int or not 0 < layers <= 8:
                raise ValueError(f"no SD1.5 U-Net has {one_line(layers)} layers per block")
            return cls(
                widths=tuple(value["widths"]),
                down=tuple((int(attends),) * layers for attends in attention),
                up=tuple((int(attends),) * (layers + 1) for attends in reversed(attention)),
                context_width=value["context_width"],
                in_channels=value["in_channels"],
                out_channels=value["out_channels"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not the description of an SD1.5 U-Net: {one_line(repr(value))}"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them, and the family for those who read the file."""
        return {"family": self.family, **asdict(self)}

    def places(self) -> list[Place]:
        """All ResBlocks with the transformers behind them, in the order in which they run."""
        w = self.widths
        skips = [w[0]]  # channels the down path hands over to the up path
        channels, deepest = w[0], len(w) - 1
        found: list[Place] = []

        def place(stage: str, number: int, level: int, inputs: int, depth: int) -> None:
            heads = self.heads[level] if self.heads else 0
            sizes = 2**level, inputs, w[level]
            found.append(Place(stage, number, *sizes, depth, heads, self.context_width))

        for level, depths in enumerate(self.down):
            for number, depth in enumerate(depths):
                place(f"down_blocks.{level}", number, level, channels, depth)
                channels = w[level]
                skips.append(channels)
            if level < deepest:
                skips.append(channels)
        for number, depth in enumerate(self.mid):
            place("mid_block", number, deepest, channels, depth)
        for stage, depths in enumerate(self.up):
            for number, depth in enumerate(depths):
                inputs = channels + skips.pop()
                place(f"up_blocks.{stage}", number, deepest - stage, inputs, depth)
                channels = w[deepest - stage]
        return found

    def blocks(self) -> list[Block]:
        """All blocks in the order in which they run.

        SD1.5 has 22 ResBlocks, 32 attentions and 16 feed-forwards.
        """
        return [block for place in self.places() for block in place.blocks()]

    def res_blocks(self) -> list[ResBlock]:
        """All ResBlocks in the order in which they run."""
        return [block for block in self.blocks() if isinstance(block, ResBlock)]

    def sites(self, scope: str = DEFAULT_SCOPE) -> list[Site]:
        """The sites of a scope in the order in which they run.

        A scope is ``mid``, ``up``, ``down`` or ``all`` (the ResBlocks of that part of the U-Net),
        several of them, and with them ``ff`` and ``heads`` for the feed-forwards and the attention
        of the same parts; these alone are those of all parts. It may hold names of sites as well,
        in which ``*`` stands for anything. They are joined by ``+``, commas or spaces, in any case,
        quoted or not. Raises ValueError for anything else, and for a name that no site has.

        >>> [len(SD15.sites(scope)) for scope in ("mid+up", "Mid, up", '"mid"', "ff, mid_block.*")]
        [28, 28, 4, 22]
        """
        if len(scope) > LONGEST_SCOPE:
            raise ValueError(f"a scope of {len(scope):,} characters is none; {_KINDS_OF_SCOPE}")
        items = dict.fromkeys(filter(None, _SEPARATORS.split(scope.lower()))) or [scope]
        words = {item for item in items if item in AREAS or item in KINDS}
        parts = [AREAS[word] for word in words if word in AREAS] or [AREAS["all"]]
        prefixes = tuple(prefix for part in parts for prefix in part)
        kinds: set[type[Block]] = {KINDS[word] for word in words if word in KINDS}
        kinds |= {ResBlock} if words - set(KINDS) else set()
        wanted: set[str] = set()
        sites = self.all_sites()
        for pattern in items:
            found = {site.name for site in sites if fnmatchcase(site.name, pattern)}
            if not found and pattern not in words:
                raise ValueError(f"unknown scope or site {quoted(pattern)}; {_KINDS_OF_SCOPE}")
            wanted |= found
        return [
            site
            for site in sites
            if site.name in wanted or (type(site.block) in kinds and site.name.startswith(prefixes))
        ]

    def all_sites(self) -> list[Site]:
        """Every site a gate file may name, in the order in which they run."""
        return [site for block in self.blocks() for site in block.sites]


SD15 = Topology(heads=(8, 8, 8, 8))


def _tuples(value: Any, levels: int = 2) -> Any:
    """Short lists of short lists as tuples; what no topology has stays as it is."""
    if levels and isinstance(value, list) and len(value) <= 9:
        return tuple(_tuples(item, levels - 1) for item in value)
    return value


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
    >>> short_name("mid_block.attentions.0.transformer_blocks.7.attn1.to_v")
    'mid_block.attentions.0.7.attn1'
    """
    short = re.sub(r"\.transformer_blocks(\.\d+\.\w+)\.(net\.0|to_v)$", r"\1", site)
    return re.sub(r"(attentions\.\d+)\.0\.(?=ff|attn)", r"\1.", short)
