"""StudyFolder: every path of runs/<study>/, and the Optuna study that lives in it.

Owns names of files, opening and creating the SQLite study, and the check that a folder and its database
belong together.  Does not own what is written there.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hpo.study.locks import Lock
from hpo.study.storage import begun_study
from trainer.errors import ConfigError
from trainer.files import machine_error, safe_name

if TYPE_CHECKING:
    pass

RUNS = Path("runs")
# Study user attributes: the facts that must not change, the trials last asked for, and why no new trial begins.
IDENTITY, TOTAL, STOP = "hpo:identity", "hpo:trials", "hpo:stop"
GO_ON = "free some space or wait for the other program; the same command goes on"


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
    def words(self) -> str:
        """How a command names this study: its name, and --runs where that is needed."""
        runs = self.root.parent
        return self.name if runs == RUNS else f"{self.name} --runs {shlex.quote(str(runs))}"

    @property
    def database(self) -> Path:
        return self.root / "study.db"

    @property
    def url(self) -> str:
        """The database as SQLAlchemy names it.  Versions differ in whether they decode %3F and the like."""
        from sqlalchemy import make_url

        path = str(self.database.resolve())
        for url in (f"sqlite:///{quote(path)}", f"sqlite:///{path}"):
            if make_url(url).database == path and "{" not in url:  # Optuna fills in what is in braces
                return url
        raise ConfigError(
            f"{path} cannot be a database's address", "choose --runs without ? % { } in its path"
        )

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
    def anchors(self) -> Path:
        return self.base_images / "anchors.json"

    @property
    def confirmed(self) -> Path:
        return self.root / "confirmed.json"

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


def _changed(database: Path) -> float:
    """When the study was last written to (the write-ahead log is newer than the database itself)."""
    log = database.with_name(database.name + "-wal")
    return max(p.stat().st_mtime for p in (database, log) if p.exists())


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that this tool wrote, or None if it is absent or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
