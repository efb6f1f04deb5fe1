"""The proposals of a confirmation: one run after the other, each a trial of the search with a new training seed.

Owns the settings of a run and, with ``--rescore-only``, the copy of the trial's LoRA file.  Does not own
which runs are needed; see ``hpo.confirm.wanted``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from hpo.confirm.outcome import RESCORED
from hpo.confirm.wanted import (
    CONFIRMS,
    DISTRIBUTIONS,
    OF,
    TRAIN_SEED,
    Confirmation,
    Wanted,
    done_runs,
    run_of,
)
from hpo.search import Proposal, Proposals
from hpo.study import BASELINE, COMPLETE, INFEASIBLE, ROLE, Result, Standing, TrialFolder, read_json
from trainer.config import TrainConfig
from trainer.errors import RESUME, MachineError, ModelFileError
from trainer.files import machine_error, sha256_file, write_atomic

if TYPE_CHECKING:
    from hpo.search import Workbench
    from trainer.data import Dataset


def suggested_run(trial: optuna.Trial) -> dict[str, Any]:
    """The parameters of the run.  Also works for an adopted trial whose process died before they were set."""
    return {
        name: trial.suggest_int(name, distribution.low, distribution.high)
        for name, distribution in DISTRIBUTIONS.items()
    }


class ConfirmProposals(Proposals):
    """All needed runs that have no result yet."""

    noun = "run"

    def __init__(self, study: optuna.Study, bench: Workbench, confirmation: Confirmation) -> None:
        self.study, self.bench, self.asked = study, bench, confirmation
        self._failed: dict[Wanted, str] = {}  # failures of this call; the next call retries them

    @property
    def total(self) -> int:
        return len(self.asked.wanted)

    def samples(self, config: TrainConfig, data: Dataset) -> int:
        return 0 if self.asked.how == RESCORED else super().samples(config, data)

    def samples_ahead(self, now: Standing) -> float | None:
        """The mean of all runs: they come in rounds of all configurations."""
        configs = [self.config({OF: number, TRAIN_SEED: 0}, number) for number in self.asked.chosen]
        return sum(self.samples(config, self.bench.data) for config in configs) / max(1, len(configs))

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
        """The settings of the searched trial with the seed and name of this run.  Rescoring keeps seed and name."""
        run = run_of(suggested)
        params = self.asked.source.trial(run.of).params
        values = (read_json(params) or {}).get("train")
        if values is None:
            raise MachineError(f"{params} is missing or damaged", "restore the file, or confirm fewer trials")
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
        return {"repeated_trial": run.of, **(found.user_attrs.get("settings", {}) if found else {})}

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        return {ROLE: BASELINE if run_of(suggested).of == self.asked.trial0 else CONFIRMS}

    def prepare(self, suggested: Mapping[str, Any], folder: TrialFolder) -> None:
        """For rescoring: copy the LoRA file of the searched trial and check that it has not
        changed since the search."""
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
                "restore the file, or run without --rescore-only to train the trial again",
            )

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        if result.state not in (COMPLETE, INFEASIBLE):
            self._failed[run_of(suggested)] = f"{result.reason}: {result.message}"

    # The end

    def ended(self) -> str:
        """Raises MachineError if a run failed or is being processed by another process."""
        missing = [w for w in self.asked.wanted if w not in done_runs(self.bench.folder)]
        if missing:
            why = self._failed.get(missing[0], "another process is working on it")
            raise MachineError(
                f"{len(missing)}/{len(self.asked.wanted)} runs are missing, first trial {missing[0].of}: {why}",
                f"to retry: {RESUME}",
            )
        return "all runs are complete"
