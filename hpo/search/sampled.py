"""The trials of a search: the baseline first, then enqueued trials, then suggestions of the sampler.

Owns enqueueing the baseline, duplicates, and the end of a search: enough trials, no time left, no new suggestions,
repeated failures, convergence.  Does not own the sampler (``hpo.search.samplers``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search import alerts, dashboard
from hpo.search.balance import Balance
from hpo.search.looks import Looks
from hpo.search.proposals import Proposal, Proposals
from hpo.search.samplers import MODELS, make_sampler, startup_trials
from hpo.study import (
    BASELINE,
    BEST,
    CONVERGED,
    COUNTED,
    DUPLICATE,
    FAILED,
    FORK,
    ROLE,
    STOP,
    Holder,
    Result,
    Say,
    Standing,
    StudyConfig,
    StudyFolder,
    TrialFolder,
    another_name,
    convergence,
    drop_files,
    history,
    is_above_base,
    is_duplicate,
    is_feasible,
    learning_lines,
    measured,
    ownership_of,
    searched_settings,
    standing,
    tell,
)
from trainer.config import TrainConfig
from trainer.errors import RESUME, StudyStopped

if TYPE_CHECKING:
    from hpo.search.cost import Cost
    from hpo.search.within import Within
    from hpo.search.workbench import Workbench

EQUAL_FAILURES = 3  # in a row; then the search stops
MAX_DUPLICATES = 20  # in a row; then the space is exhausted


@dataclass(frozen=True)
class SearchLimits:
    """When the search ends, and which LoRA files are kept.

    ``until`` (``time.monotonic``): the end by ``max_hours``, for a worker that was started again.
    """

    trials: int
    max_hours: float | None = None
    keep_best: int | None = None
    stop_when_converged: bool = False
    until: float | None = None


def suggest(trial: optuna.Trial, config: StudyConfig) -> dict[str, Any]:
    """Suggest every parameter of the space, in order.  A resumed trial gets the same values again."""
    suggested: dict[str, Any] = {}
    for name, distribution in config.space.distributions().items():
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            suggested[name] = trial.suggest_categorical(name, distribution.choices)
        elif isinstance(distribution, optuna.distributions.IntDistribution):
            suggested[name] = trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        else:
            assert isinstance(distribution, optuna.distributions.FloatDistribution)
            suggested[name] = trial.suggest_float(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
    return suggested


def _is_given(trial: optuna.Trial, config: StudyConfig) -> bool:
    """Whether all values of a trial are known already: it was enqueued, or it goes on."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    known = {**frozen.params, **frozen.system_attrs.get("fixed_params", {})}
    return all(p.name in known for p in config.space)


class BenchProposals(Proposals):
    """Trials with the search space of the workbench's study."""

    def __init__(self, study: optuna.Study, bench: Workbench) -> None:
        self.study = study
        self.bench = bench
        self.objectives = bench.study.objectives

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return suggest(trial, self.bench.study)

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        return self.bench.config(suggested, number)

    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return searched_settings(self.bench.study, suggested)

    def inactive(self, suggested: Mapping[str, Any]) -> tuple[str, ...]:
        return self.bench.study.space.inactive(suggested)

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return {"inactive": list(self.inactive(suggested))}


