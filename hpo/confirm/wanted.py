"""Which runs a confirmation needs: trial 0 and the best trials, each with new training seeds; and their cost.

Owns the request, the choice of trials and the study names.  Does not run anything; see ``hpo.confirm.run``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.confirm.outcome import RESCORED, RETRAINED
from hpo.study import (
    BASELINE,
    IDENTITY,
    ROLE,
    RUNS,
    TOTAL,
    StudyFolder,
    find_folder,
    is_feasible,
    open_study,
    parent_of,
    rank,
    read_json,
    score_of,
    standing,
)
from hpo.terminal import clock
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from evaluation.prompts import PromptSet

SUFFIX = {RETRAINED: "__confirm", RESCORED: "__rescore"}
OF, TRAIN_SEED = "of", "train_seed"  # the parameters of a run
DISTRIBUTIONS = {
    OF: optuna.distributions.IntDistribution(0, 999_999),
    TRAIN_SEED: optuna.distributions.IntDistribution(0, 2**31 - 1),
}
CONFIRMS = "confirms"  # role of the runs of all trials except trial 0
CHOSEN = ""  # no --device: the device that this process chooses for itself
STREAM = 1  # random stream of the training seeds, so that none equals a seed of the search


@dataclass(frozen=True)
class ConfirmRequest:
    """The command-line arguments of ``hpo confirm``."""

    name: str | None
    top: int = 3
    seeds: int = 2
    rescore_only: bool = False
    anyway: bool = False
    runs: Path = RUNS
    device: str | None = None  # None: as in the search; CHOSEN: chosen anew


@dataclass(frozen=True)
class Wanted:
    """One needed run: the number of a searched trial and a training seed."""

    of: int
    train_seed: int

    @property
    def suggested(self) -> dict[str, Any]:
        return {OF: self.of, TRAIN_SEED: self.train_seed}


@dataclass(frozen=True)
class Confirmation:
    """What one call confirms: the study, the chosen trials, the needed runs, and whether to retrain or rescore."""

    source: StudyFolder
    chosen: Mapping[int, FrozenTrial]  # trials of the search, by number
    wanted: tuple[Wanted, ...]
    how: str
    device: str | None = None

    @property
    def target(self) -> StudyFolder:
        """The study that holds the runs as trials."""
        return StudyFolder(self.source.root.with_name(self.source.name + SUFFIX[self.how]))

    @property
    def trial0(self) -> int | None:
        """The number of the trial with the default settings, if it is among the chosen ones."""
        return next((n for n, t in self.chosen.items() if t.user_attrs.get(ROLE) == BASELINE), None)


def run_of(params: Mapping[str, Any]) -> Wanted:
    """The run of a trial with these parameters.  Without parameters: a run that matches no needed one."""
    return Wanted(params.get(OF, -1), params.get(TRAIN_SEED, -1))


def fresh_seed(study_seed: int, repeat: int) -> int:
    """Training seed of the n-th repeat.  It is the same for all configurations, so repeats are paired."""
    state = np.random.SeedSequence([study_seed, STREAM, repeat]).generate_state(1)[0]
    return int(state) & 0x7FFFFFFF


def source_of(request: ConfirmRequest) -> StudyFolder:
    """The searched study: the named one, else the one last worked on.  Those of a confirmation or
    of target trials lead to their search."""
    found = find_folder(request.name, request.runs)
    name = parent_of(found)
    return found if name is None else find_folder(name, found.root.parent)


def chosen_trials(
    study: optuna.Study, source: StudyFolder, request: ConfirmRequest
) -> tuple[list[FrozenTrial], list[str]]:
    """Trial 0 and the best other trials, and notes for the user about the choice."""
    done = [
        t
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if is_feasible(t) and score_of(t) is not None
    ]
    zero = next((t for t in done if t.user_attrs.get(ROLE) == BASELINE), None)
    ranked = sorted((t for t in done if t is not zero), key=rank, reverse=True)
    if not ranked:
        raise ConfigError(
            f"study {source.name} has no scored trial other than trial 0",
            f"continue the search first; for its state: hpo status {source.words}",
        )
    chosen, notes = ([zero] if zero else []) + ranked[: request.top], []
    if zero is None:
        trouble = standing(study, 0).baseline_trouble or "it has not run"
        notes.append(f"trial 0 (the default settings) has no score and cannot be confirmed: {trouble}")
    if left := standing(study, study.user_attrs.get(TOTAL, 0)).left:
        notes.append(f"the search is not finished: {left} trials are left")
    if request.rescore_only:
        kept = [t for t in chosen if source.trial(t.number).lora.is_file()]
        gone = ", ".join(str(t.number) for t in chosen if t not in kept)
        if not [t for t in kept if t is not zero]:
            raise DataError(
                f"the LoRA files of trials {gone} are missing (--keep-best deletes all but the best)",
                f"run without --rescore-only to train them again: hpo confirm {source.words}",
            )
        if gone:
            notes.append(
                f"warning: the LoRA files of trials {gone} are missing (--keep-best deletes all but the best), "
                f"so these trials are skipped; run without --rescore-only to train them again"
            )
        chosen = kept
    return chosen, notes


def wanted_runs(chosen: list[FrozenTrial], study: optuna.Study, request: ConfirmRequest) -> list[Wanted]:
    """All runs, ordered by repeat, so that an interrupted confirmation has comparable runs of all trials."""
    seed = int(study.user_attrs.get(IDENTITY, {}).get("seed", 0))
    if request.rescore_only:
        return [Wanted(t.number, seed) for t in chosen]
    return [Wanted(t.number, fresh_seed(seed, repeat)) for repeat in range(request.seeds) for t in chosen]


def confirmation_prompts(
    source: StudyFolder, count_tokens: Callable[[str], int] = lambda text: 0
) -> PromptSet:
    """The confirmation prompts of the study."""
    from hpo.study import read

    if not source.confirmation.is_file():
        raise ConfigError(
            f"study {source.name} has no confirmation set",
            f"write prompts that the search did not use to {source.confirmation} (format: docs/evaluation.md)",
        )
    return read(source.confirmation, count_tokens)


def cost_line(asked: Confirmation) -> str:
    """The remaining work and its expected duration, based on the times measured in the search."""
    images = confirmation_prompts(asked.source).image_count
    done = done_runs(asked.target)
    pending = [w for w in asked.wanted if w not in done]
    if not pending:
        return f"all {len(asked.wanted)} runs are finished already; nothing is trained or generated again"
    seconds, known = 0.0, True
    for run in pending:
        result = read_json(asked.source.trial(run.of).result) or {}
        if not result.get("n_images"):
            known = False
            continue
        each = result["score_seconds"] / result["n_images"]
        seconds += each * images + (result["train_seconds"] if asked.how == RETRAINED else 0.0)
    if known and pending and not asked.target.anchors.is_file():
        seconds += each * images
    about = f"about {clock(seconds)}, based on the search" if known else "time unknown"
    retrained = asked.how == RETRAINED
    one = len(pending) == 1
    what = (
        f"training{'' if one else 's'} with new seeds"
        if retrained
        else f"saved LoRA file{'' if one else 's'}"
    )
    what += "," if one else ", each"
    what += " with"
    numbers = ", ".join(map(str, asked.chosen))
    return f"cost: {len(pending)} {what} {images} confirmation images: {about} (trials {numbers})"


def shown_run(suggested: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a run in words."""
    run = run_of(suggested)
    return {"repeats": f"trial {run.of}", "training seed": run.train_seed}


def done_runs(target: StudyFolder) -> set[Wanted]:
    if not target.has_study:
        return set()
    trials = open_study(target).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {run_of(t.params) for t in trials}
