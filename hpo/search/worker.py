"""The worker of a study: claim a trial → train and score → result.json → report, until no trial is left.

Owns the loop, which is the same for a search, a confirmation and probes.  Does not own claims
(``hpo.search.claim``), the choice of trials and the actions after a result (``hpo.search.proposals``), the
work of a trial (``hpo.search.trial``) or the output (``hpo.terminal.live``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

from hpo.health import Guard, Lookout, Needs, halve
from hpo.machine import gpu_uuid
from hpo.search.claim import Claim, Claims
from hpo.search.guarded import Guarded
from hpo.search.looks import look_images
from hpo.search.telling import Teller
from hpo.search.trial import Watch, deaths_without_progress, failed, resumes_from, run_trial
from hpo.study import (
    FAILED,
    ClaimLost,
    Forecast,
    Result,
    Standing,
    StudyFolder,
    TrialFolder,
    another_name,
    begun_study,
    clean_advice,
    measured,
    standing,
    tell,
    where,
    write_params,
    write_result,
)
from hpo.terminal import live
from hpo.train import file_sizes
from trainer.config import TrainConfig
from trainer.errors import Interrupted, StudyStopped, ToolError
from trainer.files import folder_bytes, sweep_tree

if TYPE_CHECKING:
    from hpo.search.proposals import Proposals
    from hpo.search.workbench import Workbench

SAMPLED = 5  # trials that have ended, for the size of the next ones
MAX_LOST = 5  # connections in a row, before a trial is claimed
# Processes in a row that died in one trial without saving more progress. Not more than a supervisor restarts a worker
# (hpo.night): a trial that kills its process is given up before its GPU is.
MAX_DEATHS = 3


class SearchView(Watch, Protocol):
    """Shows the progress of a worker."""

    def say(self, text: str) -> None: ...
    def on_trial(
        self, number: int, suggested: Mapping[str, Any], adopted: bool, standing: Standing
    ) -> None: ...
    def on_result(self, result: Result, standing: Standing) -> None: ...


class Worker:
    """One worker of a study.  ``lookout``: how its health is watched; None: by the study's thresholds."""

    def __init__(
        self,
        study: optuna.Study,
        bench: Workbench,
        source: Proposals,
        view: SearchView,
        lookout: Lookout | None = None,
    ) -> None:
        self.study = study
        self.bench = bench
        self.folder: StudyFolder = bench.folder
        self.source = source
        self.view = view
        self.teller = Teller(study, bench.folder, source.objectives, view.say)
        self.claims = Claims(study, source, self.teller)
        device = str(bench.base.device)
        self.guard = Guard(
            lookout or Lookout(bench.study.health),
            self.folder.root,
            view.say,
            name=self.folder.name,
            device=device,
            uuid=gpu_uuid(device),
            needs=lambda: self._needs,
            swings=False,  # a search tries rates that are too high, and the score decides
            left=self._left,
        )
        self.guard.relief = partial(halve, bench.store)
        self.watch = Guarded(view, self.guard)
        self._needs: Needs | None = None
        if isinstance(view, live.PlainView):
            view.health = self.guard.line

    def run(self) -> str:
        """Run trials until there are enough.  Returns the reason for the end."""
        sweep_tree(self.folder.root)
        try:
            with self.guard:
                return self._trials()
        except Interrupted:
            if self.guard.should_stop and not self.view.should_stop():
                raise self.guard.full_error(clean_advice(self.folder.root.parent)) from None
            raise
        except KeyError:
            if begun_study(self.folder) is not None:
                raise
            raise StudyStopped(
                f"study {self.folder.name} was deleted from {where(self.folder)}, perhaps in the dashboard",
                f"the files of its trials are still in {self.folder.root}; start again {another_name()}",
            ) from None
        finally:  # another worker may have died meanwhile
            sweep_tree(self.folder.root)

    def _left(self) -> float | None:
        """Seconds to the end of the study, as the view has it."""
        current = self.view.current if isinstance(self.view, live.PlainView) else None
        return None if current is None else current.seconds_left()

    def _measure_needs(self, config: TrainConfig) -> None:
        """How much disk the trials that are left need: each as much as those that have ended.  Not known for settings
        that no adapter can be made of: the trial that begins fails by itself."""
        self._needs = None
        try:
            sizes = file_sizes(self.bench.base, config)
        except ToolError:
            return
        own = sizes.weights_bytes + sizes.state_bytes
        ended = [trial.root for trial in self.folder.trial_folders() if trial.result.is_file()][-SAMPLED:]
        each = sum(map(folder_bytes, ended)) // len(ended) if ended else 0
        ahead = self.source.trials_ahead(self.standing())
        self._needs = Needs(own, own + each * (1 + ahead))

    def standing(self) -> Standing:
        return standing(self.study, self.source.total)

    def _starting(self, config: TrainConfig) -> Standing:
        """The standing with a forecast for the trial that starts now, once its pace is known."""
        now = self.standing()
        pace = measured(self.study, self.folder) or self.bench.pace
        if pace is None:
            return now
        own = self.source.samples(config, self.bench.data)
        ahead = self.source.samples_ahead(now)
        if ahead is None:
            ahead = own if pace.samples is None else pace.samples
        forecast = Forecast(
            pace,
            samples=own,
            images=self.bench.prompts.image_count + look_images(self.bench),
            trials_ahead=self.source.trials_ahead(now),
            samples_ahead=ahead,
            workers=max(1, now.running),
            later_seconds=self.source.later_seconds(),
        )
        return dataclasses.replace(now, forecast=forecast)

    def _trials(self) -> str:
        """Until nothing is left.  A connection that is lost between two trials is tried again a few times."""
        lost = 0
        while True:
            if self.watch.should_stop():
                raise Interrupted(
                    f"stopped between two {self.source.noun}s", "run the same command again to resume"
                )
            if why := self.source.over():
                return why
            claim = None
            try:
                claim = self.claims.take()
                if claim is None:
                    return self.source.ended()
                self._do(claim)
            except UpdateFinishedTrialError:  # it was finished elsewhere before it started here
                if claim:
                    self.teller.say_finished(claim.trial.number)
            except ClaimLost as error:
                self.view.say(f"{error}; this worker takes the next {self.source.noun}")
            except StorageInternalError as error:
                lost = 0 if claim else lost + 1
                if lost > MAX_LOST or not self.claims.ownership.survives(error):
                    raise
                self.view.say(
                    "the connection to the database was lost; this worker connects again and goes on"
                )
            finally:
                if claim:
                    claim.lock.release()

    def _do(self, claim: Claim) -> None:
        source, suggested, number = self.source, claim.suggested, claim.trial.number
        folder, config = self.folder.trial(number), source.config(suggested, number)
        write_params(folder, suggested, source.inactive(suggested), config)
        attributes = {"settings": source.settings(suggested), **source.attributes(suggested)}
        for name, value in attributes.items():
            claim.trial.set_user_attr(name, value)
        source.begin(suggested)
        if claim.adopted:
            self.view.say(f"resuming trial {number}: {resumes_from(folder)}")
        self.view.on_trial(number, suggested, claim.adopted, self._starting(config))
        result = self._result(folder, config, claim)
        self.tell(claim, result)
        self.view.on_result(result, self.standing())
        source.after(suggested, result)

    def _result(self, folder: TrialFolder, config: TrainConfig, claim: Claim) -> Result:
        deaths, reason, why = deaths_without_progress(folder)
        if deaths >= MAX_DEATHS:
            message = f"{MAX_DEATHS} processes in a row died in this {self.source.noun} without saving more progress"
            result = failed(folder, config, reason, f"{message}; the last one: {why}" if why else message)
            write_result(folder, result)
            what = f"{self.folder.words}: {self.source.noun} {folder.number} failed"
            tell(FAILED, what, f"{message}; reason: {reason}", self.view.say, ends=False)
            return result
        self.source.prepare(claim.suggested, folder)
        looks = self.source.looks(claim.trial, folder)
        self._measure_needs(config)
        self.guard.begins(trial=folder.number)
        result = run_trial(self.bench, folder, config, self.watch, claim.lock.check, looks)
        if result.lora:
            self.guard.health.saved(folder.lora, file_sizes(self.bench.base, config).weights_bytes)
        return result

    def tell(self, claim: Claim, result: Result) -> None:
        """Report the result to Optuna."""
        self.teller.tell(claim.trial, result, self.source.settings(claim.suggested), claim.lock)
