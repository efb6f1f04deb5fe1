"""StudyFolder: every path of runs/<study>/, and the Optuna study that lives in it.

Owns names of files, opening and creating the SQLite study, and the check that a folder and its database
belong together.  Does not own what is written there.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.locks import Lock
from trainer.errors import ConfigError, DataError, MachineError, ModelFileError
from trainer.files import clean_text, safe_name

if TYPE_CHECKING:
    import optuna

RUNS = Path("runs")
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
# Study user attributes: the facts that must not change, and the trials last asked for.
IDENTITY, TOTAL = "hpo:identity", "hpo:trials"


@dataclass(frozen=True)
class TrialFolder:
    """runs/<study>/trial_0007/."""

    root: Path
    number: int

    @property
    def params(self) -> Path:
        return self.root / "params.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def lora(self) -> Path:
        return self.root / f"lora_trial_{self.number}.safetensors"

    @property
    def steps(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def grid(self) -> Path:
        return self.root / "grid.png"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def starts(self) -> Path:
        return self.root / "starts.jsonl"


@dataclass(frozen=True)
class StudyFolder:
    """runs/<study>/."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def database(self) -> Path:
        return self.root / "study.db"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.database.resolve()}"

    @property
    def locks(self) -> Path:
        return self.root / ".locks"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def facts(self) -> Path:
        return self.root / "study.json"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.toml"

    @property
    def confirmation(self) -> Path:
        return self.root / "confirmation.toml"

    @property
    def base_images(self) -> Path:
        return self.root / "base"

    @property
    def alert(self) -> Path:
        return self.root / "CONVERGENCE_ALERT.txt"

    @property
    def convergence(self) -> Path:
        return self.root / "convergence.json"

    def trial(self, number: int) -> TrialFolder:
        return TrialFolder(self.root / f"trial_{number:04d}", number)

    def trial_folders(self) -> list[TrialFolder]:
        """The trial folders that exist, by number."""
        found = [p for p in self.root.glob("trial_*") if p.name.removeprefix("trial_").isdecimal()]
        return [self.trial(int(p.name.removeprefix("trial_"))) for p in sorted(found)]

    def study_lock(self) -> Lock:
        return Lock(self.locks / "study.lock")

    def trial_lock(self, number: int) -> Lock:
        return Lock(self.locks / f"trial_{number:04d}.lock")


def study_folder(name: str, runs: Path = RUNS) -> StudyFolder:
    """The folder of a study, whether or not it exists."""
    return StudyFolder(runs / safe_name(name, "study name"))


def find_folder(name: str | None, runs: Path = RUNS) -> StudyFolder:
    """An existing study: the named one, or the one that changed last."""
    found = {p.parent.name: p for p in runs.glob("*/study.db")} if runs.is_dir() else {}
    if name is not None:
        folder = study_folder(name, runs)
        if folder.name not in found:
            known = ", ".join(sorted(found)) or "none yet"
            raise ConfigError(f"no study {name} in {runs}", f"known: {known}")
        return folder
    if not found:
        raise ConfigError(f"no study in {runs}", "start one: hpo search --base mini-sd15 --trials 12")
    return StudyFolder(max(found.values(), key=_changed).parent)


@contextmanager
def taken_back(folder: StudyFolder) -> Iterator[None]:
    """Remove a study folder that this block made, if a user's error ends the block."""
    runs = folder.root.parent
    had_folder, had_runs = folder.root.exists(), runs.exists()
    try:
        yield
    except (ConfigError, DataError, ModelFileError):
        if not had_folder:
            shutil.rmtree(folder.root, ignore_errors=True)
        if not had_runs and runs.is_dir() and not any(runs.iterdir()):
            runs.rmdir()
        raise


def _changed(database: Path) -> float:
    """When the study was last written to (the write-ahead log is newer than the database itself)."""
    log = database.with_name(database.name + "-wal")
    return max(p.stat().st_mtime for p in (database, log) if p.exists())


def open_storage(folder: StudyFolder) -> optuna.storages.RDBStorage:
    """The database as Optuna's storage.  Raises MachineError if it is not a database, or cannot be opened."""
    import optuna

    try:
        _write_ahead(folder.database)
        return optuna.storages.RDBStorage(
            folder.url, engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_SECONDS}}
        )
    except Exception as error:  # sqlite3, SQLAlchemy and alembic each raise their own kinds
        reason = clean_text(
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        )
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


def open_study(folder: StudyFolder) -> optuna.Study:
    """The study in an existing folder."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not folder.database.is_file():
        raise ConfigError(f"{folder.root} has no study.db", "restore it, or give another --name")
    storage = open_storage(folder)
    names = optuna.get_all_study_names(storage)
    if len(names) != 1:
        raise ConfigError(f"{folder.database} holds {len(names)} studies, not one", "give another --name")
    return optuna.load_study(study_name=names[0], storage=storage, sampler=optuna.samplers.RandomSampler())


def create_study(folder: StudyFolder, facts: Mapping[str, str]) -> optuna.Study:
    """The folder's study, created if need be.  Call with the study lock held.

    Never makes a fresh, empty study where trial folders of a lost one lie.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not folder.database.is_file() and folder.trial_folders():
        raise ConfigError(
            f"{folder.root} has trials but study.db is missing", "restore it, or give another --name"
        )
    storage = open_storage(folder)
    names = optuna.get_all_study_names(storage)  # one at most; a renamed folder keeps its study's name
    study = optuna.create_study(
        study_name=names[0] if names else folder.name,
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.NopPruner(),
    )
    if study.direction != optuna.study.StudyDirection.MAXIMIZE:  # load_if_exists keeps the direction it finds
        raise ConfigError(f"{folder.database} minimizes; a score is maximized", "give another --name")
    if IDENTITY not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["score"])
        study.set_user_attr(IDENTITY, dict(facts))
    return study


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that this tool wrote, or None if it is absent or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
