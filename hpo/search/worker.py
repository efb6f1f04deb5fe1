"""The worker of a study: claim or adopt a trial → train and score → result.json → tell, until there is no more.

Owns the loop, the same for a search, a confirmation and probes.  Does not own who works on what
(``hpo.search.claim``), what is proposed and what follows from a result (``hpo.search.proposals``), a trial's
work (``hpo.search.trial``) or what is shown (``hpo.terminal.live``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from hpo.search.claim import Claim, Claims
from hpo.search.telling import Teller
from hpo.search.trial import Watch, deaths_without_progress, failed, run_trial
from hpo.study import (
    Result,
    Standing,
    StudyFolder,
    TrialFolder,
    begun_study,
    standing,
    write_params,
    write_result,
)
from trainer.config import TrainConfig
from trainer.errors import Interrupted, StudyStopped
from trainer.files import sweep_tree

if TYPE_CHECKING:
    from hpo.search.proposals import Proposals
    from hpo.search.workbench import Workbench

MAX_DEATHS = 5  # processes that died in one trial with nothing more saved


class SearchView(Watch, Protocol):
    """Who shows the work."""

    def say(self, text: str) -> None: ...
    def on_trial(
        self, number: int, suggested: Mapping[str, Any], adopted: bool, standing: Standing
    ) -> None: ...
    def on_result(self, result: Result, standing: Standing) -> None: ...


class Worker:
    """One worker of a study."""

    def __init__(self, study: optuna.Study, bench: Workbench, source: Proposals, view: SearchView) -> None:
        self.study = study
        self.bench = bench
        self.folder: StudyFolder = bench.folder
        self.source = source
        self.view = view
        self.teller = Teller(study, bench.folder, source.objectives, view.say)
        self.claims = Claims(study, source, self.teller)

    def run(self) -> str:
        """Trial after trial until there are enough; returns why it ended."""
        sweep_tree(self.folder.root)
        try:
            return self._trials()
        except KeyError:
            if begun_study(self.folder) is not None:
                raise
            raise StudyStopped(
                f"study {self.folder.name} was deleted from {self.folder.database}, in the dashboard perhaps",
                f"its trials' files are still in {self.folder.root}; begin again with another --name",
            ) from None
        finally:  # another worker may have died beside this one
            sweep_tree(self.folder.root)

    def standing(self) -> Standing:
        return standing(self.study, self.source.total)

    def _trials(self) -> str:
        while True:
            if self.view.should_stop():
                raise Interrupted(f"stopped between two {self.source.noun}s", "the same command goes on")
            if why := self.source.over():
                return why
            claim = None
            try:
                claim = self.claims.take()
                if claim is None:
                    return self.source.ended()
                self._do(claim)
            except UpdateFinishedTrialError:  # before its work began
                if claim:
                    self.teller.say_finished(claim.trial.number)
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
        self.view.on_trial(number, suggested, claim.adopted, self.standing())
        result = self._result(folder, config, suggested)
        self.tell(claim, result)
        self.view.on_result(result, self.standing())
        source.after(suggested, result)

    def _result(self, folder: TrialFolder, config: TrainConfig, suggested: Mapping[str, Any]) -> Result:
        if deaths_without_progress(folder) >= MAX_DEATHS:
            message = f"{MAX_DEATHS} processes died in this {self.source.noun} with nothing more saved"
            result = failed(folder, config, "process_died", message)
            write_result(folder, result)
            return result
        self.source.prepare(suggested, folder)
        return run_trial(self.bench, folder, config, self.view)

    def tell(self, claim: Claim, result: Result) -> None:
        """Optuna learns the result."""
        self.teller.tell(claim.trial, result, self.source.settings(claim.suggested))
