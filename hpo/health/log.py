"""health.jsonl in the folder of a study or run: what was measured, told and done, for ``hpo watch`` and for people.

    {"event": "figures", "time_utc": …, "pid": …, "worker": 1, "stage": …, "trial": …, "phase": …, "done": …,
     "total": …, "rate": steps or images per second, "left": seconds, "ram_used": %, "ram_available": bytes, …}
    {"event": "alert", "time_utc": …, "pid": …, "figure": …, "level": "warn" | "danger", "text": …}
    {"event": "action", "time_utc": …, "pid": …, "text": …}

Figures are written at most every ten seconds for each process.  A file of one megabyte is renamed to health.1.jsonl,
which replaces the one before: at most two megabytes stay.  A file that cannot be written is no reason to end a run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpo.study import Lock
from trainer.errors import MachineError
from trainer.files import append_line

NAME, BEFORE = "health.jsonl", "health.1.jsonl"
FIGURES, ALERT, ACTION = "figures", "alert", "action"
EVERY_SECONDS = 10.0
MOST_BYTES = 1_000_000
TAIL_BYTES = 200_000  # of the end of a file, for the last records


class HealthLog:
    """Writes the file.  Several processes and threads may write to one folder."""

    def __init__(self, folder: Path, worker: int | None = None) -> None:
        self.folder, self.path = folder, folder / NAME
        self._own: dict[str, Any] = {"pid": os.getpid(), **({"worker": worker} if worker else {})}
        self._written: float | None = None

    def figures(self, values: Mapping[str, Any], now: float, *, at_once: bool = False) -> bool:
        """Write figures, unless some were written less than ten seconds ago.  ``now``: monotonic seconds.  ``at_once``:
        write them all the same, because another trial has begun."""
        if not at_once and self._written is not None and 0 <= now - self._written < EVERY_SECONDS:
            return False
        self._written = now
        self._write({"event": FIGURES, **values})
        return True

    def alert(self, figure: str, level: str, text: str, value: float | None) -> None:
        self._write({"event": ALERT, "figure": figure, "level": level, "text": text, "value": value})

    def action(self, text: str) -> None:
        self._write({"event": ACTION, "text": text})

    def _write(self, row: dict[str, Any]) -> None:
        row = {
            "event": row["event"],
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._own,
            **row,
        }
        with contextlib.suppress(OSError, MachineError):
            self._turn()
            append_line(self.path, json.dumps(row), shared=True)

    def _turn(self) -> None:
        """Rename a file that is full.  The size is read again under a lock: another process may have been faster."""
        if not _is_full(self.path):
            return
        lock = Lock(self.folder / ".locks" / "health.lock")
        if not lock.try_acquire():
            return
        try:
            if _is_full(self.path):
                os.replace(self.path, self.folder / BEFORE)
        finally:
            lock.release()


def _is_full(path: Path) -> bool:
    try:
        return path.stat().st_size >= MOST_BYTES
    except OSError:
        return False


def last_rows(path: Path, most_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The JSON objects in the last bytes of a .jsonl file, oldest first.  Lines that are cut or broken are left out;
    nothing is raised for a file that is missing or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - most_bytes)
            file.seek(start)
            text = file.read(most_bytes)
    except OSError:
        return []
    lines = text.split(b"\n")[1 if start else 0 : -1]  # after the last newline: nothing, or half a line
    return list(_objects(lines))


def _objects(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


def health_rows(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, oldest first."""
    return [row for name in (BEFORE, NAME) for row in last_rows(folder / name, 2 * MOST_BYTES)]
