"""What fits into a time budget: so many trials, then the confirmation of the best.

    time left ≥ trials × seconds of a trial / workers + seconds of the confirmation

Arithmetic only: no clock and no files.  A shorter trial would change ``Durations.trial`` and nothing else, so trials of
several lengths belong there.

Owns the choice of the confirmation and the number of trials.  Does not own the measured seconds
(``hpo.study.pace``), the time used so far (``hpo.study.worked``) or the wording (``hpo.terminal``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONFIRM_SHARE = 1 / 3  # of the whole budget, at most so much is planned for the confirmation (assumed)
SPARE = 1.1  # of its expected seconds are kept for it: a machine that runs 12 % slower meanwhile was measured
REPLANNED = 0.2  # a change of the number of trials that is said
HOUR = 3600.0


@dataclass(frozen=True)
class Round:
    """One confirmation: trial 0 and the best ``top`` trials, each trained with so many new seeds."""

    top: int
    seeds: int

    @property
    def runs(self) -> int:
        return (self.top + 1) * self.seeds


# From the one that hpo confirm makes by itself to the least: the best and trial 0, once each.
ROUNDS = (Round(3, 2), Round(2, 2), Round(1, 2), Round(2, 1), Round(1, 1))
LEAST = ROUNDS[-1]


@dataclass(frozen=True)
class Durations:
    """Expected seconds.  ``trial``: of the mean trial; ``likely``: of one that is longer than the mean by the spread;
    ``longest``: of the longest in the space.  ``start``: until the first run of the confirmation begins; ``zero``: of
    a run of trial 0's settings; ``run``: of another."""

    trial: float
    likely: float
    longest: float
    start: float
    zero: float
    run: float

    def confirmation(self, what: Round) -> float:
        """With what is kept to spare."""
        return SPARE * (self.start + what.seeds * (self.zero + what.top * self.run))


@dataclass(frozen=True)
class Plan:
    """``trials``: of the study in the end.  ``starts``: whether one more can begin now."""

    trials: int
    starts: bool
    round: Round
    durations: Durations

    @property
    def confirm_seconds(self) -> float:
        return self.durations.confirmation(self.round)


def plan(
    whole: float, left: float, durations: Durations, *, taken: int = 0, most: int = 10_000, workers: int = 1
) -> Plan:
    """What fits into ``left`` of ``whole`` seconds.

    ``taken``: trials that are finished or running.  ``most``: the largest number of trials.  A trial begins only if
    one of a likely length leaves the time for the planned confirmation, and the longest the time for the least.
    """
    fits = (r for r in possible(most - 1) if durations.confirmation(r) <= CONFIRM_SHARE * whole)
    chosen = next(fits, LEAST)
    reserve = durations.confirmation(chosen)
    room = left - reserve
    needed = max(durations.likely, durations.longest - (reserve - durations.confirmation(LEAST)))
    more = 0 if room < needed else workers * (1 + math.floor((room - needed) / max(durations.trial, 1e-9)))
    trials = max(taken, min(most, taken + more))
    return Plan(trials, trials > taken, chosen, durations)


def least_hours(used: float, durations: Durations) -> float:
    """The smallest budget, in hours with two digits, that holds trial 0, one more trial and the least confirmation."""
    seconds = used + durations.zero + durations.longest + durations.confirmation(LEAST)
    digits = 2 - math.floor(math.log10(seconds / HOUR)) - 1
    return math.ceil(seconds / HOUR * 10**digits) / 10**digits


def possible(others: int, at_most: Round = ROUNDS[0]) -> tuple[Round, ...]:
    """The confirmations of a study with so many trials beside trial 0, the largest first.  ``at_most``: the one that
    was begun."""
    rounds = ROUNDS[ROUNDS.index(at_most) :]
    return tuple(one for one in rounds if one.top <= others or one == LEAST)


def fitting(left: float, cost: Callable[[Round], float], rounds: Sequence[Round] = ROUNDS) -> Round | None:
    """The largest confirmation that fits with something to spare; None if not even the least does."""
    return next((one for one in rounds if SPARE * cost(one) <= left), None)


def is_replanned(before: int, now: int) -> bool:
    """Whether the number of trials changed by enough to say so."""
    return abs(now - before) > REPLANNED * before
