"""What a model's own activations say about its channels, gathered while it runs.

Two things are learned from watching: the mean of every gated channel, which stands in for it when
it is pruned, and how much is lost when only the mean is left. Activations are never kept: each
evaluation is reduced to a count, a mean and a sum of squares per channel, and these are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .criteria import fluctuation


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation from the mean of samples [..., C], per channel.

    ``mean`` and ``m2`` are float64 [C] on the CPU. Moments of parts add up to those of the whole.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, channels: int = 1) -> Moments:
        """Of all values of ``x``, whose dimension ``channels`` counts channels.

        Deviations are taken from the mean of ``x`` itself, in float32 at least, where ``x`` lies:
        E[x²] − m² would cancel where a channel varies little about a large mean.
        """
        rows = x.detach().movedim(channels, 0).flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        mean = rows.mean(1)
        m2 = (rows - mean[:, None]).square().sum(1)
        return cls(rows.shape[1], mean.cpu().double(), m2.cpu().double())

    def __add__(self, other: Moments) -> Moments:
        """Of the samples of both (Chan, Golub and LeVeque 1983, The American Statistician 37)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        m2 = self.m2 + other.m2 + difference.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean, float64 [C]."""
        return self.m2 / self.count


@dataclass
class Calibration:
    """What one run or several have shown of some sites.

    ``outputs[site]`` are the moments of what a constant would replace. Where one layer reads a
    site's channels, ``inputs[site]`` are the moments of what that layer read, and
    ``columns[site]`` those of the squared norms of the weights it read them with, one sample per
    evaluation; a residual channel is read by the residual sum, with weight one. ``runs`` are what
    was run, in the host's own words, for one that runs them once more.
    """

    outputs: dict[str, Moments] = field(default_factory=dict)
    inputs: dict[str, Moments] = field(default_factory=dict)
    columns: dict[str, Moments] = field(default_factory=dict)
    evaluations: int = 0
    runs: list[Any] = field(default_factory=list)

    def saw_output(self, site: str, x: Tensor, channels: int = 1) -> None:
        """``x`` came out where a constant would stand; its dimension ``channels`` is the site's."""
        _add(self.outputs, site, Moments.of(x, channels))

    def saw_input(self, site: str, x: Tensor, channels: int = 1) -> None:
        """The layer that reads the site's channels got ``x``."""
        _add(self.inputs, site, Moments.of(x, channels))

    def read_with(self, site: str, columns: Tensor) -> None:
        """In one evaluation that layer's weights had these squared `column_norms` [C]."""
        _add(self.columns, site, Moments.of(columns[None]))

    def __add__(self, other: Calibration) -> Calibration:
        """What both have seen. Raises ValueError where they watched different sites."""
        if self._widths() != other._widths():
            raise ValueError(
                f"two calibrations of different layers, of {_described(self._widths())} and of "
                f"{_described(other._widths())}, can't be joined; use the same scope, and models "
                "of the same architecture, for both"
            )

        def both(mine: dict[str, Moments], theirs: dict[str, Moments]) -> dict[str, Moments]:
            return {site: mine[site] + theirs[site] for site in mine}

        return Calibration(
            both(self.outputs, other.outputs),
            both(self.inputs, other.inputs),
            both(self.columns, other.columns),
            self.evaluations + other.evaluations,
            self.runs + other.runs,
        )

    def _widths(self) -> dict[str, int]:
        return {site: seen.mean.numel() for site, seen in self.outputs.items()}

    def constants(self) -> dict[str, Tensor]:
        """Site -> mean of each channel, float32 [C]: of all constants the nearest to it."""
        return {site: seen.mean.float() for site, seen in self.outputs.items()}

    def importances(self) -> dict[str, Tensor]:
        """Site -> `fluctuation` of each channel, float32 [C]."""
        return {
            site: fluctuation(self.inputs[site].variance, self.columns[site].mean)
            if site in self.inputs
            else fluctuation(seen.variance)
            for site, seen in self.outputs.items()
        }


def _described(widths: dict[str, int]) -> str:
    return f"{len(widths)} site{'s' * (len(widths) != 1)} ({sum(widths.values()):,} channels)"


def _add(moments: dict[str, Moments], site: str, new: Moments) -> None:
    known = moments.get(site)
    moments[site] = new if known is None else known + new
