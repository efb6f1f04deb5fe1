"""StudyFolder: every path in runs/<study>/.

Owns the file names.  Does not own the choice of a study (``hpo.study.which``), the database
(``hpo.study.storage``) or the contents of the files.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hpo.study.locks import Lock
from trainer.errors import RESUME, ConfigError
from trainer.files import safe_name

if TYPE_CHECKING:
    pass

RUNS = Path("runs")
# Study user attributes: the facts that must not change, the last --trials, and the reason to start no new trials.
# FORK: the study that trials were taken over from, and whether that is finished (hpo.search.fork).
IDENTITY, TOTAL, STOP, FORK = "hpo:identity", "hpo:trials", "hpo:stop", "hpo:fork"
GO_ON = f"free some disk space or wait for the other program, then {RESUME}"


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
    def looks(self) -> Path:
        """What was seen in the middle of the training (``hpo.search.looks``)."""
        return self.root / "looks.jsonl"

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
        """The command-line arguments for this study: its name, and --runs if needed."""
        runs = self.root.parent
        return self.name if runs == RUNS else f"{self.name} --runs {shlex.quote(str(runs))}"

    @property
    def database(self) -> Path:
        return self.root / "study.db"

    @property
    def storage(self) -> Path:
        """The address of the server that has the study's database (``hpo.study.place``); otherwise there is none."""
        return self.root / "storage.json"

    @property
    def has_study(self) -> bool:
        """Whether a study was begun here: a killed process may leave less than a whole one."""
        return self.database.is_file() or self.storage.is_file()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database.  SQLAlchemy versions differ in decoding %3F and similar."""
        from sqlalchemy import make_url

        path = str(self.database.resolve())
        for url in (f"sqlite:///{quote(path)}", f"sqlite:///{path}"):
            if make_url(url).database == path and "{" not in url:  # Optuna treats {} as a format string
                return url
        raise ConfigError(
            f"{path} cannot be used as a database path", "use a --runs folder without ? % { } in its path"
        )

    @property
    def locks(self) -> Path:
        return self.root / ".locks"

    @property
    def memory(self) -> Path:
        """Which settings ran out of memory (``hpo.search.remedies``)."""
        return self.root / "memory.jsonl"

    @property
    def hours(self) -> Path:
        """For how long processes worked under a time budget (``hpo.study.worked``)."""
        return self.root / "hours"

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
    def base_seconds(self) -> Path:
        """How long an image of the untrained base took, with its score."""
        return self.base_images / "seconds.json"

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
        """The existing trial folders, sorted by number."""
        found = [p for p in self.root.glob("trial_*") if p.name.removeprefix("trial_").isdecimal()]
        return [self.trial(int(p.name.removeprefix("trial_"))) for p in sorted(found)]

    def study_lock(self) -> Lock:
        return Lock(self.locks / "study.lock")

    def base_lock(self) -> Lock:
        """Held while the untrained base is scored: other workers wait for the result instead of repeating it."""
        return Lock(self.locks / "base.lock")

    def confirm_lock(self) -> Lock:
        """Held by the process that confirms a search with a time budget."""
        return Lock(self.locks / "confirm.lock")

    def trial_lock(self, number: int) -> Lock:
        return Lock(self.locks / f"trial_{number:04d}.lock")


def study_folder(name: str, runs: Path = RUNS) -> StudyFolder:
    """The folder of a study, whether or not it exists."""
    return StudyFolder(runs / safe_name(name, "study name"))


def another_name(*words: str) -> str:
    """How to start a study beside one that cannot go on.  ``words``: further words of its command."""
    return " ".join(("under another name: hpo search NAME …", *words))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that this tool wrote.  None if the file is missing or incomplete."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
