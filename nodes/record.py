"""What a run of a patched model really did, as counted while it ran (the report shows it)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RunRecord:
    """One run: which evaluations were pruned, and what lay on the compute device meanwhile.

    Bytes concern weights and biases of the gated layers that the run has pruned: all of them
    before, and what was resident of them, in full or compact form, during the pruned evaluations
    (the most of any).
    """

    #: steps of the sampler's schedule; None when the model was evaluated without a sampler
    steps: int | None = None
    #: indices of the steps with at least one pruned evaluation
    pruned_steps: set[int] = field(default_factory=set)
    evaluations: int = 0
    pruned_evaluations: int = 0
    #: where the model computes, e.g. "cuda:0"
    device: str = ""
    full_bytes: int = 0
    resident_bytes: int = 0
    #: why full weights stayed on the compute device; empty when they left it
    kept_full: str = ""
    #: what the user should know about this run, one sentence each
    notes: list[str] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int:
        """Bytes by which the gated layers took less room (negative: more)."""
        return self.full_bytes - self.resident_bytes
