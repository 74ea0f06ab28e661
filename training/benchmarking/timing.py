"""A fair clock, and the rule when a ratio may be printed.

Machines drift, so variants are timed in rounds: every round runs each variant once, in random
order, and a variant is only ever compared with the dense run of the same round. A ratio is printed
only if the 95% sign-based confidence interval of the median paired ratio excludes 1. That interval
takes no distribution for granted: with n rounds it reaches from the k-th smallest to the k-th
largest ratio, k as large as the binomial distribution allows (Hollander & Wolfe, "Nonparametric
Statistical Methods", section 3.6). Below six rounds there is no such interval and no ratio.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from training.console import progress

CONFIDENCE = 0.95
CRITERION = (
    "Each round times every variant once, in random order. A ratio is the median over the rounds "
    "of variant / dense of the same round, with its 95% sign-based confidence interval. Where that "
    'interval contains 1 no ratio is given: "within noise (±x%)" says how far the interval '
    "reaches. Fewer than six rounds give no interval and so no ratio. Of twenty comparisons "
    "without any effect one may still get a ratio by chance."
)
DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """One way of computing the same thing.

    ``evaluate`` is what the clock sees; the context of ``prepare`` is entered and left outside
    of it. ``weight_bytes`` are counted from the live tensors that stand in for the gated blocks'
    layers. The context of ``park`` moves the weights away that this variant does not need.
    """

    name: str
    changes: str
    evaluate: Callable[[], Any]
    prepare: Callable[[], AbstractContextManager[Any]] = nullcontext
    park: Callable[[], AbstractContextManager[Any]] = nullcontext
    weight_bytes: int = 0


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on the device; a CPU never has anything queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[Variant], float]:
    """A function that runs a variant once and returns the seconds it took."""

    def seconds(variant: Variant) -> float:
        with variant.prepare():
            synchronize(device)
            start = time.perf_counter()
            variant.evaluate()
            synchronize(device)
            return time.perf_counter() - start

    return seconds


def interleaved(
    variants: Sequence[Variant], rounds: int, seed: int, seconds: Callable[[Variant], float]
) -> dict[str, list[float]]:
    """Variant name -> seconds of each round; every round runs all variants in a random order."""
    order, generator = list(variants), random.Random(seed)
    found: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in progress(range(rounds), "timing", unit="round"):
        generator.shuffle(order)
        for variant in order:
            found[variant.name].append(seconds(variant))
    return found


def sign_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% sign-based confidence interval of the median; None for fewer than six values.

    >>> sign_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (1.0, 6.0)
    >>> sign_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    True
    """
    n, ordered = len(values), sorted(values)
    k, outside = 0, 0.0  # outside: chance that the median lies beyond the k-th value, both sides
    while k < n // 2:
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - CONFIDENCE:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Per variant: raw seconds, median, median absolute deviation, and the ratio to dense.

    ``ratio`` is None where the criterion refuses it; ``interval`` is there whenever it exists.
    """
    dense = times[DENSE]
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = [a / b for a, b in zip(seconds, dense, strict=True)]
        interval = None if name == DENSE else sign_interval(ratios)
        clear = interval is not None and not interval[0] <= 1.0 <= interval[1]
        found[name] = {
            "seconds": list(seconds),
            "median": median,
            "deviation": statistics.median(abs(value - median) for value in seconds),
            "ratio": statistics.median(ratios) if clear else None,
            "interval": None if interval is None else list(interval),
        }
    return found
