"""What is said about a sample of numbers: summaries, intervals, ranks, parts of the schedule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: parts of the timestep schedule whose losses are reported by themselves
SECTIONS = 5
RESAMPLES = 2000
CONFIDENCE = 0.95


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, median, minimum, maximum and standard deviation (nan where values are infinite)."""
    with np.errstate(invalid="ignore"):
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "deviation": deviation,
    }


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron & Tibshirani 1993, §13.3)."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(values), (RESAMPLES, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    return float(low), float(high)


def ranks(deviations: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, int]:
    """1 for the best; a model whose paired difference to the best of a rank may be zero shares it.

    The samples are the same for all models, so it is the mean of the differences that is
    bootstrapped.
    """
    ordered = sorted(deviations, key=lambda name: float(deviations[name].mean()))
    found: dict[str, int] = {}
    best = None
    for place, name in enumerate(ordered, 1):
        if best is not None:
            low, _ = bootstrap(deviations[name] - deviations[best], seed)
            if low <= 0:
                found[name] = found[best]
                continue
        best, found[name] = name, place
    return found


def by_timestep(values: np.ndarray, timesteps: np.ndarray, steps: int) -> list[float | None]:
    """Mean of ``values`` in each of the `SECTIONS` of the schedule; None where none fell."""
    part = np.minimum(timesteps * SECTIONS // steps, SECTIONS - 1)
    return [float(values[part == p].mean()) if (part == p).any() else None for p in range(SECTIONS)]
