"""The time that commands worked on a study under a time budget (``hpo search --hours``).

Each process keeps a file of its own, ``hours/ID.jsonl``: when it began and, again and again, for how many seconds it
has worked.  Times in which several processes worked count once, and times in which none did count nothing.  A process
that is killed loses the seconds since its last line.

    {"begun": 1764484630.2, "seconds": 30.1}

A process that searches holds a lock, so the others know how many share the work.

Owns these files and the budget that is stored with the study.  Does not own what fits into it (``hpo.study.hours``).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hpo.study.folder import StudyFolder
from hpo.study.hours import HOUR, ROUNDS, Round
from hpo.study.locks import Lock, holder
from hpo.study.pace import Pace
from hpo.study.work import INVOCATION
from trainer.errors import MachineError
from trainer.files import append_line, make_folder, read_records

if TYPE_CHECKING:
    import optuna

HOURS = "hpo:hours"  # the study's user attribute
SHORTEST, LONGEST = 1.0, 30.0  # seconds between two lines: a thousandth of the budget, within these


@dataclass(frozen=True)
class Stored:
    """A study's budget.  ``round``: the confirmation that was begun; the search is over then.  ``pace``: estimated
    before the first trial; ``load_seconds``: how long loading takes."""

    hours: float
    round: Round | None = None
    pace: Pace | None = None
    load_seconds: float = 0.0

    def write(self, study: optuna.Study) -> None:
        study.set_user_attr(HOURS, asdict(self))


def stored_hours(study: optuna.Study) -> Stored | None:
    """The study's budget; None if it has none, or was continued without one."""
    values = study.user_attrs.get(HOURS)
    if not values:
        return None
    begun = Round(**values["round"]) if values["round"] else None
    pace = Pace(**values["pace"]) if values["pace"] else None
    return Stored(values["hours"], begun if begun in ROUNDS else None, pace, values["load_seconds"])


def forget_hours(study: optuna.Study) -> None:
    """A search without a budget continues the study."""
    if study.user_attrs.get(HOURS):
        study.set_user_attr(HOURS, None)


def used_seconds(folder: StudyFolder) -> float:
    """Seconds in which at least one process worked."""
    return _union(list(_spans(folder).values()))


class Worked:
    """This process's part of a study's budget.  ``now`` and ``tick``: the time of day, and a clock that never jumps."""

    def __init__(
        self,
        folder: StudyFolder,
        hours: float,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.seconds = folder, HOUR * hours
        self._id, self._tick = uuid.uuid4().hex[:12], tick
        command = INVOCATION.get()
        self._from = tick() if command is None else command.began
        self._begun = now() - (tick() - self._from)
        self._file = folder.hours / f"{self._id}.jsonl"
        self._lock = Lock(folder.locks / f"hours-{self._id}.lock")

    @property
    def own(self) -> float:
        """Seconds since this command began."""
        return self._tick() - self._from

    @property
    def used(self) -> float:
        spans = _spans(self.folder) | {self._id: (self._begun, self._begun + self.own)}
        return _union(list(spans.values()))

    @property
    def left(self) -> float:
        return self.seconds - self.used

    @property
    def searching(self) -> int:
        """Processes that search, this one included."""
        others = (p for p in self.folder.locks.glob("hours-*.lock") if p != self._lock.path)
        return 1 + sum(holder(path) is not None for path in others)

    def leave(self) -> bool:
        """This process searches no more.  Whether it was the last.  Call with the study lock held."""
        last = self.searching == 1
        self._lock.path.unlink(missing_ok=True)
        self._lock.release()
        return last

    def _sweep_locks(self) -> None:
        """Delete the lock files of killed processes."""
        for path in self.folder.locks.glob("hours-*.lock"):
            if holder(path) is None:
                path.unlink(missing_ok=True)

    def note(self) -> None:
        append_line(self._file, json.dumps({"begun": self._begun, "seconds": round(self.own, 3)}))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Count the time until the end of the block."""
        make_folder(self.folder.hours)
        self._sweep_locks()
        self._lock.try_acquire()
        self.note()
        ended = threading.Event()
        every = min(LONGEST, max(SHORTEST, self.seconds / 1000))

        def keep() -> None:
            while not ended.wait(every):
                with contextlib.suppress(MachineError):  # a full disk: the command itself says so
                    self.note()

        thread = threading.Thread(target=keep, name="hours", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(MachineError):
                self.note()
            self._lock.path.unlink(missing_ok=True)
            self._lock.release()


def _spans(folder: StudyFolder) -> dict[str, tuple[float, float]]:
    """From when to when each process worked."""
    found = {}
    for path in folder.hours.glob("*.jsonl"):
        for row in read_records(path):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                begun = float(row["begun"])
                found[path.stem] = begun, begun + float(row["seconds"])
    return found


def _union(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for begun, ended in sorted(spans):
        total += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return total
