"""Claiming a trial: who works on what, and what a new trial proposes.

Owns adoption, asking, the sampler and its seeds, duplicates and the baseline's place in the queue – all under
the study's lock.  A claim is a kernel lock held by the living worker: a RUNNING trial whose lock is free
belongs to a dead process, and is adopted under its own number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search import dashboard
from hpo.study import (
    BASELINE,
    DUPLICATE,
    ROLE,
    STOP,
    Lock,
    Result,
    StudyConfig,
    StudyFolder,
    is_duplicate,
    read_result,
)
from trainer.files import sweep_tree

if TYPE_CHECKING:
    from hpo.search.workbench import Workbench

MAX_DUPLICATES = 20  # proposals in a row that were tried already: then the space is used up


@dataclass(frozen=True)
class Claim:
    """A trial this process works on, and the lock that says so."""

    trial: optuna.Trial
    suggested: dict[str, Any]
    lock: Lock
    adopted: bool


def startup_trials(total: int) -> int:
    """Trials before TPE has a model: 10 of 30 (5 hurt in simulation), a third of fewer."""
    return min(10, max(5, total // 3))


def make_sampler(seed: int, number: int, total: int) -> optuna.samplers.TPESampler:
    """The sampler of trial ``number``: Optuna 5's TPE defaults made explicit.

    Seeded by (study seed, number), so a resumed study proposes what an uninterrupted one would, and workers differ.
    """
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return optuna.samplers.TPESampler(
        seed=state,
        n_startup_trials=startup_trials(total),
        n_ei_candidates=24,
        multivariate=True,
        group=False,
        constant_liar=True,
    )


def suggest(trial: optuna.Trial, config: StudyConfig) -> dict[str, Any]:
    """Every parameter of the space, in order; an adopted trial that has them already gets the same again."""
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


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna marks what is used here as experimental; that is known and tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class Claims:
    """Hands out the trials of a study to this process.  ``tell`` is called for results that Optuna missed."""

    def __init__(
        self,
        study: optuna.Study,
        bench: Workbench,
        total: int,
        tell: Callable[[optuna.Trial, Mapping[str, Any], Result], None],
        say: Callable[[str], None],
    ) -> None:
        self.study = study
        self.bench = bench
        self.folder: StudyFolder = bench.folder
        self.total = total
        self.used_up = False  # nothing new was found to propose
        self._tell = tell
        self._say = say

    def take(self) -> Claim | None:
        """A trial to work on: an orphan's, else a new one; None if the rest is done or in other hands."""
        with self.folder.study_lock().held():
            stopped = bool(self.study.user_attrs.get(STOP))
            orphan = self._adopt(stopped)
            if orphan is not None or stopped:
                return orphan
            for _ in range(self._proposals_left()):
                trials = self.study.get_trials(deepcopy=False)
                taken = sum(t.state in (TrialState.COMPLETE, TrialState.RUNNING) for t in trials)
                if taken >= self.total:
                    return None
                self._enqueue_baseline(trials)
                claim = self._ask(len(trials))
                twin = self._twin(claim)
                if twin is None:
                    return claim
                self._fail(claim, f"{DUPLICATE} of trial {twin}")
            self.used_up = len(self._done()) < self.total
            return None

    def _done(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _proposals_left(self) -> int:
        """How many more proposals may turn out to be duplicates; a call on a used-up space adds none."""
        in_a_row = 0
        for trial in reversed(self.study.get_trials(deepcopy=False)):
            if trial.state == TrialState.WAITING:
                return MAX_DUPLICATES
            if not is_duplicate(trial):
                break
            in_a_row += 1
        return max(0, MAX_DUPLICATES - in_a_row)

    def _ask(self, number: int) -> Claim:
        with quiet():
            self.study.sampler = make_sampler(self.bench.study.study.seed, number, self.total)
            trial = self.study.ask()
            suggested = suggest(trial, self.bench.study)
        lock = self.folder.trial_lock(trial.number)
        taken = lock.try_acquire()
        assert taken, f"trial {trial.number} is new, but its lock is held"
        return Claim(trial, suggested, lock, adopted=False)

    def _adopt(self, stopped: bool) -> Claim | None:
        """The first RUNNING trial whose worker is dead, if the study still needs it.

        Results found on disk are told on the way, also those that it needs no more.
        """
        alive, orphans = 0, []
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self.folder.trial_lock(frozen.number)
            if not lock.try_acquire():
                alive += 1
                continue
            try:
                if not self._tell_found(frozen):
                    orphans.append(frozen)
            finally:  # nobody takes it meanwhile: that is done under the study's lock only
                lock.release()
        if stopped or not orphans or len(self._done()) + alive >= self.total:
            return None
        sweep_tree(self.folder.trial(orphans[0].number).root)
        trial, suggested = self._taken_up(orphans[0])
        lock = self.folder.trial_lock(trial.number)
        taken = lock.try_acquire()
        assert taken, f"trial {trial.number} was free, but its lock is held"
        return Claim(trial, suggested, lock, adopted=True)

    def _taken_up(self, frozen: FrozenTrial) -> tuple[optuna.Trial, dict[str, Any]]:
        with quiet():
            self.study.sampler = make_sampler(self.bench.study.study.seed, frozen.number, self.total)
            trial = optuna.trial.Trial(self.study, frozen._trial_id)
            return trial, suggest(trial, self.bench.study)

    def _tell_found(self, frozen: FrozenTrial) -> bool:
        """Tell the result that a dead worker left on disk, if there is one."""
        folder = self.folder.trial(frozen.number)
        if not folder.result.is_file():
            return False
        trial, suggested = self._taken_up(frozen)
        result = read_result(folder, self.bench.config(suggested, frozen.number))
        if result is None:
            return False
        self._tell(trial, suggested, result)
        self._say(f"trial {frozen.number} had its result on disk; the study knows it now")
        return True

    def _enqueue_baseline(self, trials: list[FrozenTrial]) -> None:
        """Trial 0 is the usual settings; should it fail for the machine's fault, they are tried again."""
        if not any(t.user_attrs.get(ROLE) == BASELINE and t.state != TrialState.FAIL for t in trials):
            self.study.enqueue_trial(dict(self.bench.study.baseline), user_attrs={ROLE: BASELINE})

    def _twin(self, claim: Claim) -> int | None:
        """A trial that finished with the same settings."""
        own = self.bench.study.config(claim.suggested)
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
            known = other.params.keys() == claim.suggested.keys()
            if known and other.number != claim.trial.number and self.bench.study.config(other.params) == own:
                return other.number
        return None

    def _fail(self, claim: Claim, reason: str) -> None:
        claim.trial.set_user_attr("reason", reason)
        settings = self.bench.study.space.settings(claim.suggested, self.bench.study.train)
        dashboard.publish_failure(claim.trial, reason, settings, self._say)
        self.study.tell(claim.trial, state=TrialState.FAIL, skip_if_finished=True)
        claim.lock.release()
