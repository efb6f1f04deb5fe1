"""The record of the commands that worked on a study or a run: what was run, from where, and how it ended.

Owns work.jsonl, and the decision which step is finished, interrupted or still running.  Does not own the choice of
a study (``hpo.study.which``) or the repetition of a command (``hpo.cli.folders``).

    {"id": "…", "event": "started", "step": "confirm", "words": ["confirm", "luca"], "cwd": "…", "time_utc": "…"}
    {"id": "…", "event": "finished" | "interrupted" | "failed" | "refused", "time_utc": "…"}

A step that has started and not ended belongs to a living process if that process still holds the step's lock, and
was killed if not.  ``refused`` steps ended before they changed anything and are ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hpo.night import begins
from hpo.study import notify
from hpo.study.folder import StudyFolder
from hpo.study.locks import Lock, holder
from hpo.study.notify import FAILED, FINISHED, INTERRUPTED
from hpo.study.place import shown
from trainer.errors import Interrupted, MachineError, ToolError
from trainer.files import append_line, read_records
from trainer.memory import cache_folder

WORK = "work.jsonl"
STARTED, RUNNING, REFUSED = "started", "running", "refused"  # an end is an event of hpo.study.notify
_OWN: set[str] = set()  # the steps of this process: asking for the holder of an own lock would release it
SECRET = "--notify"  # its URLs contain passwords, so they are not stored
ADDRESS = "--storage"  # stored without its password


@dataclass(frozen=True)
class Invocation:
    """The command line of this process: the words after ``hpo``, the folder that its paths start from, and when it
    began (``time.monotonic``).  ``is_worker``: another command started it, and that one is recorded."""

    words: tuple[str, ...]
    cwd: str
    began: float = field(default_factory=time.monotonic, compare=False)
    is_worker: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """The words without the URLs of ``--notify`` and without the password of ``--storage``."""
        kept: list[str] = []
        words = iter(self.words)
        for word in words:
            option, equals, value = word.partition("=")
            if option not in (SECRET, ADDRESS):
                kept.append(word)
                continue
            value = value if equals else next(words, "")
            if option == ADDRESS:
                kept += [ADDRESS, shown(value)]
        return tuple(kept)

    @property
    def unnotified(self) -> tuple[str, ...]:
        """The words without ``--notify`` and its URLs, for another process: everyone can read its command line."""
        kept: list[str] = []
        words = iter(self.words)
        for word in words:
            if word == SECRET:
                next(words, "")
            elif not word.startswith(f"{SECRET}="):
                kept.append(word)
        return tuple(kept)

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of ``--notify``."""
        pairs = zip(self.words, (*self.words[1:], ""), strict=True)
        found = [
            after if word == SECRET else word.removeprefix(f"{SECRET}=")
            for word, after in pairs
            if word == SECRET or word.startswith(f"{SECRET}=")
        ]
        return tuple(found)

    @property
    def notifies(self) -> bool:
        return any(word == SECRET or word.startswith(f"{SECRET}=") for word in self.words)


# Set by the command line.  None where this package is used as a library: then nothing is recorded.
INVOCATION: ContextVar[Invocation | None] = ContextVar("INVOCATION", default=None)


@dataclass(frozen=True)
class Step:
    """One command that worked on a folder.  ``step`` names what it worked on, for example ``train sdxl``.

    ``state``: running, finished, interrupted (also: killed) or failed.  ``ended_utc``: empty while running, and if
    the process was killed.
    """

    id: str
    step: str
    words: tuple[str, ...]
    cwd: str
    started_utc: str
    ended_utc: str
    state: str
    notified: bool = False  # the command had --notify
    processes: int = 1  # started by torchrun with so many

    @property
    def is_open(self) -> bool:
        """Whether there is something left to do."""
        return self.state in (INTERRUPTED, FAILED)

    @property
    def when(self) -> datetime:
        """When it ended, else when it began.  1970 if that is not recorded."""
        try:
            return datetime.fromisoformat(self.ended_utc or self.started_utc)
        except ValueError:
            return datetime.fromtimestamp(0, UTC)


class Work:
    """One running step.  Until ``begun`` is set, an error counts as a refusal: nothing was changed."""

    def __init__(self, begun: bool) -> None:
        self.begun = begun
        self.says = ""  # the result in a line, for notifications


