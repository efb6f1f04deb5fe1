"""Which files of finished trials are needed, and the deletion of those that are not.

Owns the rule behind ``--keep-best`` and ``hpo clean``: LoRA files are kept of the best trials, of the Pareto front and
of a confirmed winner.  Results, metrics, grids and everything of an unfinished trial are always kept.  Does not own
whether a command works on the study; see ``hpo.cli.clean``.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from hpo.study.folder import RUNS, StudyFolder, TrialFolder, read_json
from hpo.study.standing import is_feasible, rank, score_of, standing
from hpo.study.which import OF_STUDY, all_studies, belongs_to
from hpo.study.work import steps
from trainer.files import folder_bytes, machine_error

if TYPE_CHECKING:
    import optuna

KEPT = 3  # as many as hpo confirm takes by default
LORA, STATE, IMAGES = "LoRA files", "resume states", "drawn images"
DRAWN = "samples"  # evaluation.score.score.SAMPLES_NAME, which loads torch; a test compares them


@dataclass(frozen=True)
class Unneeded:
    """A file or folder of a finished trial that nothing needs.  ``size``: what deleting it frees."""

    path: Path
    kind: str
    size: int

    def delete(self) -> None:
        """Raises MachineError if it cannot be deleted."""
        try:
            with contextlib.suppress(FileNotFoundError):
                if self.path.is_dir() and not self.path.is_symlink():
                    shutil.rmtree(self.path)
                else:
                    self.path.unlink()
        except OSError as error:
            raise machine_error(error, self.path) from error


def kept_trials(study: optuna.Study, folder: StudyFolder, keep: int) -> set[int]:
    """Trials whose files are kept: the best ``keep``, the Pareto front, and what a confirmation chose."""
    ranked = sorted(
        (t for t in study.get_trials(deepcopy=False) if is_feasible(t) and score_of(t) is not None),
        key=rank,
        reverse=True,
    )
    return {t.number for t in ranked[:keep]} | set(standing(study, 0).front) | _confirmed(folder)


def drop_files(study: optuna.Study, folder: StudyFolder, keep: int) -> None:
    """Delete LoRA files of finished trials, except of those that are kept.  Other files are kept."""
    kept = kept_trials(study, folder, keep)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE" and trial.number not in kept:
            folder.trial(trial.number).lora.unlink(missing_ok=True)


def unneeded(study: optuna.Study, folder: StudyFolder, keep: int) -> list[Unneeded]:
    """What ``hpo clean`` deletes: of all finished trials but the kept ones, LoRA files and drawn images; of every
    finished trial, what only resuming it would need."""
    kept = kept_trials(study, folder, keep)
    return [
        found
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished()
        for found in _of_trial(folder.trial(trial.number), trial, trial.number in kept)
    ]


def clean_advice(runs: Path) -> str:
    """The command that frees the disk space of trials in ``runs`` that need none, with the amount; empty if there is
    nothing to free, or no study.  Reads the databases, so it is only for the end of a command."""
    from hpo.study.storage import begun_study, database_errors

    total = 0
    for folder in all_studies(runs):
        with contextlib.suppress(Exception), database_errors(folder):
            study = begun_study(folder)
            if study is not None:
                total += sum(one.size for one in unneeded(study, folder, usual_keep(folder)))
    if not total:
        return ""
    words = "" if runs == RUNS else f" --runs {shlex.quote(str(runs))}"
    return f"hpo clean --all{words} frees {total / 1e6:.1f} MB"


def usual_keep(folder: StudyFolder) -> int:
    """The last search's ``--keep-best``; without one, as many trials as ``hpo confirm`` takes."""
    for step in reversed(steps(folder.root)):
        if step.words[:1] == ("search",):
            if (given := _value_of("--keep-best", step.words)).isdecimal() and int(given) > 0:
                return int(given)
            break
    return KEPT


def _value_of(option: str, words: tuple[str, ...]) -> str:
    """The last value of an option in a command line; empty without one."""
    found = ""
    for word, following in zip(words, (*words[1:], ""), strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def _of_trial(folder: TrialFolder, trial: FrozenTrial, kept: bool) -> Iterator[Unneeded]:
    if folder.checkpoints.is_dir():
        yield Unneeded(folder.checkpoints, STATE, folder_bytes(folder.checkpoints))
    if kept:
        return
    if folder.lora.is_file():
        yield Unneeded(folder.lora, LORA, _freed([folder.lora]))
    drawn = folder.root / DRAWN
    if drawn.is_dir():
        yield Unneeded(drawn, IMAGES, _freed(drawn.iterdir()))


def _freed(files: Iterable[Path]) -> int:
    """What deleting files frees.  Another name of the same file (``hpo search --fork-from``) keeps its bytes."""
    found = [path.stat() for path in files]
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _confirmed(folder: StudyFolder) -> set[int]:
    """Of a search: the confirmed winner.  Of a confirmation: the runs that repeat the winner."""
    of = belongs_to(read_json(folder.facts))
    confirms = of is not None and of[0] == OF_STUDY
    source = StudyFolder(folder.root.with_name(of[1])) if confirms and of else folder
    found = read_json(source.confirmed) or {}
    try:
        winner = int(found["winner"])
        if not confirms:
            return {winner}
        rows = [row for row in found["rows"] if int(row["number"]) == winner]
        return {int(number) for row in rows for number in row["confirming_trials"]}
    except (KeyError, TypeError, ValueError):
        return set()
