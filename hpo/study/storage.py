"""The study's database: opened, created, and its troubles said in the user's words."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.study.folder import GO_ON, IDENTITY, StudyFolder
from trainer.errors import ConfigError, MachineError, first_line
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

LOCK_WAIT_SECONDS = 60  # SQLite: how long a writer waits for another


NETWORK_FILE_SYSTEMS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "drvfs",
    "fuse.sshfs",
)  # no shared memory: no WAL


@contextmanager
def database_errors(folder: StudyFolder) -> Iterator[None]:
    """A database that is locked, full or broken, as one line of what and one of what to do."""
    import optuna

    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = getattr(error.__cause__, "orig", None) or error.__cause__ or error
        raise MachineError(f"{folder.database} cannot be read or written: {reason}", GO_ON) from error


def open_storage(folder: StudyFolder) -> optuna.storages.RDBStorage:
    """The database as Optuna's storage.  Raises MachineError if it is not a database, or cannot be opened."""
    import optuna

    url = folder.url
    try:
        _write_ahead(folder.database)
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_SECONDS}})
    except Exception as error:  # sqlite3, SQLAlchemy and alembic each raise their own kinds
        reason = clean_text(first_line(error))
        raise MachineError(
            f"cannot open {folder.database}: {reason}", "restore the file, or give another --name"
        ) from error


def _write_ahead(database: Path) -> None:
    """Readers (dashboard, status) and the writer do not wait for each other.  Local disks only."""
    if file_system(database.parent) in NETWORK_FILE_SYSTEMS:
        return
    connection = sqlite3.connect(database, timeout=LOCK_WAIT_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def file_system(folder: Path) -> str:
    """Type of the file system a folder is on, from /proc/mounts; empty if unknown."""
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    place = folder.resolve()
    above = [(row[1], row[2]) for row in rows if len(row) > 2 and place.is_relative_to(row[1])]
    return max(above, key=lambda row: len(row[0]))[1] if above else ""


def begun_study(folder: StudyFolder) -> optuna.Study | None:
    """The study in the folder; None before there is one (a kill may leave a database without it)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not folder.database.is_file():
        return None
    with database_errors(folder):
        storage = open_storage(folder)
        names = optuna.get_all_study_names(storage)
        if len(names) > 1:
            raise ConfigError(f"{folder.database} holds {len(names)} studies, not one", "give another --name")
        if not names:
            return None
        return optuna.load_study(
            study_name=names[0], storage=storage, sampler=optuna.samplers.RandomSampler()
        )


def open_study(folder: StudyFolder) -> optuna.Study:
    """The study in an existing folder."""
    if not folder.database.is_file():
        raise ConfigError(f"{folder.root} has no study.db", "restore it, or give another --name")
    study = begun_study(folder)
    if study is None:
        raise ConfigError(
            f"{folder.database} holds no study", "begin it with hpo search, or restore it if it was deleted"
        )
    return study


def create_study(
    folder: StudyFolder, facts: Mapping[str, str], objectives: Sequence[str] = ("score",)
) -> optuna.Study:
    """The folder's study, created if need be.  Call with the study lock held.  ``objectives`` are maximized.

    Never makes a fresh, empty study where trial folders of a lost one lie.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if begun_study(folder) is None and folder.trial_folders():
        missing = "its study is deleted" if folder.database.is_file() else "study.db is missing"
        raise ConfigError(f"{folder.root} has trials but {missing}", "restore it, or give another --name")
    storage = open_storage(folder)
    names = optuna.get_all_study_names(storage)  # one at most; a renamed folder keeps its study's name
    study = optuna.create_study(
        study_name=names[0] if names else folder.name,
        storage=storage,
        directions=["maximize"] * len(objectives),
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    # load_if_exists keeps the directions it finds
    if any(direction != optuna.study.StudyDirection.MAXIMIZE for direction in study.directions):
        raise ConfigError(f"{folder.database} minimizes; a score is maximized", "give another --name")
    if len(study.directions) != len(objectives):
        raise ConfigError(
            f"study {folder.name} began with {len(study.directions)} objective(s), and now has {len(objectives)}",
            "give the new study another --name, or undo the change",
        )
    if IDENTITY not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))
        study.set_user_attr(IDENTITY, dict(facts))
    return study