@contextlib.contextmanager
def recorded(root: Path, step: str, *, begun: bool = True) -> Iterator[Work]:
    """Record the block as a step of this process's command in ``root``/work.jsonl."""
    record, invocation = Work(begun), INVOCATION.get()
    if invocation is None or invocation.is_worker:
        yield record
        return
    name = uuid.uuid4().hex[:12]
    lock = Lock(_lock(root, name))
    lock.try_acquire()
    _OWN.add(name)
    _sweep_locks(root)
    row: dict[str, object] = {
        "id": name,
        "event": STARTED,
        "step": step,
        "words": invocation.stored,
        "cwd": invocation.cwd,
        "time_utc": _now(),
    }
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        row["processes"] = processes
    if invocation.notifies:
        row["notified"] = True
    append_line(root / WORK, json.dumps(row))
    begins(root, invocation.words, invocation.cwd)
    state, why = FAILED, ""
    try:
        yield record
        state, why = FINISHED, record.says
    except ToolError as error:
        why = error.message
        if not isinstance(error, Interrupted):
            raise
        state = INTERRUPTED
        named = Interrupted(error.message, f"hpo resume {resume_words(root)}")
        named.exit_code = error.exit_code
        raise named from None
    except KeyboardInterrupt:
        state = INTERRUPTED
        raise
    finally:
        if state == FAILED and not record.begun:
            state = REFUSED
        with contextlib.suppress(Exception):  # the folder may be full or gone: the step's own error is shown
            append_line(root / WORK, json.dumps({"id": name, "event": state, "time_utc": _now()}))
        lock.path.unlink(missing_ok=True)
        lock.release()
        _OWN.discard(name)
        if state != REFUSED:
            notify.tell(state, f"{resume_words(root)}: {step} {state}", why or f"hpo {step} {state}")


def steps(root: Path) -> list[Step]:
    """The steps recorded in a folder, oldest first."""
    begun: dict[str, dict[str, object]] = {}
    ended: dict[str, tuple[str, str]] = {}
    for row in read_records(root / WORK):
        name = str(row.get("id"))
        if row.get("event") == STARTED:
            begun[name] = row
        else:
            ended[name] = str(row.get("event")), str(row.get("time_utc", ""))
    found = []
    for name, row in begun.items():
        state, when = ended.get(name, ("", ""))
        if state == REFUSED:
            continue
        words = row.get("words")
        found.append(
            Step(
                id=name,
                step=str(row.get("step", "")),
                words=tuple(map(str, words)) if isinstance(words, list) else (),
                cwd=str(row.get("cwd", "")),
                started_utc=str(row.get("time_utc", "")),
                ended_utc=when,
                state=state or (RUNNING if _is_alive(root, name) else INTERRUPTED),
                notified=bool(row.get("notified")),
                processes=number if isinstance(number := row.get("processes"), int) else 1,
            )
        )
    return found


@contextlib.contextmanager
def recorded_at(path: Path, otherwise: Path, step: str, *, begun: bool = True) -> Iterator[Work]:
    """As ``recorded``, in the study that contains ``path``; else in ``otherwise``, where ``hpo resume`` finds it."""
    study = next((place for place in path.absolute().parents if StudyFolder(place).has_study), None)
    with recorded(study or otherwise, step, begun=begun) as work:
        if study is None:
            _index(otherwise)
        yield work


def outside_studies() -> list[Path]:
    """The folders outside studies in which commands were recorded that were started in the current folder."""
    found = [path.parent for path in sorted(Path("output").glob(f"*.run/{WORK}"))]
    if (place := _index_file()) is not None:
        rows = read_records(place)
        found += [Path(str(row.get("root"))) for row in rows if row.get("cwd") == os.getcwd()]
    return list({root.resolve(): root for root in found if (root / WORK).is_file()}.values())


def _index(root: Path) -> None:
    """Note a folder that is not a study.  Without a cache folder, or as a library, nothing is noted."""
    place, invocation = _index_file(), INVOCATION.get()
    if place is None or invocation is None:
        return
    with contextlib.suppress(MachineError, OSError):
        row = {"root": str(root.resolve()), "cwd": invocation.cwd}
        if row not in read_records(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            append_line(place, json.dumps(row))


def _index_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "runs.jsonl"


def open_steps(root: Path) -> list[Step]:
    """The steps that were interrupted or failed and were not finished or started again later, oldest first."""
    latest: dict[str, Step] = {}
    for step in steps(root):
        latest.pop(step.step, None)  # keeps the order of the last start
        latest[step.step] = step
    return [step for step in latest.values() if step.is_open]


def _is_alive(root: Path, name: str) -> bool:
    return name in _OWN or holder(_lock(root, name)) is not None


def _lock(root: Path, name: str) -> Path:
    return root / ".locks" / f"work-{name}.lock"


def _sweep_locks(root: Path) -> None:
    """Delete the lock files of killed processes."""
    own = {_lock(root, name) for name in _OWN}
    for path in (root / ".locks").glob("work-*.lock"):
        if path not in own and holder(path) is None:
            with contextlib.suppress(OSError):
                path.unlink()


def resume_words(root: Path) -> str:
    """The argument of ``hpo resume`` for a study's or a run's folder."""
    study = StudyFolder(root)
    return study.words if study.has_study else shlex.quote(str(root))


def words_with_name(words: Sequence[str], name: str) -> tuple[str, ...]:
    """A command line with a study's name after the command."""
    return (words[0], name, *words[1:])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
