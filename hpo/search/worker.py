"""The search: claim or adopt a trial → train and score → result.json → tell, until the study has its trials.

Owns the loop of one worker, telling Optuna, and when the search ends.  Does not own who works on what
(``hpo.search.claim``), a trial's work (``hpo.search.trial``) or what is shown (``hpo.terminal.live``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo.search import alerts, dashboard
from hpo.search.claim import MAX_DUPLICATES, Claim, Claims, startup_trials
from hpo.search.trial import Watch, deaths_without_progress, failed, run_trial
from hpo.study import (
    COMPLETE,
    FAILED,
    INFEASIBLE_REASONS,
    SCORE,
    STOP,
    Result,
    Standing,
    StudyFolder,
    convergence,
    drop_files,
    history,
    holder,
    objective_values,
    searched_settings,
    standing,
    write_params,
    write_result,
)
from trainer.errors import Interrupted, StudyStopped
from trainer.files import sweep_tree

if TYPE_CHECKING:
    from hpo.search.workbench import Workbench

EQUAL_FAILURES = 3  # in a row, then the study stops itself
MAX_DEATHS = 5  # processes that died in one trial with nothing more saved


class SearchView(Watch, Protocol):
    """Who shows the search."""

    def say(self, text: str) -> None: ...
    def on_trial(
        self, number: int, suggested: Mapping[str, Any], adopted: bool, standing: Standing
    ) -> None: ...
    def on_result(self, result: Result, standing: Standing) -> None: ...


@dataclass(frozen=True)
class SearchLimits:
    """When the search ends, and what is kept."""

    trials: int
    max_hours: float | None = None
    keep_best: int | None = None
    stop_when_converged: bool = False
    notify: tuple[str, ...] = ()


class Search:
    """One worker of a study."""

    def __init__(self, study: optuna.Study, bench: Workbench, limits: SearchLimits, view: SearchView) -> None:
        self.study = study
        self.bench = bench
        self.folder: StudyFolder = bench.folder
        self.limits = limits
        self.view = view
        self.claims = Claims(study, bench, limits.trials, self.tell, view.say)
        self._failures: list[str] = []
        self._told_of_noise = False

    # The loop

    def run(self) -> str:
        """Trial after trial until there are enough; returns why it ended."""
        sweep_tree(self.folder.root)
        try:
            return self._trials()
        except KeyError:
            if not self._is_deleted():
                raise
            raise StudyStopped(
                f"study {self.folder.name} was deleted from {self.folder.database}, in the dashboard perhaps",
                f"its trials' files are still in {self.folder.root}; begin again with another --name",
            ) from None
        finally:  # another worker may have died beside this one
            sweep_tree(self.folder.root)

    def _is_deleted(self) -> bool:
        return self.study._study_id not in [
            known._study_id for known in self.study._storage.get_all_studies()
        ]

    def _trials(self) -> str:
        until = math.inf
        if self.limits.max_hours is not None:
            until = time.monotonic() + 3600 * self.limits.max_hours
        while True:
            if self.view.should_stop():
                raise Interrupted("stopped between two trials", "the same command goes on")
            if time.monotonic() >= until:
                return f"--max-hours {self.limits.max_hours:g} is over"
            claim = None
            try:
                claim = self.claims.take()
                if claim is None:
                    return self._why_done()
                self._do(claim)
            except UpdateFinishedTrialError:  # before its work began
                if claim:
                    self._say_finished(claim.trial.number)
            finally:
                if claim:
                    claim.lock.release()

    def _do(self, claim: Claim) -> None:
        number = claim.trial.number
        folder, config = self.folder.trial(number), self.bench.config(claim.suggested, number)
        inactive = self.bench.study.space.inactive(claim.suggested)
        write_params(folder, claim.suggested, inactive, config)
        claim.trial.set_user_attr("settings", searched_settings(self.bench.study, claim.suggested))
        claim.trial.set_user_attr("inactive", list(inactive))
        self.view.on_trial(number, claim.suggested, claim.adopted, self.standing())
        if deaths_without_progress(folder) >= MAX_DEATHS:
            message = f"{MAX_DEATHS} processes died in this trial with nothing more saved"
            result = failed(folder, config, "process_died", message)
            write_result(folder, result)
        else:
            result = run_trial(self.bench, folder, config, self.view)
        self.tell(claim.trial, claim.suggested, result)
        self.view.on_result(result, self.standing())
        self._after(result)

    def _after(self, result: Result) -> None:
        """Three equal failures, LoRA files to drop, convergence."""
        self._failures = [*self._failures, result.reason] if result.state == FAILED else []
        if self._failures[-EQUAL_FAILURES:] == [result.reason] * EQUAL_FAILURES:
            raise StudyStopped(
                f"three trials in a row failed alike ({result.reason}): {result.message}",
                f"see {self.folder.trial(result.number).log}; once it is mended, the same command goes on",
            )
        if self.limits.keep_best is not None:
            drop_files(self.study, self.folder, self.limits.keep_best)
        self._check_convergence()

    def tell(self, trial: optuna.Trial, suggested: Mapping[str, Any], result: Result) -> None:
        """Optuna learns the result."""
        tell(
            self.study,
            self.folder,
            trial,
            result,
            searched_settings(self.bench.study, suggested),
            self.view.say,
            self.bench.study.objectives,
        )

    def _say_finished(self, number: int) -> None:
        say_finished(self.folder, number, self.view.say)

    # Where the study stands

    def standing(self) -> Standing:
        return standing(self.study, self.limits.trials)

    def _why_done(self) -> str:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        pids = {t.number: holder(self.folder.trial_lock(t.number).path) for t in running}
        busy = ", ".join(f"trial {n} (process {pid})" for n, pid in pids.items() if pid)
        left = ", ".join(f"trial {n}" for n, pid in pids.items() if not pid)
        if stop := self.study.user_attrs.get(STOP):
            why = f"{stop} (--stop-when-converged); without that option the same command goes on"
            return f"{why}; in other hands: {busy}" if busy else why
        if busy:
            return f"the rest is in other hands: {busy}"
        if self.claims.used_up:
            return (
                f"the search space is used up: {MAX_DUPLICATES} proposals in a row were tried already; "
                "a study's space stays as it began, a wider one needs a new --name"
            )
        total = f"{self.limits.trials} trials are done"
        return f"{total}; {left} was interrupted: raise --trials to finish it" if left else total

    def _check_convergence(self) -> None:
        if len(self.bench.study.objectives) > 1:  # a front has no best score to wait for (session says so)
            return
        points, rows = history(self.study, self.bench.study, self.folder, self.bench.anchors)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        verdict = convergence.detect(
            points,
            dimensions=len(self.bench.study.space),
            startup=startup_trials(self.limits.trials),
            running=sum(holder(self.folder.trial_lock(t.number).path) is not None for t in running),
        )
        self._set_stop(verdict is not None and verdict.settled)
        news = alerts.update_alert(self.folder, verdict, rows)
        if verdict is None:
            return
        if verdict.level == "no_signal" and not self._told_of_noise:
            self.view.say(f"warning: {alerts.MEANING['no_signal']}")
            self._told_of_noise = True
        if news is None:
            return
        text = self.folder.alert.read_text(encoding="utf-8")
        self.view.say(f"{self.folder.alert}: {news}; {text.splitlines()[0]}")
        dashboard.study_note(self.study, "```\n" + text + "```")
        if self.limits.notify:
            alerts.notify(self.limits.notify, f"{self.folder.name}: {news}", text, self.view.say)

    def _set_stop(self, settled: bool) -> None:
        """Tell every worker to begin no new trial; the last trial to finish has the last word."""
        before = bool(self.study.user_attrs.get(STOP))
        if settled and not before and self.limits.stop_when_converged:
            self.study.set_user_attr(STOP, "converged")
        elif before and not settled:
            self.study.set_user_attr(STOP, "")


# Telling


def tell(
    study: optuna.Study,
    folder: StudyFolder,
    trial: optuna.Trial,
    result: Result,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    objectives: Sequence[str] = (SCORE,),
) -> None:
    """Optuna learns the result.  Safe to repeat after a kill at any point of it."""
    try:
        if not study._storage.get_trial(trial._trial_id).state.is_finished():
            _record(study, folder, trial, result, settings, say, objectives)
            return
    except UpdateFinishedTrialError:
        pass  # somebody finished it between two of the writes
    say_finished(folder, result.number, say)


def say_finished(folder: StudyFolder, number: int, say: Callable[[str], None]) -> None:
    say(
        f"trial {number} was finished by somebody else, in the dashboard perhaps: the study keeps that; "
        f"what was measured is in {folder.trial(number).root}"
    )


def _record(
    study: optuna.Study,
    folder: StudyFolder,
    trial: optuna.Trial,
    result: Result,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    objectives: Sequence[str],
) -> None:
    attributes = {"reason": result.reason, "message": result.message, "remedy": result.remedy}
    figures = {
        SCORE: result.value if result.state == COMPLETE else None,
        "se": result.se,
        "prompt_following": result.prompt_following,
        "likeness": result.likeness,
        "copy_rate": result.copy_rate,
        "diversity": result.diversity,
        "prior": result.prior,
        "seconds": round(result.seconds, 1),
    }
    for name, value in {"outcome": result.state, **attributes, **figures, "settings": dict(settings)}.items():
        if value not in ("", None):
            trial.set_user_attr(name, value)
    if result.state != FAILED:
        amounts = dashboard.constraint_amounts(result.reason, INFEASIBLE_REASONS) | result.amounts
        dashboard.mark_infeasible(trial, amounts)
    dashboard.publish(trial, folder, folder.trial(result.number), result, settings, say)
    if result.state == FAILED:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    else:
        study.tell(trial, objective_values(result, objectives), skip_if_finished=True)
