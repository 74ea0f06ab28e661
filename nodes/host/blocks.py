"""A block of ComfyUI's U-Net, seen as what `ldcp_core` prunes, whatever its kind.

Each kind is a `HostBlock` in a file of its own, the only code that knows the host's modules of that
kind; `nodes.host.model` names the kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...ldcp_core import Padding, See, SiteKind, SoftGate
from .changes import Watch

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Judgement:
    """What other extensions have done to one block, in words that follow "has"; empty: nothing.

    ``bypassed`` is what every pruned form of the block would undo, ``folded`` what the folded form
    would. It is good for as long as ``holds()``, and of these ``layers``.
    """

    bypassed: str
    folded: str
    layers: list[nn.Module]
    holds: Callable[[], bool]


@dataclass(frozen=True)
class Compact:
    """A pruned forward of one block and what it needs of the compute device."""

    forward: Forward
    #: what it holds there
    tensors: list[Tensor]
    #: the layers whose weights it computes with
    layers: list[nn.Module]
    #: those of them whose full weights it no longer needs
    replaced: list[nn.Module]
    #: why it loses rows alone, in words that follow "has"; empty where it loses all that it can
    rows_only: str = ""


@dataclass(frozen=True)
class Watched:
    """Where the channels of one site can be seen.

    A constant would replace the output of ``output``, or where that is None what ``reader`` gets.
    That is the layer that reads the channels, each with one column of its weights; None where a
    residual sum reads them.
    """

    output: nn.Module | None
    reader: nn.Module | None


class HostBlock(Protocol):
    """One block of a model of the host, below the U-Net's ``path``."""

    #: layer in diffusers' name of a site -> the host's path, in the block, of what owns its weights
    layers: ClassVar[dict[str, str]]
    module: nn.Module

    def __init__(self, unet: nn.Module, path: str) -> None: ...

    def check(self, block: Any) -> str | None:
        """Why the module is not what ``block`` (of this kind) says; None when it is."""

    def judge(self) -> Judgement:
        """Look at everything that pruning may leave out, but for the block's own ``forward``."""

    def passed_over(self, options: Mapping[str, Any]) -> str:
        """What in an evaluation's ``transformer_options`` makes the host go past the block.

        In words that follow "has"; empty where it runs.
        """

    def compact(
        self, gate: Any, device: torch.device, dtype: torch.dtype, rows_only: str = ""
    ) -> Compact | None:
        """The block computing only what ``gate`` keeps; None when that is all of it.

        ``device`` and ``dtype`` are those of the maps in the run that is about to start. For the
        reason ``rows_only``, if there is one, the host's norm runs on all channels. Raises
        NotCaptured when the weights can't be had.
        """

    def watched(self, kind: SiteKind) -> Watched:
        """The places to watch for a site of this block."""

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        """`ldcp_core.gathering.WatchesReader`. A block that is not pruned as it is now shows none.

        An evaluation raises NotCaptured when the reader's weights can't be had.
        """

    def estimates(
        self, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each site the weights that each channel has [C, ...] and its likely constant [C].

        As the host would run them. Raises NotCaptured when they can't be had.
        """


def rebuilt(block: nn.Module, containers: list[nn.Module], layers: list[nn.Module]) -> Judgement:
    """Of a block whose layers are not the ones that pruning knows."""
    return Judgement(f"rebuilt a {type(block).__name__}", "", layers, Watch(containers).holds)


def instead(layer: nn.Module, kind: type[nn.Module]) -> str:
    same = isinstance(layer, kind)
    return "" if same else f"put a {type(layer).__name__} in the place of a {kind.__name__}"


def dropping(dropout: nn.Module) -> str:
    active = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p
    return "switched dropout on" if active else instead(dropout, nn.Dropout)


def first_of(found: Iterable[str]) -> str:
    return next(filter(None, found), "")


def prunes(keep: Tensor | None) -> bool:
    return keep is not None and not bool(keep.all())
