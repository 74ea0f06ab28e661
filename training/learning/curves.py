"""What a fit draws at the end: the course of the losses, and the scores per site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from ldcp_core import THRESHOLD, Gates
from training.drawing import png, pyplot


@dataclass
class History:
    """One entry per optimizer step: scaled reconstruction loss, mean score, λ, sparsity."""

    target: float | None
    reconstruction: list[float] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    changed: int = 0  # channels whose state differs from the start
    heldout_deviation: float | None = None

    def add(self, reconstruction: float, l1: float, weight: float, sparsity: float) -> None:
        self.reconstruction.append(reconstruction)
        self.l1.append(l1)
        self.weight.append(weight)
        self.sparsity.append(sparsity)

    def row(self, step: int) -> tuple[float, float, float, float]:
        """The entry of one step."""
        return self.reconstruction[step], self.l1[step], self.weight[step], self.sparsity[step]

    def state_dict(self) -> dict[str, Any]:
        columns = (self.reconstruction, self.l1, self.weight, self.sparsity)
        return {"columns": torch.tensor(columns, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reconstruction, self.l1, self.weight, self.sparsity = state["columns"].tolist()

    def to_json(self, points: int = 20) -> dict[str, Any]:
        """A summary of at most ``points`` entries, and the end."""
        steps = len(self.sparsity)
        names = ("step", "reconstruction", "l1", "weight", "sparsity")
        shown = [
            dict(zip(names, (step, *self.row(step)), strict=True))
            for step in range(steps)
            if step % max(1, steps // points) == 0 or step == steps - 1
        ]
        return {"course": shown, "heldout_deviation": self.heldout_deviation}


def curves_png(history: History) -> bytes:
    """Loss, λ and sparsity over the steps, as a PNG."""
    plt = pyplot()
    figure, (losses, shares) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="tight")
    steps = range(len(history.sparsity))
    losses.plot(steps, history.reconstruction, lw=0.5, color="tab:blue", alpha=0.5)
    smoothed = list(accumulate(history.reconstruction, lambda mean, x: 0.95 * mean + 0.05 * x))
    losses.plot(steps, smoothed, color="tab:blue", label="reconstruction (scaled)")
    losses.plot(steps, history.weight, color="tab:red", lw=1, label="λ")
    losses.set_yscale("symlog", linthresh=1e-5)
    losses.set_ylabel("loss, λ")
    losses.legend()
    shares.plot(steps, history.sparsity, label="sparsity (score ≤ 0.5)")
    shares.plot(steps, history.l1, color="tab:green", lw=1, label="mean score (L1)")
    if history.target is not None:
        shares.axhline(history.target, color="gray", ls="--", lw=1, label="target sparsity")
    shares.set_ylim(0, 1)
    shares.set_xlabel("step")
    shares.legend()
    return png(figure)


def scores_png(gates: Gates) -> bytes:
    """The sorted scores of every site with the threshold, as a PNG."""
    plt = pyplot()
    columns = min(4, len(gates.scores))
    rows = -(-len(gates.scores) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.6 * rows), sharey=True, squeeze=False, layout="tight"
    )
    for axis, (site, score) in zip(axes.flat, gates.scores.items(), strict=False):
        ordered = sorted(score.tolist(), reverse=True)
        kept = sum(value > THRESHOLD for value in ordered)
        for start, end, color in ((0, kept, "tab:blue"), (kept, len(ordered), "tab:orange")):
            if end > start:  # one shape for all: a bar per channel takes minutes at full size
                axis.stairs(ordered[start:end], range(start, end + 1), fill=True, color=color)
        axis.axhline(THRESHOLD, color="gray", ls="--", lw=1)
        axis.set_title(f"{site}\n{kept} of {len(ordered)} kept", fontsize=8)
    for axis in list(axes.flat)[len(gates.scores) :]:
        axis.remove()
    axes[0][0].set_ylabel("score")
    return png(figure)
