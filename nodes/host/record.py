"""What a run of a patched model really did, as counted while it ran (the report shows it)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class RunRecord:
    """One run: which evaluations were pruned, and what lay on the compute device meanwhile.

    Bytes concern weights and biases of the gated layers that the run has pruned: all of them
    before, and what was resident of them, in full or compact form, during the pruned evaluations
    (the most of any).
    """

    #: whether the host announced a run; a node may also evaluate the model without a sampler
    sampled: bool = False
    #: steps of the sampler's schedule; None when no evaluation said
    steps: int | None = None
    #: indices of the steps with at least one pruned evaluation
    pruned_steps: set[int] = field(default_factory=set)
    #: begun, also one that failed
    evaluations: int = 0
    pruned_evaluations: int = 0
    #: whether the latest evaluation was pruned
    pruning: bool = False
    #: where the model computes, e.g. "cuda:0"
    device: str = ""
    full_bytes: int = 0
    resident_bytes: int = 0
    #: why full weights stayed on the compute device; empty when they left it
    kept_full: str = ""
    #: of the clock `time.monotonic`, seconds
    began: float = field(default_factory=time.monotonic)
    #: what the user should know about this run, one sentence each
    notes: list[str] = field(default_factory=list)

    #: (what happens to blocks, why) -> where among the notes it is, and the blocks
    _blocks: dict[tuple[str, str], tuple[int, list[str]]] = field(default_factory=dict)

    def note(self, sentence: str) -> None:
        """Note what the user should know; what is noted already is not noted again."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def note_block(self, name: str, effect: str, cause: str) -> None:
        """Note that a block "runs ``effect``, because ``cause``": once for all with the same."""
        place, blocks = self._blocks.setdefault((effect, cause), (len(self.notes), []))
        if name in blocks:
            return
        blocks.append(name)
        self.notes[place : place + 1] = [f"{_listed(blocks)} {effect}, because {cause}"]

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began

    @property
    def saved_bytes(self) -> int:
        """Bytes by which the gated layers took less room (negative: more)."""
        return self.full_bytes - self.resident_bytes


def _listed(blocks: list[str], limit: int = 3) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c", "d", "e"])
    ('a runs', 'a, b, c and 2 more run')
    """
    more = [f"{len(blocks) - limit} more"] if len(blocks) > limit else []
    *most, last = blocks[:limit] + more
    return f"{', '.join(most)} and {last} run" if most else f"{last} runs"
