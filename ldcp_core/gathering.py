"""Corrections of all sites that have a reader, from runs of the dense model.

Each site is corrected by itself: its reader is fed what it would be fed if the site were pruned and
nothing before it, and what its output then lacks is predicted from that (`Regression`). On the demo
that is as good as feeding it what the whole pruned model makes, in one pass instead of one per
site, and better where much is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from torch import Tensor

from .blocks import Padding, Site, SoftGate
from .correction import Correction, Regression
from .gates import Gates
from .readers import See
from .sites import block_of, sites_of

#: one part in so many of what is seen is held out, to tell whether a correction holds elsewhere
HELD_OUT_EVERY = 5
#: bytes of sums that are gathered together, where nothing else is known
PASS_BYTES = 2**30


class WatchesReader(Protocol):
    """A block of a host."""

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        """Context in which each evaluation calls ``see`` with two maps of the reader of a site.

        ``gates`` has one for each site of the block. The maps are what the reader would be fed if
        its site were pruned and nothing before it, and what its output lacks then; zero where a
        later gate of the block replaces the output.
        """


class Pass:
    """The regressions of some sites that are gathered together.

    ``held_out`` says of what is seen next whether it only checks what was found.
    """

    def __init__(self, gates: Gates, sites: Sequence[str]) -> None:
        pruned = gates.pruned()
        self.held_out = False
        self._padding = gates.padding
        self._gates = {site: SoftGate.of(found) for site, found in pruned.items()}
        self._regressions = {site: Regression(pruned[site].keep) for site in sites}

    def __len__(self) -> int:
        return len(self._regressions)

    @contextmanager
    def watching(
        self, block: Callable[[str], WatchesReader], before: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Context in which the evaluations of the dense model are gathered.

        ``before`` is called before each layer's, which may take seconds on a CPU.
        """
        with ExitStack() as hooks:
            for site, regression in self._regressions.items():
                name = block_of(site)
                of_block = [self._gates.get(each) for each in sites_of(name)]
                see = self._adding(regression, before)
                watch = block(name).watch_reader(of_block, self._padding, see)
                hooks.enter_context(watch)
            yield

    def _adding(self, regression: Regression, before: Callable[[], None] | None) -> See:
        def add(fed: Tensor, missing: Tensor) -> None:
            if before is not None:
                before()
            regression.add(fed, missing, self.held_out)

        return add

    def solved(
        self, rank: int, between: Callable[[], None] | None = None
    ) -> Iterator[tuple[str, Correction | None]]:
        """Site -> correction, None where it does not hold; what was gathered is let go.

        ``between`` is called now and then.
        """
        for site in list(self._regressions):
            yield site, self._regressions.pop(site).correction(rank, between)


def correctable(gates: Gates) -> list[Site]:
    """The sites that a layer reads, and of which a part is pruned."""
    keep_sets = gates.keep_sets()
    return [
        site
        for site in gates.topology.all_sites()
        if site.reader is not None
        and site.name in keep_sets
        and bool(keep_sets[site.name].any())
        and not bool(keep_sets[site.name].all())
    ]


def passes(gates: Gates, most: int) -> list[Pass]:
    """The `correctable` sites, at least one at a time and no more sums than ``most`` bytes."""
    keep_sets = gates.keep_sets()
    parts: list[list[str]] = []
    size = 0
    for site in correctable(gates):
        features = int(keep_sets[site.name].sum()) * site.kind.reader_taps + 1
        needed = 4 * features * (features + site.block.outputs())
        if not parts or size + needed > most:
            parts.append([])
            size = 0
        parts[-1].append(site.name)
        size += needed
    return [Pass(gates, part) for part in parts]
