"""The ways to prune that Compare Pruning Shares is asked for, read from its two texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..ldcp_core import ALWAYS, Schedule, ScheduleError
from ..ldcp_core.text import quoted
from .inputs import check_text

#: what stands among the shares for the channels that the gates were trained to prune
LEARNED = "learned"
#: of one comparison, the full model's among them
MOST_IMAGES = 50


@dataclass(frozen=True)
class Variant:
    """One way to prune; ``share`` None: as learned."""

    share: float | None
    schedule: Schedule

    def __str__(self) -> str:
        return LEARNED if self.share is None else f"share {self.share:g}"


def parse_variants(shares: Any, schedules: Any, steps: int | None = None) -> list[Variant]:
    """Every share at every schedule, schedule by schedule.

    ``steps`` is the length of the run, where it is known. Raises ValueError for what cannot be
    read, what would prune nothing, and more than `MOST_IMAGES` images.
    """
    columns, rows = parse_shares(shares), parse_schedules(schedules, steps)
    images = len(columns) * len(rows) + 1
    if images > MOST_IMAGES:
        raise ValueError(
            f"LDCP: {len(columns)} shares at {len(rows)} schedules and the full model make "
            f"{images:,} images; write fewer: at most {MOST_IMAGES} fit into one comparison"
        )
    return [Variant(share, schedule) for schedule in rows for share in columns]


def parse_shares(text: Any) -> list[float | None]:
    """Shares above 0 in the order they are written, each once; None for `LEARNED`."""
    check_text("shares", text)
    found = dict.fromkeys(_share(word) for word in re.split(r"[\s,;]+", text) if word)
    found.pop(0.0, None)  # the full model, which is always there
    if not found:
        raise ValueError(
            "LDCP: shares names nothing to compare with the full model; write shares of the gated "
            "channels such as '0.2, 0.4', or 'learned' for what the gates were trained to prune"
        )
    return list(found)


def _share(word: str) -> float | None:
    if word.casefold() == LEARNED:
        return None
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise ValueError(
            f"LDCP: shares has {quoted(word)}; write numbers from 0.0 to 1.0 with a point, such as "
            "'0.2, 0.4', or 'learned' for what the gates were trained to prune"
        )
    return share


def parse_schedules(text: Any, steps: int | None = None) -> list[Schedule]:
    """A schedule per line that is not empty, each once; without one the schedule of all steps."""
    check_text("schedules", text)
    found: dict[Schedule, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found[_schedule(line, steps)] = None
            except ScheduleError as error:
                raise ValueError(f"LDCP: schedules, line {number}: {error}") from error
    return list(found) or [ALWAYS]


def _schedule(line: str, steps: int | None) -> Schedule:
    schedule = Schedule.steps(line)
    if steps is not None and len(schedule.beyond(steps)) == len(schedule.ranges):
        raise ScheduleError(
            f"{schedule} lies past the last of {steps} steps (0 to {steps - 1}) and prunes "
            "nothing; write steps of this run"
        )
    return schedule
