"""What fits into a time budget: a small one, a slow machine, several processes.  A number stands for the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpo.study.hours import (
    LEAST,
    ROUNDS,
    SPARE,
    Durations,
    Plan,
    Round,
    fitting,
    is_replanned,
    least_hours,
    plan,
    possible,
)

DURATIONS = Durations(trial=17, likely=20, longest=22, start=10, zero=25, run=30)


def lived(
    whole: float, seconds: Callable[[int], float], estimate: Durations, *, used: float = 0.0, workers: int = 1
) -> tuple[list[float], Plan]:
    """A search as a clock without sleeping: when each trial ended, and the plan after the last one.  After a trial,
    the estimate is what it took."""
    ends, busy, durations = [], [used] * workers, estimate
    while True:
        now = min(busy)
        running = sum(end > now for end in busy)
        found = plan(whole, whole - now, durations, taken=len(ends), workers=workers)
        if not (found.starts or not ends):
            busy.remove(now)
            if not busy:
                return ends, found
            continue
        assert running < workers
        took = seconds(len(ends))
        busy[busy.index(now)] = now + took
        ends.append(now + took)
        slower = took / estimate.trial
        durations = Durations(*(slower * getattr(estimate, name) for name in estimate.__dataclass_fields__))


def test_the_plan_is_kept_where_the_estimate_is_right() -> None:
    whole, first = 360.0, plan(360.0, 340.0, DURATIONS)
    ends, last = lived(whole, lambda n: DURATIONS.trial, DURATIONS, used=20.0)
    assert first.round == last.round and first.confirm_seconds <= whole / 3
    assert len(ends) == first.trials
    assert ends[-1] + last.confirm_seconds <= whole
    assert ends[-1] + last.confirm_seconds > whole - 2 * DURATIONS.trial  # and the time is used


def test_the_largest_confirmation_that_takes_a_third_at_most_is_planned() -> None:
    for chosen, larger in zip(ROUNDS[1:], ROUNDS, strict=False):
        whole = 3 * DURATIONS.confirmation(chosen)
        assert plan(whole, whole, DURATIONS).round == chosen
        assert DURATIONS.confirmation(larger) > DURATIONS.confirmation(chosen)
    assert plan(1e6, 1e6, DURATIONS).round == ROUNDS[0]
    assert plan(1.0, 1.0, DURATIONS).round == LEAST


def test_trials_is_an_upper_limit_and_what_has_begun_counts() -> None:
    assert plan(1e4, 1e4, DURATIONS, most=5).trials == 5
    full = plan(1e4, 1e4, DURATIONS, taken=5, most=5)
    assert full.trials == 5 and not full.starts
    assert plan(1e4, 1e4, DURATIONS, taken=7, most=5).trials == 7


def test_a_budget_that_is_too_small_starts_nothing_and_its_least_size_is_named() -> None:
    small = plan(60.0, 50.0, DURATIONS)
    assert small.trials == 0 and not small.starts
    hours = least_hours(10.0, DURATIONS)
    enough = 3600 * hours - 10
    assert plan(3600 * hours, enough - DURATIONS.zero, DURATIONS, taken=1).starts
    assert plan(0.8 * 3600 * hours, 0.8 * 3600 * hours - 10 - DURATIONS.zero, DURATIONS, taken=1).trials == 1
    assert hours == pytest.approx(float(f"{hours:.2g}"))


@pytest.mark.parametrize("slower", [1.5, 3.0])
def test_a_slower_machine_gets_a_new_plan_and_the_limit_is_kept(slower: float) -> None:
    whole = 1200.0
    first = plan(whole, whole, DURATIONS)
    ends, last = lived(whole, lambda n: slower * DURATIONS.trial, DURATIONS)
    assert is_replanned(first.trials, len(ends)) and len(ends) < first.trials
    assert 0.8 * whole < ends[-1] + last.confirm_seconds <= whole


def test_no_trial_begins_that_would_end_after_the_limit_even_the_longest() -> None:
    durations = Durations(trial=10, likely=15, longest=100, start=5, zero=10, run=15)
    for left in range(0, 400, 7):
        found = plan(400.0, left, durations, taken=3)
        if found.starts:
            assert left - durations.longest >= durations.confirmation(LEAST)
            assert left - durations.likely >= found.confirm_seconds


def test_two_processes_plan_twice_the_trials() -> None:
    whole = 1200.0
    one, two = (plan(whole, whole, DURATIONS, workers=n) for n in (1, 2))
    assert two.trials == 2 * one.trials and two.round == one.round
    ends, last = lived(whole, lambda n: DURATIONS.trial, DURATIONS, workers=2)
    assert len(ends) == two.trials and max(ends) + last.confirm_seconds <= whole


def test_the_largest_confirmation_that_fits_never_more_than_the_one_begun() -> None:
    def cost(what: Round) -> float:
        return DURATIONS.confirmation(what) / SPARE

    assert fitting(1e6, cost) == ROUNDS[0]
    begun = possible(9, Round(2, 1))
    assert fitting(1e6, cost, begun) == Round(2, 1) and fitting(SPARE * cost(LEAST), cost, begun) == LEAST
    assert fitting(1e6, cost, possible(2)) == Round(2, 2) and possible(0) == (LEAST,)
    assert fitting(SPARE * cost(LEAST) - 1, cost) is None


def test_a_new_plan_is_said_beyond_a_fifth() -> None:
    assert not is_replanned(10, 12) and not is_replanned(10, 8)
    assert is_replanned(10, 13) and is_replanned(10, 7)