class SearchProposals(BenchProposals):
    """The trials of a search."""

    def __init__(
        self,
        study: optuna.Study,
        bench: Workbench,
        limits: SearchLimits,
        say: Say,
        cost: Cost | None = None,
        within: Within | None = None,
    ) -> None:
        super().__init__(study, bench)
        self.folder: StudyFolder = bench.folder
        self.limits = limits
        self.say = say
        self.cost = cost
        self.within = within  # a time budget, which decides how many trials there are
        self.used_up = False  # only duplicates were suggested
        hours = math.inf if limits.max_hours is None else limits.max_hours
        self._until = time.monotonic() + 3600 * hours if limits.until is None else limits.until
        self._failures: list[str] = []
        self._told_of_noise = self._told_of_learning = False

    @property
    def total(self) -> int:
        return self.limits.trials if self.within is None else self.within.trials

    def samples_ahead(self, now: Standing) -> float | None:
        if self.cost is None:
            return None
        pace = measured(self.study, self.folder)
        return self.cost.mean_samples(pace, now.complete, startup_trials(self.total))

    def later_seconds(self) -> float:
        return 0.0 if self.within is None else self.within.confirm_seconds

    # Choosing the next trial

    def needs_more(self, alive: int) -> bool:
        return not self._stopped() and self._has_room(alive)

    def _has_room(self, alive: int) -> bool:
        """Whether one more trial may run while ``alive`` others do."""
        done = len(self._done())
        return done + alive < self.total if self.within is None else self.within.allows(done, alive)

    def queued(self) -> Iterator[Proposal | None]:
        if self._stopped():
            return
        for _ in range(self._proposals_left()):
            trials = self.study.get_trials(deepcopy=False)
            if not self._has_room(sum(t.state == TrialState.RUNNING for t in trials)):
                return
            # Trial 0 is the baseline.  If it fails (not because of its settings), the baseline is enqueued again.
            known = any(t.user_attrs.get(ROLE) == BASELINE and t.state != TrialState.FAIL for t in trials)
            yield None if known else Proposal(self.bench.study.baseline, BASELINE)
        self.used_up = len(self._done()) < self.total

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        config = self.bench.study
        # Studies told clipped values began before the rule existed and go on without it.
        learned = not config.score.signed or any(map(self._learned, self._done()))
        forked = self.study.study_name if self.study.user_attrs.get(FORK) else ""
        balance = None if _is_given(trial, config) else Balance.of(config)
        self.study.sampler = make_sampler(
            config.study.seed,
            trial.number,
            self.total,
            learned=learned,
            name=config.search.sampler,
            study=self.study,
            forked=forked,
            balance=balance,
        )
        return suggest(trial, config)

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        study = self.bench.study
        balanced = study.search.sampler in MODELS and Balance.of(study) is not None
        rate = "balanced" if balanced else "plain"
        return {**super().attributes(suggested), "sampler": study.search.sampler, "rate": rate}

    def refusal(self, suggested: Mapping[str, Any], number: int) -> str:
        """Names the earlier trial with the same settings, if there is one."""
        own = self.bench.study.config(suggested)
        for other in self.study.get_trials(deepcopy=False, states=(*COUNTED, TrialState.RUNNING)):
            known = other.params.keys() == suggested.keys()
            if known and other.number != number and self.bench.study.config(other.params) == own:
                return f"{DUPLICATE} of trial {other.number}"
        return ""

    def over(self) -> str:
        late = time.monotonic() >= self._until
        return f"the time limit is reached (--max-hours {self.limits.max_hours:g})" if late else ""

    def _stopped(self) -> bool:
        return bool(self.study.user_attrs.get(STOP))

    def _done(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=COUNTED)

    @staticmethod
    def _learned(trial: FrozenTrial) -> bool:
        return trial.state == TrialState.COMPLETE and is_feasible(trial) and is_above_base(trial)

    def _proposals_left(self) -> int:
        """How many more duplicates are allowed.  0 if an earlier command already exhausted the space."""
        in_a_row = 0
        for trial in reversed(self.study.get_trials(deepcopy=False)):
            if trial.state == TrialState.WAITING:
                return MAX_DUPLICATES
            if not is_duplicate(trial):
                break
            in_a_row += 1
        return max(0, MAX_DUPLICATES - in_a_row)

    def looks(self, trial: optuna.Trial, folder: TrialFolder) -> Looks | None:
        return Looks.of(self.bench, trial, folder, self.total)

    # After a result

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        """Stop after three equal failures, delete LoRA files, check convergence."""
        self._failures = [*self._failures, result.reason] if result.state == FAILED else []
        if self._failures[-EQUAL_FAILURES:] == [result.reason] * EQUAL_FAILURES:
            raise StudyStopped(
                f"three trials in a row failed in the same way ({result.reason}): {result.message}",
                f"see {self.folder.trial(result.number).log}; fix the cause, then {RESUME}",
            )
        if self.limits.keep_best is not None:
            drop_files(self.study, self.folder, self.limits.keep_best)
        self._say_measured()
        self._check_learning()
        self._tell_of_best(result)
        self._check_convergence()

    def _say_measured(self) -> None:
        """After the first trial: time and disk, corrected by what it took."""
        from hpo.search.cost import after_first_line

        if self.cost is not None and len(self._done()) == 1:
            keep, total = self.limits.keep_best, self.total
            if line := after_first_line(self.bench, self.study, self.cost, total, keep):
                self.say(line)

    def _check_learning(self) -> None:
        """Say once that nothing was learned, as soon as there are enough trials to say so."""
        if not self._told_of_learning and (lines := learning_lines(self.study, self.folder)):
            self._told_of_learning = True
            for line in lines:
                self.say(line)

    def _tell_of_best(self, result: Result) -> None:
        now = standing(self.study, self.total)
        if now.best and now.best[0] == result.number and not now.only_baseline:
            text = f"trial {result.number} has the best search score so far: {now.best[1]:.4f} ± {now.best[2]:.4f}"
            tell(BEST, f"{self.folder.name}: new best trial", text, self.say)

    def _check_convergence(self) -> None:
        if len(self.bench.study.objectives) > 1:  # not defined for a Pareto front
            return
        points, rows = history(self.study, self.bench.study, self.folder, self.bench.anchors)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        verdict = convergence.detect(
            points,
            dimensions=len(self.bench.study.space),
            startup=startup_trials(self.total),
            running=sum(runner is not None for runner in self._runners(running).values()),
        )
        self._set_stop(verdict is not None and verdict.settled)
        news = alerts.update_alert(self.folder, verdict, rows)
        if verdict is None:
            return
        if verdict.level == "no_signal" and not self._told_of_noise:
            self.say(f"warning: {alerts.MEANING['no_signal']}")
            self._told_of_noise = True
        if news is None:
            return
        text = self.folder.alert.read_text(encoding="utf-8")
        self.say(f"{self.folder.alert}: {news}; {text.splitlines()[0]}")
        dashboard.study_note(self.study, "```\n" + text + "```")
        tell(CONVERGED, f"{self.folder.name}: {news}", text, self.say)

    def _set_stop(self, settled: bool) -> None:
        """Set or clear the flag that stops all workers from starting trials.  The last trial to finish decides."""
        before = self._stopped()
        if settled and not before and self.limits.stop_when_converged:
            self.study.set_user_attr(STOP, "converged")
        elif before and not settled:
            self.study.set_user_attr(STOP, "")

    def _runners(self, trials: Iterable[FrozenTrial]) -> dict[int, Holder | None]:
        return ownership_of(self.folder, self.say).runners(t.number for t in trials)

    # The end

    def ended(self) -> str:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        runners = self._runners(running)
        busy = ", ".join(f"trial {n} ({runner.words})" for n, runner in runners.items() if runner)
        left = ", ".join(f"trial {n}" for n, runner in runners.items() if not runner)
        if stop := self.study.user_attrs.get(STOP):
            why = f"{stop} (--stop-when-converged); to continue, run the same command without that option"
            return f"{why}; still running in other processes: {busy}" if busy else why
        if self.within is not None and not self.used_up:
            return f"{self.within.why}; still running in other processes: {busy}" if busy else self.within.why
        if busy:
            return f"the remaining trials are running in other processes: {busy}"
        if self.used_up:
            return (
                f"the search space is exhausted: {MAX_DUPLICATES} suggestions in a row repeat earlier trials; "
                f"for a larger space, start a new study {another_name('--fork-from', self.folder.name)}"
            )
        total = "1 trial is done" if self.total == 1 else f"{self.total} trials are done"
        return f"{total}; {left} was interrupted: raise --trials to finish it" if left else total
