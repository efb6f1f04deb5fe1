"""The study's database: opening, creating, and readable errors."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.study.folder import GO_ON, IDENTITY, StudyFolder, another_name
from hpo.study.sections import BELOW_ZERO, OBJECTIVE, SCORE
from trainer.errors import ConfigError, MachineError, first_line
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

LOCK_WAIT_SECONDS = 60  # SQLite: how long a writer waits for another writer


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
    """Turn errors of a locked, full or corrupt database into MachineError."""
    import optuna

    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = getattr(error.__cause__, "orig", None) or error.__cause__ or error
        raise MachineError(f"{folder.database} cannot be read or written: {reason}", GO_ON) from error


def open_storage(folder: StudyFolder) -> optuna.storages.RDBStorage:
    """Open the database as an Optuna storage.  Raises MachineError if it cannot be opened or is not a database."""
    import optuna

    url = folder.url
    try:
        _write_ahead(folder.database)
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_SECONDS}})
    except Exception as error:  # sqlite3, SQLAlchemy and alembic raise different types
        reason = clean_text(first_line(error))
        raise MachineError(
            f"cannot open {folder.database}: {reason}", f"restore the file, or start a study {another_name()}"
        ) from error


def _write_ahead(database: Path) -> None:
    """Enable WAL, so that readers (dashboard, status) and the writer do not block each other.  Local disks only."""
    if file_system(database.parent) in NETWORK_FILE_SYSTEMS:
        return
    connection = sqlite3.connect(database, timeout=LOCK_WAIT_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def file_system(folder: Path) -> str:
    """The file system type of a folder, from /proc/mounts.  Empty if unknown."""
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    place = folder.resolve()
    above = [(row[1], row[2]) for row in rows if len(row) > 2 and place.is_relative_to(row[1])]
    return max(above, key=lambda row: len(row[0]))[1] if above else ""


def begun_study(folder: StudyFolder) -> optuna.Study | None:
    """The study in the folder.  None if there is none (a killed process may leave a database without a study)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not folder.database.is_file():
        return None
    with database_errors(folder):
        storage = open_storage(folder)
        names = optuna.get_all_study_names(storage)
        if len(names) > 1:
            raise ConfigError(
                f"{folder.database} contains {len(names)} studies instead of one",
                f"start a study {another_name()}",
            )
        if not names:
            return None
        return optuna.load_study(
            study_name=names[0], storage=storage, sampler=optuna.samplers.RandomSampler()
        )


def open_study(folder: StudyFolder) -> optuna.Study:
    """The study in an existing folder."""
    if not folder.database.is_file():
        raise ConfigError(f"{folder.root} has no study.db", f"restore it, or start a study {another_name()}")
    study = begun_study(folder)
    if study is None:
        raise ConfigError(
            f"{folder.database} contains no study",
            "start it with hpo search, or restore it if it was deleted",
        )
    return study


def create_study(
    folder: StudyFolder, facts: Mapping[str, str], objectives: Sequence[str] = ("score",)
) -> optuna.Study:
    """Open the folder's study, or create it.  Call with the study lock held.  ``objectives`` are maximized.

    Raises ConfigError instead of creating an empty study in a folder that has trials of a lost one.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if begun_study(folder) is None and folder.trial_folders():
        missing = "its study was deleted" if folder.database.is_file() else "study.db is missing"
        raise ConfigError(
            f"{folder.root} has trials but {missing}", f"restore it, or start a study {another_name()}"
        )
    storage = open_storage(folder)
    # At most one; the study keeps its name if the folder is renamed.
    names = optuna.get_all_study_names(storage)
    study = optuna.create_study(
        study_name=names[0] if names else folder.name,
        storage=storage,
        directions=["maximize"] * len(objectives),
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    # load_if_exists keeps the existing directions
    if any(direction != optuna.study.StudyDirection.MAXIMIZE for direction in study.directions):
        raise ConfigError(
            f"the study in {folder.database} minimizes, but scores are maximized",
            f"start a study {another_name()}",
        )
    if len(study.directions) != len(objectives):
        raise ConfigError(
            f"study {folder.name} was started with {len(study.directions)} objective(s), but now has {len(objectives)}",
            f"undo the change, or start a new study {another_name()}",
        )
    if IDENTITY not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(metric_names(facts, objectives))
        study.set_user_attr(IDENTITY, dict(facts))
    return study


def metric_names(facts: Mapping[str, str], objectives: Sequence[str]) -> list[str]:
    """The names of the told values in the dashboard.  A score that continues below 0 is called the objective."""
    signed = BELOW_ZERO in facts
    return [OBJECTIVE if name == SCORE and signed else name for name in objectives]
