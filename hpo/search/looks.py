"""Looks: trials are looked at while they are trained, and stopped if they are certainly behind.

Owns ``[search] pruner`` and ``looks``: after which steps a trial is looked at, what Optuna is told of it, and the
decision.  Does not own what a look shows (``evaluation.score.looking``) or the work of a trial (``hpo.search.trial``).

Every look is a line of the trial's looks.jsonl with its decision, before anything else happens.  So a trial that was
interrupted repeats no look and decides the same.  Optuna gets each as an intermediate value, whose step is the part of
the training in percent.

``behind`` compares a trial with the study's best one at the same look, prompt by prompt.  It is stopped if it is below
by more than z standard errors of the paired difference.  z is that of a one-sided test at 5 %, corrected for all looks
of all planned trials (Bonferroni): one of 30 trials with one look would be 3.1 standard errors below by chance.
"""

from __future__ import annotations

import json
import math
import time
from statistics import NormalDist
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search.samplers import startup_trials
from hpo.study import BASELINE, COUNTED, ROLE, StudyConfig, TrialFolder, is_feasible, rank
from trainer.errors import OutOfMemory
from trainer.files import append_line, read_records
from trainer.oom import memory_named

if TYPE_CHECKING:
    from evaluation.score import Look
    from hpo.search.workbench import Workbench

LEVEL = 0.05  # of wrongly stopping any trial of the study
LOOK = "look_"  # a trial's user attribute: the cosines of a look, after so many percent


class Stopped(Exception):
    """A trial is behind and stops here.  No error: it is a result.  ``value``: of its last look."""

    def __init__(self, value: float, message: str) -> None:
        super().__init__(message)
        self.value, self.message = value, message


def pruner_of(config: StudyConfig, total: int) -> optuna.pruners.BasePruner:
    """Optuna's pruner of that name.  ``behind`` decides here and has none."""
    name, startup = config.search.pruner, startup_trials(total)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=startup)
    if name == "halving":  # a rung is a look; half of the trials go on
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=percent(config.search.looks[0]), reduction_factor=2, bootstrap_count=0
        )
    return optuna.pruners.NopPruner()


def percent(part: float) -> int:
    return round(100 * part)


def look_images(bench: Workbench) -> int:
    """Images of all looks of a trial; 0 without a pruner."""
    from evaluation.score import looked_at

    search = bench.study.search
    if search.pruner == "none":
        return 0
    return len(marks(100, search.looks)) * looked_at(bench.prompts).image_count


def marks(steps: int, parts: tuple[float, ...]) -> dict[int, int]:
    """After which steps a training of so many is looked at: step → percent.  Never after the last step."""
    found = {math.ceil(steps * part): percent(part) for part in sorted(parts)}
    return {step: at for step, at in found.items() if 0 < step < steps}


class Looks:
    """The looks of one trial."""

    def __init__(self, bench: Workbench, trial: optuna.Trial, folder: TrialFolder, total: int) -> None:
        self.bench, self.trial, self.folder, self.total = bench, trial, folder, total
        self.study = trial.study
        self.study.pruner = pruner_of(bench.study, total)

    @classmethod
    def of(cls, bench: Workbench, trial: optuna.Trial, folder: TrialFolder, total: int) -> Looks | None:
        """None if the study has no pruner.  The baseline always runs to its end."""
        if bench.study.search.pruner == "none" or trial.user_attrs.get(ROLE) == BASELINE:
            return None
        return cls(bench, trial, folder, total)

    def marks(self, steps: int) -> dict[int, int]:
        return marks(steps, self.bench.study.search.looks)

    def after(self, step: int, at: int) -> None:
        """Look at the adapter in the base, ``at`` percent of its training.  Raises Stopped if it is behind.

        A look that runs out of memory is left out.
        """
        from evaluation.score import Look, look

        row = next((r for r in read_records(self.folder.looks) if r.get("percent") == at), None)
        if row is None:
            started = time.monotonic()
            row = {"percent": at, "step": step}
            try:
                with memory_named("out of memory while looking at the trial"):
                    found = look(self.bench.evaluator)
            except OutOfMemory as error:  # not for the trial's settings: every look draws the same images
                row["left_out"] = error.message
            else:
                row |= {**found.as_dict(), "stops": self._told(at, found)}
            row["seconds"] = round(time.monotonic() - started, 3)
            append_line(self.folder.looks, json.dumps(row))
        elif "value" in row:  # the process was killed afterwards
            self._report(at, Look.of(row))
        if row.get("left_out"):
            self.bench.release()
            append_line(self.folder.log, f"the look after {at} % is left out: {row['left_out']}")
        elif row["stops"]:
            raise Stopped(float(row["value"]), str(row["stops"]))

    def _report(self, at: int, found: Look) -> None:
        name = f"{LOOK}{at}"
        if name not in self.trial.user_attrs:
            self.trial.set_user_attr(name, found.as_dict())
            self.trial.report(found.value, at)

    def _told(self, at: int, found: Look) -> str:
        """Tell Optuna, and decide: why the trial stops, empty if it goes on."""
        self._report(at, found)
        if self.bench.study.search.pruner == "behind":
            return self._behind(at, found)
        if not self.trial.should_prune():
            return ""
        name = type(self.study.pruner).__name__
        return f"stopped by Optuna's {name} after {at} % of its training, at {found.value:.3f}"

    def _behind(self, at: int, found: Look) -> str:
        from evaluation.score import look_difference

        best = self._best(at)
        if best is None:
            return ""
        number, there = best
        below, se = look_difference(found, there, self.bench.evaluator)
        looks = max(1, self.total) * len(self.bench.study.search.looks)
        z = NormalDist().inv_cdf(1 - LEVEL / looks)
        if below + z * se >= 0:
            return ""
        return (
            f"stopped after {at} % of its training: at {found.value:.3f} it was {-below:.3f} ± {se:.3f} below "
            f"trial {number} at that point"
        )

    def _best(self, at: int) -> tuple[int, Look] | None:
        """The best finished trial with this look.  None before the random trials of the start are over."""
        from evaluation.score import Look

        done = self.study.get_trials(deepcopy=False, states=COUNTED)
        if len(done) < startup_trials(self.total):
            return None
        known = [t for t in done if self._compares(t, at)]
        best = max(known, key=rank, default=None)
        return None if best is None else (best.number, Look.of(best.user_attrs[f"{LOOK}{at}"]))

    def _compares(self, trial: FrozenTrial, at: int) -> bool:
        return trial.state == TrialState.COMPLETE and is_feasible(trial) and f"{LOOK}{at}" in trial.user_attrs
