"""A search within a time budget: the plan before the first trial, kept to and made anew as trials are measured.

Owns what is measured for the plan and when it is said.  Does not own the arithmetic (``hpo.study.hours``), the time
used so far (``hpo.study.worked``) or the confirmation (``hpo.confirm.within``).
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from hpo.search.samplers import startup_trials
from hpo.study import (
    TOTAL,
    Durations,
    Pace,
    Plan,
    Say,
    Stored,
    Worked,
    is_replanned,
    least_hours,
    measured,
    plan,
    standing,
    stored_hours,
)
from hpo.terminal import budget_line, hours_words, plan_line, replan_line, too_small_line

if TYPE_CHECKING:
    import optuna

    from hpo.search.cost import Cost
    from hpo.search.workbench import Workbench

ANY_NUMBER = 10_000  # trials of a study without --trials


class Within:
    """The budget of one process's search.  ``most``: the largest number of trials."""

    def __init__(
        self,
        study: optuna.Study,
        bench: Workbench,
        worked: Worked,
        hours: float,
        most: int,
        load_seconds: float,
        say: Say,
    ) -> None:
        self.study, self.bench, self.folder, self.worked = study, bench, bench.folder, worked
        self.hours, self.most, self.say = hours, most, say
        self.read()
        self.trials = 0  # of the study in the end, as planned
        self._load_seconds = load_seconds
        self._said: Plan | None = None

    def read(self) -> None:
        """What is stored with the study: another worker may have begun meanwhile."""
        self.before = stored_hours(self.study)
        self.known = (
            self.before.pace if self.before else None
        )  # estimated by an earlier command or another worker

    @property
    def is_planned(self) -> bool:
        """Whether the number of trials is known: without the seconds of a trial it is not, before the first one."""
        return self._said is not None

    def begin(self, cost: Cost) -> list[str]:
        """Make the plan, once the first estimate is there: the lines that say it."""
        self.cost, self.known = cost, cost.pace
        now = standing(self.study, 0)
        taken = now.complete + now.running
        lines, used, left = [], self.worked.used, self.worked.left
        if self.before is not None and self.before.hours != self.hours:
            was, now_is = hours_words(self.before.hours), hours_words(self.hours)
            lines.append(f"the time budget was {was} and is {now_is} now")
        if used - self.worked.own > 1:
            lines.append(budget_line(self.hours, used))
        found = self._plan(taken)
        self.trials = max(1, taken)
        if found is None:
            return [*lines, "the time of a trial is unknown; the plan is made after the first one"]
        self._said, self.trials = found, max(1, found.trials)
        if taken == 0 and found.trials < 2 <= self.most:
            lines.append(too_small_line(self.hours, least_hours(used, found.durations)))
        when = datetime.now().astimezone()
        return [
            *lines,
            plan_line(self.hours, self._said, self.trials, left, self.worked.searching, self.most, when),
        ]

    def store(self) -> None:
        """Store the budget with the study.  Call with the study lock held.

        A confirmation that another process has begun under the same budget stays begun.
        """
        now = stored_hours(self.study)
        begun = now.round if now is not None and now.hours == self.hours else None
        Stored(self.hours, begun, self.known, self._load_seconds).write(self.study)
        self.study.set_user_attr(TOTAL, self.trials)

    def allows(self, done: int, alive: int) -> bool:
        """Whether a trial may begin while ``alive`` others run.  Makes the plan anew.  Call with the study lock held.

        It must end in time.  The exception is a study in which nothing has begun, even if loading has used up all the
        time: without a trial nothing is known.
        """
        taken = done + alive
        found = self._plan(taken)
        if taken >= self.most or (taken and self.worked.left <= 0):
            return self._ends(taken)
        if found is None:
            return taken == 0 or self._ends(taken)
        if self._said is None or is_replanned(self._said.trials, found.trials):
            if self._said is not None and taken:
                expected = self._said.durations.trial
                left, workers = self.worked.left, self.worked.searching
                self.say(replan_line(self._said.trials, expected, found, left, workers))
            self._said = found
        if not (found.starts or taken == 0):
            return self._ends(taken)
        self._set(max(self._said.trials, taken + 1))
        return True

    @property
    def confirm_seconds(self) -> float:
        """Planned for the confirmation; 0 while nothing is known."""
        return self._said.confirm_seconds if self._said else 0.0

    @property
    def why(self) -> str:
        """Why no more trials begin."""
        if self.trials >= self.most:
            return f"{self.trials} trials are done, the limit of --trials"
        return f"no further trial fits into {hours_words(self.hours)}"

    def _ends(self, taken: int) -> bool:
        self._set(taken)
        return False

    def _set(self, trials: int) -> None:
        if trials != self.trials:
            self.trials = trials
            self.study.set_user_attr(TOTAL, trials)

    def _plan(self, taken: int) -> Plan | None:
        found = self._durations()
        if found is None:
            return None
        worked = self.worked
        return plan(worked.seconds, worked.left, found, taken=taken, most=self.most, workers=worked.searching)

    def _durations(self) -> Durations | None:
        """From the measured pace, else the estimated one."""
        pace = measured(self.study, self.folder) or self.known
        if pace is None:
            return self._without_pace()
        cost, confirmation = self.cost, self.bench.confirmation
        mean = self._mean_samples(pace)
        shown = confirmation.image_count if confirmation else cost.images
        likely, longest = mean + cost.samples_sd, float(cost.ends.samples[1])
        return Durations(
            trial=pace.seconds(mean, cost.images),
            likely=pace.seconds(min(likely, longest), cost.images),
            longest=pace.seconds(longest, cost.images),
            start=self._load_seconds + pace.seconds(0, shown),
            zero=pace.seconds(cost.baseline_samples, shown),
            run=pace.seconds(min(likely, longest), shown),
        )

    def _mean_samples(self, pace: Pace) -> float:
        done = standing(self.study, 0).complete
        return self.cost.mean_samples(pace, done, startup_trials(self.trials))

    def _without_pace(self) -> Durations | None:
        """Where no trial was scored: from whole trials.  None before the first."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        seconds = [t.duration.total_seconds() for t in done if t.duration is not None]
        if not seconds:
            return None
        mean, longest = sum(seconds) / len(seconds), max(seconds)
        return Durations(mean, longest, longest, self._load_seconds, longest, longest)


def begun_confirming(study: optuna.Study, hours: float) -> Stored | None:
    """The budget of a study whose search has ended under the same budget: its confirmation has begun."""
    found = stored_hours(study)
    return found if found is not None and found.hours == hours and found.round is not None else None


def confirming(study: optuna.Study, stored: Stored) -> None:
    """Note that the confirmation begins: the search under this budget is over."""
    stored.write(study)
    study.set_user_attr(TOTAL, standing(study, 0).complete)
