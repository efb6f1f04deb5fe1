"""A process's share in a study folder: an error before the study has begun takes back what was made."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.study.locks import Lock
from hpo.study.storage import begun_study
from trainer.files import machine_error

if TYPE_CHECKING:
    pass
from hpo.study.folder import StudyFolder


@dataclass
class Use:
    """A process's share in a study folder, and what it may take back of it."""

    folder: StudyFolder
    before: frozenset[str] | None  # what lay in the folder; None: there was none
    made_study: bool = False  # the study in the database is this process's own
    begun: bool = False  # from here on nothing is taken back


@contextmanager
def in_use(folder: StudyFolder) -> Iterator[Use]:
    """Share a study folder for a block.

    An error before the study has begun takes back what the block made – unless another process shares the
    folder too, or a study is in it that this process did not make, or that has trials.
    """
    runs = folder.root.parent
    try:
        had_runs = runs.exists()
        names = frozenset(p.name for p in folder.root.iterdir()) if folder.root.is_dir() else None
    except OSError as error:
        raise machine_error(error, folder.root) from error
    use, lock = Use(folder, names), Lock(folder.locks / "use.lock")
    with lock.held(shared=True):
        try:
            yield use
        except Exception:
            if not use.begun and lock.try_alone() and _is_own(use):
                _take_back(use)
                if not had_runs:
                    with contextlib.suppress(OSError):
                        runs.rmdir()
            raise


def _is_own(use: Use) -> bool:
    """Whether no work of anybody is in the folder.  Call while nobody else shares it."""
    from optuna.trial import TrialState

    folder = use.folder
    try:
        study = begun_study(folder) if folder.database.is_file() else None
        if study is None:
            return not folder.trial_folders()
        trials = study.get_trials(deepcopy=False)
        return use.made_study and all(t.state == TrialState.WAITING for t in trials)
    except Exception:  # a database that cannot be read is nobody's to delete
        return False


def _take_back(use: Use) -> None:
    root, database = use.folder.root, use.folder.database.name
    for path in list(root.iterdir()) if root.is_dir() else ():
        own = use.made_study and path.name.startswith(database)
        if use.before is None or path.name not in use.before or own:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    if use.before is None:
        with contextlib.suppress(OSError):
            root.rmdir()
