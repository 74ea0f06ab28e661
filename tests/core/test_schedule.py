"""Step ranges as users write them, and the step that a sigma belongs to."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldcp_core import (
    ALWAYS,
    NEVER,
    PercentRange,
    Schedule,
    ScheduleError,
    StepRange,
    step_index,
)

quick = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def step_ranges(draw: st.DrawFn) -> StepRange:
    first = draw(st.integers(0, 10**6))
    return StepRange(first, draw(st.none() | st.integers(first, 10**6)))


def percent_to_sigma(percent: float) -> float:
    """A straight line from sigma 10 (0%) to sigma 0 (100%)."""
    return 10.0 * (1.0 - percent)


# --- writing and reading --------------------------------------------------------------------------


@quick
@given(st.lists(step_ranges(), min_size=1, max_size=6))
def test_ranges_survive_being_written_and_read(ranges: list[StepRange]) -> None:
    schedule = Schedule(tuple(ranges))
    assert Schedule.steps(", ".join(map(str, ranges))) == schedule
    if "0-" not in map(str, ranges):
        assert Schedule.steps(str(schedule).removeprefix("steps ")) == schedule


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("0-4, 10-19", (StepRange(0, 4), StepRange(10, 19))),
        ("5-", (StepRange(5, None),)),
        ("7", (StepRange(7, 7),)),
        ("  3 - 4 ,\t9 ", (StepRange(3, 4), StepRange(9, 9))),
        ("0-0", (StepRange(0, 0),)),
        ("007-010", (StepRange(7, 10),)),
        ("10-19,0-4", (StepRange(10, 19), StepRange(0, 4))),
    ],
)
def test_step_ranges_are_read(text: str, ranges: tuple[StepRange, ...]) -> None:
    assert Schedule.steps(text).ranges == ranges


@pytest.mark.parametrize("text", ["x" * 9_000, "1," * 10**6, "9" * 400, "\x1b[2J"])
def test_a_text_that_cannot_be_meant_is_not_echoed_at_length(text: str) -> None:
    with pytest.raises(ScheduleError, match="write .*such as '0-4, 10-19'") as error:
        Schedule.steps(text)
    assert len(str(error.value)) < 250 and str(error.value).isprintable()


def test_of_many_ranges_the_text_names_the_first() -> None:
    many = Schedule.steps(",".join(map(str, range(0, 1000, 2))))
    assert str(many) == "steps 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 488 more"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_no_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ScheduleError, match="empty.*'0-4, 10-19'.*unconnected"):
        Schedule.steps(text)


@pytest.mark.parametrize("text", ["4-0", "0-3, 19-10", "1-0"])
def test_a_reversed_range_is_refused_and_turned_round(text: str) -> None:
    with pytest.raises(ScheduleError, match="reversed: write '(0-4|10-19|0-1)'"):
        Schedule.steps(text)


@pytest.mark.parametrize(
    "text",
    [
        *("a", "-", "-5", "1-2-3", "1..4", "1,", ",1", "1,,2", "1;2", "0x10", "1e3", "1.5", "+1"),
        *("1 2", "1 -2 3", "nan", "5-x", "0\n-4x", "- 5", "0 to 4", "0–4", "٣-٥", "５-", "²"),
        *("9" * 20, "0-" + "9" * 20, "9" * 5000, "\0", "1_000"),
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ScheduleError, match="(?s)cannot read the step range.*such as '0-4, 10-19'"):
        Schedule.steps(text)


@quick
@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        ranges = Schedule.steps(text).ranges
    except ScheduleError:
        return
    assert ranges and set(text) <= set("0123456789-, \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0") | set(
        filter(str.isspace, text)
    )


@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        (0.5, 0.5, "empty"),
        (0.6, 0.2, "reversed"),
        (-0.1, 0.5, "between 0.0 and 1.0"),
        (0.0, 1.1, "between 0.0 and 1.0"),
        (math.nan, 1.0, "between 0.0 and 1.0"),
        (0.0, math.inf, "between 0.0 and 1.0"),
    ],
)
def test_a_percent_range_that_cannot_be_meant_is_refused(
    start: float, end: float, why: str
) -> None:
    with pytest.raises(ScheduleError, match=why):
        Schedule.percent(start, end)


def test_schedules_describe_themselves() -> None:
    assert str(ALWAYS) == "all steps"
    assert str(NEVER) == "no step"
    assert str(Schedule.steps("3, 5-8")) == "steps 3, 5-8"
    assert str(Schedule.percent(0.25, 0.5)) == "25%-50%"
    assert str(Schedule.steps("3") | Schedule.percent(0.25, 0.5)) == "steps 3 + 25%-50%"
    assert str(Schedule.steps("3, 0-")) == "all steps"
    late = PercentRange(0.5, 1.0)
    assert str(ALWAYS.during(late)) == "50%-100%"
    assert str(Schedule.steps("3, 5-8").during(late)) == "steps 3, 5-8 within 50%-100%"
    assert ALWAYS.during(None) == ALWAYS


# --- when it is active ----------------------------------------------------------------------------


def active_steps(schedule: Schedule, steps: int = 12) -> list[int]:
    # sigma 99 lies in no percent range
    return [s for s in range(steps) if schedule.is_active(s, 99.0, percent_to_sigma)]


def test_step_ranges_are_inclusive_and_count_from_zero() -> None:
    assert active_steps(Schedule.steps("0-2, 5, 9-")) == [0, 1, 2, 5, 9, 10, 11]
    assert active_steps(ALWAYS) == list(range(12))
    assert active_steps(NEVER) == []


@quick
@given(st.lists(step_ranges(), max_size=4), st.lists(step_ranges(), max_size=4), st.data())
def test_a_union_is_active_where_either_is(
    one: list[StepRange], other: list[StepRange], data: st.DataObject
) -> None:
    a, b = Schedule(tuple(one)), Schedule(tuple(other))
    edges = [e for r in one + other for e in (r.first, r.last) if e is not None]
    near = (
        st.sampled_from(edges).flatmap(lambda e: st.integers(e - 1, e + 1)) if edges else st.just(0)
    )
    step = data.draw(near)
    either = a.is_active(step, 1.0, percent_to_sigma) or b.is_active(step, 1.0, percent_to_sigma)
    assert (a | b).is_active(step, 1.0, percent_to_sigma) == either
    assert (b | a).is_active(step, 1.0, percent_to_sigma) == either


def test_a_union_with_itself_is_itself() -> None:
    schedule = Schedule.steps("0-4, 10-19") | Schedule.percent(0.0, 0.5)
    assert schedule | schedule == schedule
    assert schedule | NEVER == NEVER | schedule == schedule


def test_a_percent_range_is_active_between_its_sigmas_ends_included() -> None:
    schedule = Schedule.percent(0.25, 0.75)  # sigma from 7.5 down to 2.5
    sigmas = [10.0, 7.6, 7.5, 5.0, 2.5, 2.4, 0.0]
    found = [schedule.is_active(0, s, percent_to_sigma) for s in sigmas]
    assert found == [False, False, True, True, True, False, False]


def test_a_schedule_during_a_stage_is_active_where_both_are() -> None:
    late = PercentRange(0.5, 1.0)  # sigma from 5.0 down
    some, all_steps = Schedule.steps("1-2").during(late), ALWAYS.during(late)
    found = [some.is_active(step, 10.0 - 3 * step, percent_to_sigma) for step in range(4)]
    assert found == [False, False, True, False]  # sigma 10, 7, 4, 1
    assert all_steps.is_active(-1, 4.0, percent_to_sigma)  # without a sampler no step is known
    assert not all_steps.is_active(-1, 7.0, percent_to_sigma)


def test_a_union_of_steps_and_percents_is_active_in_both() -> None:
    schedule = Schedule.steps("1") | Schedule.percent(0.5, 1.0)
    assert schedule.is_active(1, 10.0, percent_to_sigma)
    assert schedule.is_active(0, 5.0, percent_to_sigma)
    assert not schedule.is_active(0, 10.0, percent_to_sigma)


def test_ranges_past_the_last_step_are_named() -> None:
    schedule = Schedule.steps("0-4, 19, 20, 20-30, 25-") | Schedule.percent(0.0, 1.0)
    assert schedule.beyond(20) == [StepRange(20, 20), StepRange(20, 30), StepRange(25, None)]
    assert schedule.beyond(26) == []
    assert ALWAYS.beyond(20) == NEVER.beyond(20) == []


# --- which step a sigma belongs to ----------------------------------------------------------------

DESCENDING = [14.6, 7.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("sigmas", "sigma", "step"),
    [
        # at, between, above and below the entries of a descending schedule
        (DESCENDING, 14.6, 0),
        (DESCENDING, 10.0, 0),
        (DESCENDING, 7.0, 1),
        (DESCENDING, 6.9, 1),
        (DESCENDING, 3.0, 2),
        (DESCENDING, 1.0, 3),
        (DESCENDING, 0.5, 3),
        (DESCENDING, 0.0, 3),
        (DESCENDING, 99.0, 0),
        # truncated: no final zero, three sigmas are two steps
        ([14.6, 7.0, 3.0], 14.6, 0),
        ([14.6, 7.0, 3.0], 7.0, 1),
        ([14.6, 7.0, 3.0], 3.0, 1),
        ([14.6, 7.0, 3.0], 1.0, 1),
        # ascending (unsampling), with and without a leading zero
        ([0.0, 1.0, 3.0, 7.0], 0.0, 0),
        ([0.0, 1.0, 3.0, 7.0], 0.5, 0),
        ([0.0, 1.0, 3.0, 7.0], 1.0, 1),
        ([0.0, 1.0, 3.0, 7.0], 3.0, 2),
        ([0.0, 1.0, 3.0, 7.0], 7.0, 2),
        ([0.03, 1.0, 3.0], 0.03, 0),
        ([0.03, 1.0, 3.0], 1.0, 1),
        # an entry that is there twice belongs to the later of its steps
        ([9.0, 5.0, 5.0, 2.0, 0.0], 9.0, 0),
        ([9.0, 5.0, 5.0, 2.0, 0.0], 5.0, 2),
        ([9.0, 5.0, 5.0, 2.0, 0.0], 2.0, 3),
        # degenerate schedules never raise
        ([14.6, 0.0], 14.6, 0),
        ([14.6], 14.6, 0),
        ([], 14.6, 0),
        ([0.0, 0.0], 0.0, 0),
        (DESCENDING, math.nan, 0),
        (DESCENDING, math.inf, 0),
        (DESCENDING, -1.0, 3),
    ],
)
def test_a_sigma_belongs_to_its_step(sigmas: list[float], sigma: float, step: int) -> None:
    assert step_index(sigma, sigmas) == step


@st.composite
def schedules(draw: st.DrawFn) -> list[float]:
    """Strictly descending: neighbours at least 0.05% apart (1,000 steps of SD1.5 are: 0.3%)."""
    ratios = draw(st.lists(st.floats(1.0005, 3.0), min_size=1, max_size=60))
    sigmas = [draw(st.floats(0.01, 1.0))]
    for ratio in ratios:
        sigmas.append(sigmas[-1] * ratio)
    assume(sigmas[-1] < 1e6)
    return sigmas[::-1] + ([0.0] if draw(st.booleans()) else [])


@quick
@given(schedules(), st.sampled_from([0.0, 1e-5, -1e-5]))
def test_the_first_evaluation_of_every_step_is_right(sigmas: list[float], noise: float) -> None:
    """Also when the sigma went through half precision sums on its way: 1e-5 relative."""
    steps = len(sigmas) - 1
    found = [step_index(sigma * (1 + noise), sigmas) for sigma in sigmas[:-1]]
    assert found == list(range(steps))


@quick
@given(schedules(), st.sampled_from([0.0, 1e-5, -1e-5]))
def test_the_same_holds_for_ascending_schedules(sigmas: list[float], noise: float) -> None:
    ascending = sigmas[::-1]
    found = [step_index(sigma * (1 + noise), ascending) for sigma in ascending[:-1]]
    assert found == list(range(len(ascending) - 1))


@quick
@given(schedules(), st.data())
def test_evaluations_inside_a_step_belong_to_it(sigmas: list[float], data: st.DataObject) -> None:
    """Second-order samplers evaluate between two entries; correctors at the next one."""
    step = data.draw(st.integers(0, len(sigmas) - 2))
    share = data.draw(st.floats(0.0, 0.7))
    sigma = sigmas[step] + share * (sigmas[step + 1] - sigmas[step])
    assert step_index(sigma, sigmas) == step
    corrector = step_index(sigmas[step + 1], sigmas)
    assert corrector == min(step + 1, len(sigmas) - 2)


@quick
@given(schedules(), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_lower_sigma_is_never_an_earlier_step(
    sigmas: list[float], one: float, other: float
) -> None:
    lower, higher = sorted((one, other))
    assert step_index(lower, sigmas) >= step_index(higher, sigmas)
