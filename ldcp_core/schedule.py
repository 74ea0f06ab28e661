"""When pruning is on: step ranges, percent ranges, and which step a sigma belongs to.

Samplers do not say which step they are in; they evaluate the model at a sigma. The step is
therefore computed from the sigma and the schedule it came from, never counted: counting breaks
with second-order samplers, batched conditions and cached evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .text import quoted

LONGEST_TEXT = 10_000  # characters
SHOWN = 12  # ranges in the text of a schedule
_RANGE = re.compile(r"^([0-9]{1,9})\s*(?:(-)\s*([0-9]{0,9}))?$")


class ScheduleError(ValueError):
    """A schedule that cannot be meant; the message says what to write instead."""


@dataclass(frozen=True)
class StepRange:
    """Sampler steps ``first`` to ``last``, 0-based and inclusive; ``last=None``: to the end."""

    first: int
    last: int | None

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first}-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


EVERY_STEP = StepRange(0, None)


@dataclass(frozen=True)
class PercentRange:
    """A stretch of the full denoising schedule, 0.0 (pure noise) to 1.0 (image)."""

    start: float
    end: float

    def __str__(self) -> str:
        return f"{self.start * 100:g}%-{self.end * 100:g}%"


@dataclass(frozen=True)
class Schedule:
    """A union of ranges. No range at all means: never prune.

    With a ``stage`` it prunes within that stretch alone. Its text is for people: of many ranges it
    names the first and counts the others.
    """

    ranges: tuple[StepRange | PercentRange, ...] = (EVERY_STEP,)
    stage: PercentRange | None = None

    @classmethod
    def steps(cls, text: str) -> Schedule:
        """Parse step ranges such as ``0-4, 10-19`` or ``5-``.

        >>> str(Schedule.steps("0-4, 10-19, 25-"))
        'steps 0-4, 10-19, 25-'

        Raises ScheduleError for an empty text, a reversed range or anything else.
        """
        if len(text) > LONGEST_TEXT:
            raise ScheduleError(
                f"step ranges of {len(text):,} characters cannot be meant: write at most "
                f"{LONGEST_TEXT:,}, such as '0-4, 10-19' or '5-'"
            )
        parts = [part.strip() for part in text.split(",")]
        if parts == [""]:
            raise ScheduleError(
                "the step ranges are empty: write ranges such as '0-4, 10-19' or '5-'; to prune "
                "in every step, leave the schedule unconnected"
            )
        return cls(tuple(_parse_range(part) for part in parts))

    @classmethod
    def percent(cls, start: float, end: float) -> Schedule:
        """Prune from ``start`` to ``end`` of the full schedule, both in [0, 1].

        Raises ScheduleError when the range is empty, reversed or out of bounds.
        """
        if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
            raise ScheduleError(
                f"percent range {start:g} to {end:g}: both ends must lie between 0.0 and 1.0"
            )
        if start >= end:
            raise ScheduleError(
                f"percent range {start:g} to {end:g} is {'empty' if start == end else 'reversed'}: "
                "the start must be smaller than the end"
            )
        return cls((PercentRange(start, end),))

    def during(self, stage: PercentRange | None) -> Schedule:
        """What of this schedule lies within a stage (None: all of it)."""
        return replace(self, stage=stage)

    def __or__(self, other: Schedule) -> Schedule:
        return Schedule(tuple(dict.fromkeys((*self.ranges, *other.ranges))))

    def __str__(self) -> str:
        steps = [str(r) for r in self.ranges if isinstance(r, StepRange)]
        percents = [str(r) for r in self.ranges if isinstance(r, PercentRange)]
        if "0-" in steps:
            return "all steps" if self.stage is None else str(self.stage)
        words = [f"steps {_some(steps, ', ')}"] if steps else []
        found = " + ".join(words + ([_some(percents, " + ")] if percents else [])) or "no step"
        return found if self.stage is None else f"{found} within {self.stage}"

    def is_active(
        self, step: int, sigma: float, percent_to_sigma: Callable[[float], float]
    ) -> bool:
        """Whether an evaluation at ``sigma``, belonging to ``step`` (-1: unknown), is pruned.

        ``percent_to_sigma`` is the host's map from the share of the full schedule to a sigma;
        a percent range is active iff sigma(end) <= sigma <= sigma(start).
        """

        def covers(r: PercentRange) -> bool:
            return percent_to_sigma(r.end) <= sigma <= percent_to_sigma(r.start)

        if self.stage is not None and not covers(self.stage):
            return False
        for r in self.ranges:
            if isinstance(r, StepRange):
                if r == EVERY_STEP or r.first <= step and (r.last is None or step <= r.last):
                    return True
            elif covers(r):
                return True
        return False

    def beyond(self, steps: int) -> list[StepRange]:
        """The step ranges that lie wholly past the last of ``steps`` steps: they never prune."""
        return [r for r in self.ranges if isinstance(r, StepRange) and r.first >= steps]


def _some(ranges: list[str], joint: str) -> str:
    more = [f"{len(ranges) - SHOWN} more"] if len(ranges) > SHOWN else []
    return joint.join([*ranges[:SHOWN], *more])


ALWAYS = Schedule()
NEVER = Schedule(())


def _parse_range(part: str) -> StepRange:
    match = _RANGE.match(part)
    if not match:
        raise ScheduleError(
            f"cannot read the step range {quoted(part)}: write single steps or ranges of 0-based "
            "steps, separated by commas, such as '0-4, 10-19' or '5-'"
        )
    first, dash, last = int(match[1]), match[2], match[3]
    if not dash:
        return StepRange(first, first)
    if not last:
        return StepRange(first, None)
    if int(last) < first:
        raise ScheduleError(f"step range {part!r} is reversed: write '{last}-{first}'")
    return StepRange(first, int(last))


def step_index(sigma: float, sigmas: Sequence[float]) -> int:
    """The 0-based step of ``sigmas`` (length steps + 1) that an evaluation at ``sigma`` belongs to.

    For a descending schedule: the number of later entries v with v + 1e-4·|v| >= sigma, at
    most the last step; mirrored for an ascending one. The first evaluation of every step of every
    schedule-based sampler is counted right; a corrector that lands on the next sigma (heun,
    dpm_2_ancestral) counts as the next step. A sigma that is not in the schedule never raises.

    >>> [step_index(s, [14.6, 7.0, 3.0, 0.0]) for s in (14.6, 10.0, 7.0, 5.0, 3.0, 0.1)]
    [0, 0, 1, 1, 2, 2]
    """
    steps = max(len(sigmas) - 1, 1)
    if len(sigmas) > 1 and sigmas[0] < sigmas[-1]:
        reached = sum(1 for v in sigmas[1:] if v <= sigma + 1e-4 * abs(sigma))
    else:
        reached = sum(1 for v in sigmas[1:] if v + 1e-4 * abs(v) >= sigma)
    return min(reached, steps - 1)
