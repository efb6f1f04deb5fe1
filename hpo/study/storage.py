"""The study's database: opening, creating, and readable errors.

Owns what is different for a file and for a server.  Does not own where it is (``hpo.study.place``), the connections to
a server (``hpo.study.server``) or claims (``hpo.study.ownership``).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.study.folder import GO_ON, IDENTITY, StudyFolder, another_name
from hpo.study.place import Place, address, beside, is_renamed, place_of, settle, without_password
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
    "fuse.sshfs",
)  # locks that may not hold between machines
# In WSL2, the Windows drives: only this machine uses them, but they have no shared memory
WITHOUT_WAL = (*NETWORK_FILE_SYSTEMS, "9p", "drvfs")
AT_OWN_RISK = "HPO_SQLITE_ON_NETWORK"
FOLDER = "hpo:folder"  # a study user attribute: ``Place.folder``


def where(folder: StudyFolder) -> str:
    """The database, for messages."""
    place = place_of(folder)
    return str(folder.database) if place is None else f"study {place.study} at {place.url}"


def require_local(folder: StudyFolder) -> None:
    """Refuse to work on a SQLite file on a network disk.  It can still be read."""
    if place_of(folder) is not None or os.environ.get(AT_OWN_RISK) == "1":
        return
    kind = file_system(folder.root)
    if kind not in NETWORK_FILE_SYSTEMS:
        return
    if folder.has_study:
        advice = "copy the folder to a local disk and go on there: --runs FOLDER"
    else:
        advice = "use --runs on a local disk, or for several machines --storage postgresql+psycopg://…"
    raise MachineError(
        f"{folder.root} is on a network disk ({kind}), where SQLite can lose trials",
        f"{advice} (docs/scale-out.md); {AT_OWN_RISK}=1 goes on at your own risk, on one machine at a time",
    )


@contextmanager
def database_errors(folder: StudyFolder) -> Iterator[None]:
    """Turn errors of a locked, full or corrupt database into MachineError."""
    import optuna

    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = getattr(error.__cause__, "orig", None) or error.__cause__ or error
        raise MachineError(
            f"{where(folder)} cannot be read or written: {first_line(reason)}", GO_ON
        ) from error


def open_storage(folder: StudyFolder) -> optuna.storages.RDBStorage:
    """Open the database as an Optuna storage.  Raises MachineError if it cannot be opened or is not a database."""
    import optuna

    if (place := place_of(folder)) is not None:
        from hpo.study.server import server_of

        return server_of(place).storage

    url = folder.url
    try:
        with _one_opens(folder.database.parent):
            _write_ahead(folder.database)
            return optuna.storages.RDBStorage(
                url, engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_SECONDS}}
            )
    except Exception as error:  # sqlite3, SQLAlchemy and alembic raise different types
        reason = clean_text(first_line(error))
        raise MachineError(
            f"cannot open {folder.database}: {reason}", f"restore the file, or start a study {another_name()}"
        ) from error


@contextmanager
def _one_opens(parent: Path) -> Iterator[None]:
    """Let one process at a time create the tables of a database in this folder.

    SQLAlchemy looks which tables are missing and then creates them.  Two processes that open a new database
    at once would both create them, and one of them would fail.  The lock is on the folder: a lock on the file would
    meet SQLite's own ones.  A disk without such locks goes on without it.
    """
    descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_ahead(database: Path) -> None:
    """Enable WAL, so that readers (dashboard, status) and the writer do not block each other.  Local disks only."""
    if file_system(database.parent) in WITHOUT_WAL:
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
    place = Path(os.path.realpath(folder))  # it need not exist
    above = [(row[1], row[2]) for row in rows if len(row) > 2 and place.is_relative_to(row[1])]
    return max(above, key=lambda row: len(row[0]))[1] if above else ""


def begun_study(folder: StudyFolder) -> optuna.Study | None:
    """The study in the folder.  None if there is none (a killed process may leave a database without a study)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not folder.has_study:
        return None
    with database_errors(folder):
        storage = open_storage(folder)
        name = stored_name(folder, storage)
        if name is None:
            return None
        study = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler())
        _check_own(folder, study)
        return study


