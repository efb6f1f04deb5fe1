"""Shared use of a study folder.  An error before the study starts removes the files that were created."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.study.locks import Lock
from hpo.study.place import place_of
from hpo.study.storage import begun_study, delete_from_server
from trainer.errors import ConfigError
from trainer.files import machine_error

if TYPE_CHECKING:
    from hpo.study.folder import StudyFolder


@dataclass
class Use:
    """One process's use of a study folder, and what it may remove after an error."""

    folder: StudyFolder
    before: frozenset[str] | None  # names in the folder at the start; None: the folder did not exist
    made_study: bool = False  # this process created the study in the database
    begun: bool = False  # from now on nothing is removed


@contextmanager
def in_use(folder: StudyFolder) -> Iterator[Use]:
    """Share a study folder for a block.

    An error before the study starts removes everything that the block created.  Exceptions: another process
    shares the folder, or the folder contains a study that this process did not create or that has trials.
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


@contextmanager
def read_from(folder: StudyFolder) -> Iterator[None]:
    """Share the folder of another study for a block that reads its files: no ``hpo clean`` or ``hpo delete`` changes it
    meanwhile.  Raises ConfigError if it was just deleted."""
    lock = Lock(folder.locks / "use.lock")
    with lock.held(shared=True):
        if not folder.has_study:  # moved away while this process waited; the lock has made a folder again
            with contextlib.suppress(OSError):
                lock.path.unlink()
                folder.locks.rmdir()
                folder.root.rmdir()
            raise ConfigError(
                f"there is no study {folder.name} any more in {folder.root.parent}",
                "restore it if it was deleted (hpo delete moves a study to the trash)",
            )
        yield


def _is_own(use: Use) -> bool:
    """Whether the folder contains no work of other processes.  Call while no other process shares it."""
    from optuna.trial import TrialState

    folder = use.folder
    try:
        study = begun_study(folder)
        if study is None:
            return not folder.trial_folders()
        trials = study.get_trials(deepcopy=False)
        return use.made_study and all(t.state == TrialState.WAITING for t in trials)
    except Exception:  # never delete a database that cannot be read
        return False


def _take_back(use: Use) -> None:
    root, database = use.folder.root, use.folder.database.name
    if use.made_study and (place := place_of(use.folder)) is not None:
        with contextlib.suppress(Exception):  # it is empty; the error that led here is shown
            delete_from_server(place)
    for path in list(root.iterdir()) if root.is_dir() else ():
        own = use.made_study and path.name.startswith((database, use.folder.storage.name))
        if use.before is None or path.name not in use.before or own:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    if use.before is None:
        with contextlib.suppress(OSError):
            root.rmdir()
