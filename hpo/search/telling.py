"""Report a trial's result to Optuna exactly once, even if another process finishes the trial at the same time.

Owns the user attributes and constraints of a finished trial.  Does not own the dashboard; see
``hpo.search.dashboard``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo.search import dashboard
from hpo.study import (
    COMPLETE,
    FAILED,
    INFEASIBLE_REASONS,
    OBJECTIVE,
    PRUNED,
    SCORE,
    Claimed,
    Result,
    StudyFolder,
    objective_values,
    state_of,
)


@dataclass(frozen=True)
class Teller:
    """Reports results to the study in a folder.  ``say`` prints a line for the user."""

    study: optuna.Study
    folder: StudyFolder
    objectives: Sequence[str]
    say: Callable[[str], None]

    def tell(self, trial: optuna.Trial, result: Result, settings: Mapping[str, Any], lock: Claimed) -> None:
        """Report the result to Optuna.  Can be repeated safely if the process is killed at any point.

        Raises ClaimLost if another worker has taken the trial over; then nothing is stored.
        """
        try:
            with lock.telling(trial) as own:
                if not state_of(own, own.study).is_finished():
                    self._record(own, result, settings)
                    return
        except UpdateFinishedTrialError:
            pass  # another process finished it between two writes
        self.say_finished(result.number)

    def say_finished(self, number: int) -> None:
        self.say(
            f"trial {number} was already finished elsewhere, perhaps in the dashboard; the study keeps that state. "
            f"The measured result is in {self.folder.trial(number).root}"
        )

    def _record(self, trial: optuna.Trial, result: Result, settings: Mapping[str, Any]) -> None:
        attributes = {
            "outcome": result.state,
            "reason": result.reason,
            "message": result.message,
            "remedy": result.remedy,
            SCORE: result.value if result.state == COMPLETE else None,
            "se": result.se,
            OBJECTIVE: result.objective if result.state == COMPLETE else None,
            f"{OBJECTIVE}_se": result.objective_se,
            "prompt_following": result.prompt_following,
            "likeness": result.likeness,
            "copy_rate": result.copy_rate,
            "diversity": result.diversity,
            "prior": result.prior,
            "strangeness": result.strangeness,
            "seconds": round(result.seconds, 1),
            "settings": dict(settings),
        }
        for name, value in attributes.items():
            if value not in ("", None):
                trial.set_user_attr(name, value)
        if result.state != FAILED:
            amounts = dashboard.constraint_amounts(result.reason, INFEASIBLE_REASONS) | result.amounts
            dashboard.mark_infeasible(trial, amounts)
        dashboard.publish(trial, self.folder, result, settings, self.say)
        if result.state == FAILED:
            trial.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        elif result.state == PRUNED:  # its value is the last intermediate one
            trial.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            trial.study.tell(trial, objective_values(result, self.objectives), skip_if_finished=True)
