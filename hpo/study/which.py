"""Which study a command works on: the named one, or the one that was last worked on.

Owns the forms of a study's name (``NAME``, ``runs/NAME``, or a path inside that folder), the order of studies by
the last command that changed them, and the refusal if two of them were changed within a day.  Does not ask the user;
see ``hpo.cli.which``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpo.study.folder import RUNS, StudyFolder, read_json, study_folder
from hpo.study.work import INVOCATION, RUNNING, Step, steps, words_with_name
from trainer.errors import ConfigError
from trainer.text import clean_text

OF_STUDY, SOURCE_STUDY = "confirms", "source_study"  # facts that name the study that another one belongs to
SAME_DAY = timedelta(hours=24)
START_ONE = "start one: hpo search --base mini-sd15 --trials 12"


class SeveralStudies(ConfigError):
    """No study was named, and several were worked on within a day.  ``worked``: those, latest first."""

    def __init__(self, worked: list[WorkedOn]) -> None:
        self.worked = worked
        said = "; ".join(f"{one.folder.name} ({one.says})" for one in worked)
        invocation = INVOCATION.get()
        words = invocation.stored if invocation and invocation.words else ("status",)
        commands = [shlex.join(["hpo", *words_with_name(words, one.folder.name)]) for one in worked]
        super().__init__(
            f"several studies were worked on within a day, and none is named: {said}",
            "name one:",
            commands,
        )


class HasTime(Protocol):
    @property
    def when(self) -> datetime: ...


Dated = TypeVar("Dated", bound=HasTime)


@dataclass(frozen=True)
class WorkedOn:
    """A study and the last command that changed it (None: written before commands were recorded)."""

    folder: StudyFolder
    when: datetime
    step: Step | None

    @property
    def says(self) -> str:
        """For example "confirm, 28 Nov 14:02"."""
        what = self.step.step if self.step else "search"
        state = f" {self.step.state}" if self.step and self.step.state != "finished" else ""
        return f"{what}{state}, {self.when.astimezone():%-d %b %H:%M}"


def find_folder(name: str | None, runs: Path = RUNS) -> StudyFolder:
    """An existing study: the named one, else the one last worked on.

    ``name``: a name in ``runs``, or the path of a study folder or of something inside it.  Raises ConfigError if
    there is none, SeveralStudies if none is named and two were worked on within a day.
    """
    if name is not None:
        return _named(name, runs)
    found = worked_on(runs)
    if not found:
        raise ConfigError(f"no study in {runs}", START_ONE)
    recent = within_a_day(found)
    if len(recent) > 1:
        raise SeveralStudies(recent)
    return found[0].folder


def within_a_day(found: Sequence[Dated]) -> list[Dated]:
    """Those that are at most a day older than the first, which is the newest."""
    return [one for one in found if found[0].when - one.when <= SAME_DAY]


def worked_on(runs: Path = RUNS) -> list[WorkedOn]:
    """All studies in a folder, the last one worked on first.  Confirmations and target trials belong to their study."""
    found = [_last(folder) for folder in all_studies(runs) if parent_of(folder) is None]
    return sorted(found, key=lambda one: one.when, reverse=True)


def all_studies(runs: Path) -> list[StudyFolder]:
    """Every study folder in ``runs``, with confirmations and target trials, by name."""
    found = [StudyFolder(path) for path in sorted(runs.glob("*"))] if runs.is_dir() else []
    return [folder for folder in found if folder.has_study]


def parent_of(folder: StudyFolder) -> str | None:
    """The name of the study that a confirmation or target trials belong to; None for a search."""
    found = belongs_to(read_json(folder.facts))
    return found[1] if found else None


def belongs_to(stored: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """(``OF_STUDY`` or ``SOURCE_STUDY``, the name of that study) from the contents of study.json; None for a search."""
    facts = (stored or {}).get("facts")
    known = facts if isinstance(facts, dict) else {}
    return next(((key, str(known[key])) for key in (OF_STUDY, SOURCE_STUDY) if known.get(key)), None)


def study_at(path: Path) -> StudyFolder | None:
    """The study whose folder is at ``path`` or contains it."""
    start = path.expanduser()
    for place in (start, *start.absolute().parents):
        if StudyFolder(place).has_study:
            return StudyFolder(_in_usual_form(place))
    return None


def _named(name: str, runs: Path) -> StudyFolder:
    is_path = "/" in name or name in (".", "..")
    if not is_path and (folder := study_folder(name, runs)).has_study:
        return folder
    if found := study_at(Path(name)) if is_path or Path(name).is_dir() else None:
        return found
    known = ", ".join(clean_text(folder.name) for folder in all_studies(runs)) or "none yet"
    raise ConfigError(
        f"no study at {name}" if is_path else f"no study {name} in {runs}", f"known studies: {known}"
    )


def _in_usual_form(place: Path) -> Path:
    """runs/NAME for a folder in ./runs, however it was given, so that messages and commands stay short."""
    whole = place.resolve()
    return RUNS / whole.name if whole.parent == RUNS.resolve() else place


def _last(folder: StudyFolder) -> WorkedOn:
    done = steps(folder.root)
    if not done:
        return WorkedOn(folder, datetime.fromtimestamp(_changed(folder), UTC), None)
    last = max(done, key=lambda step: (step.state == RUNNING, step.when))
    when = datetime.now(UTC) if last.state == RUNNING else last.when
    return WorkedOn(folder, when, last)


def _changed(folder: StudyFolder) -> float:
    """When the study was last written to (the write-ahead log can be newer than the database); on a server, begun."""
    database = folder.database
    log = database.with_name(database.name + "-wal")
    return max(p.stat().st_mtime for p in (database, log, folder.storage) if p.exists())
