"""A confirmation's proposals: the wanted runs, one after the other, each a searched trial with a seed of its own.

Owns a run's settings and, with ``--rescore-only``, the copy of the searched trial's LoRA file.  Which runs
are wanted is ``hpo.confirm.wanted``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from hpo.confirm.outcome import RESCORED
from hpo.confirm.wanted import CONFIRMS, DISTRIBUTIONS, OF, Confirmation, Wanted, done_runs, run_of
from hpo.search import Proposal, Proposals
from hpo.study import BASELINE, COMPLETE, INFEASIBLE, ROLE, Result, TrialFolder, read_json
from trainer.config import TrainConfig
from trainer.errors import MachineError, ModelFileError
from trainer.files import machine_error, sha256_file, write_atomic

if TYPE_CHECKING:
    from hpo.search import Workbench


def suggested_run(trial: optuna.Trial) -> dict[str, Any]:
    """The run's parameters; of an adopted trial too that died before it had them."""
    return {
        name: trial.suggest_int(name, distribution.low, distribution.high)
        for name, distribution in DISTRIBUTIONS.items()
    }


class ConfirmProposals(Proposals):
    """Every wanted run that has no result yet."""

    noun = "run"

    def __init__(self, study: optuna.Study, bench: Workbench, confirmation: Confirmation) -> None:
        self.study, self.bench, self.asked = study, bench, confirmation
        self._failed: dict[Wanted, str] = {}  # in this call; the next one tries again

    @property
    def total(self) -> int:
        return len(self.asked.wanted)

    # What is next

    def wants(self, suggested: Mapping[str, Any]) -> bool:
        return run_of(suggested) in self.asked.wanted

    def queued(self) -> Iterator[Proposal | None]:
        trials = self.study.get_trials(deepcopy=False)
        under_way = (TrialState.COMPLETE, TrialState.RUNNING)
        taken = {run_of(t.params) for t in trials if t.state in under_way and t.params}
        missing = [w for w in self.asked.wanted if w not in taken and w not in self._failed]
        if missing:
            waits = any(t.state == TrialState.WAITING for t in trials)
            yield None if waits else Proposal(missing[0].suggested)

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return suggested_run(trial)

    # One run

    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        """The searched trial's settings, with this run's seed and name; a saved LoRA file keeps its own."""
        run = run_of(suggested)
        params = self.asked.source.trial(run.of).params
        values = (read_json(params) or {}).get("train")
        if values is None:
            raise MachineError(f"{params} is missing or damaged", "restore it, or confirm fewer trials")
        config = TrainConfig(**values).with_values(
            {
                "pretrained_model_name_or_path": self.bench.base_spec,
                "train_data_dir": str(self.bench.data_folder),
            }
        )
        if self.asked.how == RESCORED:
            return config
        return config.with_values({"seed": run.train_seed, "output_name": f"lora_trial_{number}"})

    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        run = run_of(suggested)
        found = self.asked.chosen.get(run.of)
        return {OF: run.of, **(found.user_attrs.get("settings", {}) if found else {})}

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return {ROLE: BASELINE if run_of(suggested).of == self.asked.trial0 else CONFIRMS}

    def prepare(self, suggested: Mapping[str, Any], folder: TrialFolder) -> None:
        """For rescoring: the searched trial's file, unchanged since it was scored there."""
        if self.asked.how != RESCORED or folder.lora.is_file():
            return
        searched_trial = self.asked.source.trial(run_of(suggested).of)
        try:
            content = searched_trial.lora.read_bytes()
        except OSError as error:
            raise machine_error(error, searched_trial.lora) from error
        write_atomic(folder.lora, content)
        known = (read_json(searched_trial.result) or {}).get("lora_sha256")
        if sha256_file(folder.lora) != known:
            folder.lora.unlink()
            raise ModelFileError(
                f"{searched_trial.lora} has changed since the search scored it",
                "restore it, or leave out --rescore-only to train the trial again",
            )

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        if result.state not in (COMPLETE, INFEASIBLE):
            self._failed[run_of(suggested)] = f"{result.reason}: {result.message}"

    # The end

    def ended(self) -> str:
        """Raises MachineError if some of the runs failed, or are in other hands."""
        missing = [w for w in self.asked.wanted if w not in done_runs(self.bench.folder)]
        if missing:
            why = self._failed.get(missing[0], "another process works on it")
            raise MachineError(
                f"{len(missing)} of {len(self.asked.wanted)} runs are missing, first trial {missing[0].of}: {why}",
                "the same command tries again",
            )
        return "every run is there"
