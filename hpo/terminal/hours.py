"""Lines about a time budget (``--hours``): the plan, a new plan, and what is used and left.

Owns the wording.  Every number comes from ``hpo.study``.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from hpo.terminal.text import clock

if TYPE_CHECKING:
    from hpo.study import Plan, Round


def plan_line(
    hours: float, plan: Plan, trials: int, left: float, workers: int, most: int, now: datetime
) -> str:
    """The plan that is shown before the first trial."""
    among = f" in {workers} processes" if workers > 1 else ""
    limit = ", the limit of --trials" if trials == most else ""
    return (
        f"plan for {hours_words(hours)}: {count(trials, 'trial')}{limit}, each about "
        f"{clock(plan.durations.trial)}{among}, then the confirmation: {round_words(plan.round)}, about "
        f"{clock(plan.confirm_seconds)}; ends at about {time_of_day(now, left)}"
    )


def replan_line(before: int, expected: float, plan: Plan, left: float, workers: int) -> str:
    """The number of trials has changed.  ``expected``: seconds of a trial in the plan before."""
    among = f" in each of {workers} processes" if workers > 1 else ""
    return (
        f"new plan: a trial takes about {clock(plan.durations.trial)} (planned: {clock(expected)}){among}, so "
        f"{count(plan.trials, 'trial')} instead of {before}; {clock(left)} left, of it about "
        f"{clock(plan.confirm_seconds)} for the confirmation"
    )


def too_small_line(hours: float, least: float) -> str:
    return (
        f"warning: two trials and their confirmation do not fit into {hours_words(hours)}; they need about "
        f"--hours {least:g}"
    )


def budget_line(hours: float, used: float) -> str:
    """What is used and what is left of a budget."""
    left = 3600 * hours - used
    rest = f"{clock(left)} left" if left > 0 else "nothing left"
    return f"time budget: {hours_words(hours)}; {clock(used)} used, {rest}"


def round_words(what: Round) -> str:
    best = "the best trial" if what.top == 1 else f"the best {what.top} trials"
    seeds = "a new seed" if what.seeds == 1 else f"{what.seeds} new seeds each"
    return f"trial 0 and {best} again with {seeds} ({what.runs} runs)"


def hours_words(hours: float) -> str:
    return f"{hours:g} hour{'s'[: hours != 1]}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"


def time_of_day(now: datetime, seconds: float) -> str:
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%-d %b %H:%M}"
