"""Whether a worker makes progress: for how long it has shown none, and how far all workers have come.

Owns the time after which a silent worker counts as hung.  Its clock counts only what the supervisor has seen pass:
while the machine or the supervisor stands still (a closed lid, Ctrl-Z), nobody hangs.  Does not own what is done about
it (``hpo.night.supervise``) or what is reported (``hpo.night.watched``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HANG_MINUTES = 30.0  # "no new checkpoint for 30 minutes = hung"; steps and images count as well here
LOADING_TIMES = (
    4  # so much longer until the first step or image: loading, a download, the first compilation (assumed)
)
MOST_GRACE_SECONDS = 60.0  # to save, for a worker that hangs, before SIGKILL
TICK_SECONDS = (
    2.0  # of silence that one look at the clock can add: a busy machine delays the supervisor as well
)
SUSPENDED_SECONDS = 60.0  # between two looks: this machine stood still, and the clock starts anew
WRITTEN_BYTES = 1 << 20  # a worker that is silent and has written so much is downloading

MOVED, REACHED, WATCH, ASKS, ANSWERED = "moved", "reached", "watch", "asks", "answered"
MARKS = (MOVED, REACHED, WATCH, ASKS)  # for the supervisor alone


class Pulse:
    """The progress of the processes at one post.

    ``furthest``: what → the highest step or image that any process has reached.  ``hang_seconds``: None if nothing
    counts as a hang.  ``shown``: how many of the bytes that a process has written went to a terminal; a display goes on
    in a process that hangs.  ``is_asking``: a person is being asked.
    """

    def __init__(self, furthest: dict[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self.hang_seconds: float | None = 60 * HANG_MINUTES
        self.shown: Callable[[], int] = lambda: 0
        self._furthest, self._clock = furthest, clock
        self.starts(None)

    def starts(self, pid: int | None) -> None:
        """A new process begins."""
        self._pid, self._seen = pid, self._clock()
        self._silent, self._is_loading, self.is_asking = 0.0, True, False
        self._written: int | None = None  # at the first look after the last report

    def takes(self, report: Mapping[str, Any]) -> bool:
        """A report has come.  True if a worker is further than any was before."""
        event = report.get("event")
        self._silent, self._written = 0.0, None
        if event == WATCH:
            self.hang_seconds = float(report["hang_seconds"]) or None
        elif event in (ASKS, ANSWERED):
            self.is_asking = event == ASKS
        elif event == REACHED:
            self._is_loading = False
            what, done = str(report["what"]), int(report["done"])
            if done > self._furthest.get(what, -1):
                self._furthest[what] = done
                return True
        return False

    def is_hung(self) -> bool:
        """Look at the clock: whether it has been silent for too long."""
        now = self._clock()
        gap, self._seen = now - self._seen, now
        self._silent = 0.0 if gap > SUSPENDED_SECONDS else self._silent + min(gap, TICK_SECONDS)
        if self.hang_seconds is None or self.is_asking:
            return False
        if self._written is None:
            self._written = self._files_written()
        if self._silent <= self.hang_seconds:
            return False
        if (written := self._files_written()) >= self._written + WRITTEN_BYTES:
            self._written, self._silent = written, 0.0
        return self._silent > self.hang_seconds * (LOADING_TIMES if self._is_loading else 1)

    def _files_written(self) -> int:
        return _written(self._pid) - self.shown()

    @property
    def grace_seconds(self) -> float:
        """Between SIGTERM and SIGKILL."""
        return min(MOST_GRACE_SECONDS, self.hang_seconds or MOST_GRACE_SECONDS)

    @property
    def silent_words(self) -> str:
        """For how long there was no progress."""
        seconds = self._silent
        return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def _written(pid: int | None) -> int:
    """Bytes that a process has written so far; 0 if the system does not say."""
    try:
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name == "wchar":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
