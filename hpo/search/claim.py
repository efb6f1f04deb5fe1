"""Claiming trials: each trial is run by one worker.

Owns adopting trials of dead workers and asking for new ones, under the study lock.  A claim is a lock held by a
living worker (``hpo.study.ownership``).  A RUNNING trial whose lock is free belongs to a dead process, and is adopted
under its own number. Does not own the suggested values; see ``hpo.search.proposals``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search import dashboard
from hpo.search.proposals import Proposals
from hpo.search.telling import Teller
from hpo.study import ROLE, Claimed, ClaimLost, StudyFolder, ownership_of, read_result, state_of, take_up
from trainer.files import sweep_tree


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs, and its lock."""

    trial: optuna.Trial
    suggested: dict[str, Any]
    lock: Claimed
    adopted: bool


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Optuna's warnings about experimental features; the ones used here are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class Claims:
    """Claims trials of a study for this process."""

    def __init__(self, study: optuna.Study, source: Proposals, teller: Teller) -> None:
        self.study = study
        self.source = source
        self.teller = teller
        self.folder: StudyFolder = teller.folder
        self.ownership = ownership_of(self.folder, teller.say)

    def take(self) -> Claim | None:
        """Claim a trial: an orphaned one, else a new one.  None if the rest is finished or
        claimed by other workers."""
        with self.ownership.study():
            orphan = self._adopt()
            if orphan is not None:
                return orphan
            for proposal in self.source.queued():
                with quiet():
                    if proposal is not None:
                        role = {ROLE: proposal.role} if proposal.role else None
                        self.study.enqueue_trial(dict(proposal.values), user_attrs=role)
                    trial = self.study.ask()
                    suggested = self.source.suggest(trial)
                claim = self._claim(trial, suggested, adopted=False)
                refusal = self.source.refusal(suggested, trial.number)
                if not refusal:
                    return claim
                self._fail(claim, refusal)
            return None

    def _claim(self, trial: optuna.Trial, suggested: dict[str, Any], *, adopted: bool) -> Claim:
        lock = self.ownership.trial(trial.number)
        if not lock.try_acquire():
            raise ClaimLost(f"trial {trial.number} was taken by another worker at the same moment")
        return Claim(trial, suggested, lock, adopted)

    def _adopt(self) -> Claim | None:
        """The first RUNNING trial whose worker is dead, if the study still needs it.

        Results found on disk are reported to Optuna first, even if the study no longer needs them.
        """
        alive, orphans = 0, []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self.ownership.trial(frozen.number)
            if not lock.try_acquire():
                alive += 1
                continue
            try:
                is_running = (
                    state_of(frozen, self.study) == TrialState.RUNNING
                )  # it may have been told meanwhile
                if is_running and not self._tell_found(frozen, lock):
                    orphans.append(frozen)
            finally:  # no other worker can claim it meanwhile: that needs the study lock
                lock.release()
        for frozen in orphans if orphans and self.source.needs_more(alive) else ():
            trial, suggested = self._taken_up(frozen)
            if self.source.wants(suggested):
                claim = self._claim(trial, suggested, adopted=True)
                sweep_tree(self.folder.trial(frozen.number).root, everyone=True)
                return claim
        return None

    def _taken_up(self, frozen: FrozenTrial) -> tuple[optuna.Trial, dict[str, Any]]:
        with quiet():
            trial = take_up(self.study, frozen)
            return trial, self.source.suggest(trial)

    def _tell_found(self, frozen: FrozenTrial, lock: Claimed) -> bool:
        """Report the result that a dead worker left on disk, if there is one."""
        folder = self.folder.trial(frozen.number)
        if not folder.result.is_file():
            return False
        trial, suggested = self._taken_up(frozen)
        if not self.source.wants(suggested):
            return False
        result = read_result(folder, self.source.config(suggested, frozen.number))
        if result is None:
            return False
        self.teller.tell(trial, result, self.source.settings(suggested), lock)
        self.teller.say(
            f"{self.source.noun} {frozen.number} was already finished on disk; its result was added to the study"
        )
        return True

    def _fail(self, claim: Claim, reason: str) -> None:
        with claim.lock.telling(claim.trial) as trial:
            trial.set_user_attr("reason", reason)
            settings = self.source.settings(claim.suggested)
            dashboard.publish_failure(trial, reason, settings, self.teller.say)
            trial.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        claim.lock.release()
