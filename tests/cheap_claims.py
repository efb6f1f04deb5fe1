"""Claiming and telling without training: a hundred trials in seconds, through the same code as a search."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.search.claim import Claim, Claims
from hpo.search.proposals import Proposal, Proposals
from hpo.search.telling import Teller
from hpo.study import leases
from hpo.study.folder import StudyFolder
from hpo.study.ownership import ClaimLost, ownership_of
from hpo.study.storage import create_study, open_study
from trainer.config import TrainConfig
from trainer.files import append_line, make_folder

WORKER = "worker"  # a user attribute: who told it


class Queued(Proposals):
    """The trials that wait in the study, and no others."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study

    @property
    def total(self) -> int:
        return len(self.study.get_trials(deepcopy=False))

    def queued(self) -> Iterator[Proposal | None]:
        if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            yield None

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return {"x": trial.suggest_float("x", 0, 1)}

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        return TrainConfig()

    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return dict(suggested)


def enqueue(folder: StudyFolder, trials: int) -> optuna.Study:
    """A study with so many trials that wait; x is a function of the number."""
    make_folder(folder.root)
    with ownership_of(folder).study():
        study = create_study(folder, {"direction": "maximize"})
    for number in range(trials):
        study.enqueue_trial({"x": number / trials})
    return study


def on_its_own_machine(name: str, lease_seconds: float) -> None:
    """This process seems to run on another machine, where nobody can see whether it lives."""
    boot = f"{name} {leases._boot()}"
    leases._boot = lambda: boot
    leases.LEASE_SECONDS = lease_seconds


def claims_of(folder: StudyFolder) -> Claims:
    study = open_study(folder)
    return Claims(study, Queued(study), Teller(study, folder, ("score",), lambda text: None))


def work(folder: StudyFolder, change: Callable[[Claim], None] = lambda claim: None) -> None:
    """One worker: it claims and tells until nothing can be claimed.  ``change`` is called with each claim."""
    claims = claims_of(folder)
    while claim := claims.take():
        number = claim.trial.number
        make_folder(folder.trial(number).root)
        row = {"event": "claimed", "pid": os.getpid(), "adopted": claim.adopted}
        append_line(folder.trial(number).starts, json.dumps(row))
        change(claim)
        try:
            tell(claim)
        except ClaimLost as lost:
            append_line(folder.trial(number).log, str(lost))
        finally:
            claim.lock.release()


def tell(claim: Claim) -> None:
    """What ``Teller`` does, with one attribute instead of thirty."""
    with claim.lock.telling(claim.trial) as trial:
        trial.set_user_attr(WORKER, os.getpid())
        trial.study.tell(trial, claim.suggested["x"])