def stored_name(folder: StudyFolder, storage: optuna.storages.RDBStorage) -> str | None:
    """The name of the folder's study in its database.  It keeps it if the folder is renamed.  None: it is not there."""
    import optuna

    names = optuna.get_all_study_names(storage)
    if (place := place_of(folder)) is not None:
        return place.study if place.study in names else None
    if len(names) > 1:
        raise ConfigError(
            f"{folder.database} contains {len(names)} studies instead of one",
            f"start a study {another_name()}",
        )
    return names[0] if names else None


def _check_own(folder: StudyFolder, study: optuna.Study) -> None:
    """Refuse a study of the same name that belongs to another folder."""
    place = place_of(folder)
    if place is None or study.user_attrs.get(FOLDER) == place.folder:
        return
    if FOLDER in study.user_attrs or study.user_attrs.get(IDENTITY) or study.get_trials(deepcopy=False):
        raise ConfigError(
            f"the database at {place.url} has a study {place.study} that belongs to another runs folder",
            f"put --runs on a folder that all machines share, or start a study {another_name()}",
        )


def open_place(folder: StudyFolder, place: Place | None) -> None:
    """Before anything is loaded: whether the server can be reached, and its study of that name is not another one."""
    if place is None:
        return
    if folder.storage.is_file():
        if is_renamed(place) and begun_study(folder) is None:
            raise ConfigError(
                f"study {place.study} is in the database at {place.url}; "
                f"there is none at {without_password(address(place))}",
                "if this is another server, leave --storage and HPO_STORAGE out; if it is the same one under another "
                "name, run this command again when the first worker has begun",
            )
        return
    import optuna

    from hpo.study.server import server_of

    if place.study in optuna.get_all_study_names(server_of(place).storage):
        raise ConfigError(
            f"the database at {place.url} already has a study {place.study}, and it belongs to another runs folder",
            f"put --runs on a folder that all machines share, or start a study {another_name()}",
        )


def follow(folder: StudyFolder, parent: StudyFolder) -> None:
    """Keep a confirmation or target trials where the study is that they belong to."""
    settle(folder, beside(folder, parent))


def delete_from_server(place: Place) -> None:
    """Delete a study that this process has created and not used."""
    import optuna

    from hpo.study.server import server_of

    optuna.delete_study(study_name=place.study, storage=server_of(place).storage)


def open_study(folder: StudyFolder) -> optuna.Study:
    """The study in an existing folder."""
    if not folder.has_study:
        raise ConfigError(f"{folder.root} has no study.db", f"restore it, or start a study {another_name()}")
    study = begun_study(folder)
    if study is None:
        raise ConfigError(
            f"{where(folder)} contains no study"
            if place_of(folder) is None
            else f"there is no {where(folder)}",
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
    require_local(folder)
    begun = begun_study(folder)
    if begun is None and folder.trial_folders():
        missing = "its study was deleted" if folder.has_study else "study.db is missing"
        raise ConfigError(
            f"{folder.root} has trials but {missing}", f"restore it, or start a study {another_name()}"
        )
    storage, place = open_storage(folder), place_of(folder)
    study = optuna.create_study(
        study_name=begun.study_name if begun else place.study if place else folder.name,
        storage=storage,
        directions=["maximize"] * len(objectives),
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    if place is not None and FOLDER not in study.user_attrs:
        study.set_user_attr(FOLDER, place.folder)
    # load_if_exists keeps the existing directions
    if any(direction != optuna.study.StudyDirection.MAXIMIZE for direction in study.directions):
        raise ConfigError(
            f"the study in {where(folder)} minimizes, but scores are maximized",
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
