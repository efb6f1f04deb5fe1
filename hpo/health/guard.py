"""Guard: looks at the health of a piece of work from a thread beside it, and acts between two of its steps.

The thread measures, writes health.jsonl, and tells alerts.  It never holds up the work and never ends it: what goes
wrong in it is dropped.  The work itself reports its events, which costs a place in a queue, and asks between two steps
or images what to do:

    pause     it waits, until the GPU is cooler, for at most ``pause_minutes``, or until it is asked to stop.  It counts
              the minutes itself: the thread may hang in the driver
    relief    it gives back memory: what ``relief`` does, once a minute while RAM is in danger
    stop      ``should_stop`` is true once the disk is nearly full; then ``full_error`` is the reason
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.health.health import Health, Needs
from hpo.health.line import health_line
from hpo.health.log import HealthLog
from hpo.health.machine import MachineSensors
from hpo.health.reading import Sensors
from hpo.night import ends_hangs, moved, standing_still
from hpo.study import HUNG, Thresholds, tell
from trainer.errors import RESUME, MachineError
from trainer.events import Event

LOOK_SECONDS = 5.0
WAIT_SECONDS = 0.2  # between two questions whether a pause is over
END_SECONDS = 1.0  # for the thread to end

Relief = Callable[[], tuple[str, int]]  # gives back memory: (what was given back, in words; bytes)


@dataclass(frozen=True)
class Lookout:
    """How a command watches its health.  ``sensors``: what measures; None: this machine."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    sensors: Sensors | None = None
    every_seconds: float = LOOK_SECONDS


class Guard:
    """Beside one process's work.  As a context it looks, from a thread, while the block lasts.

    ``folder``: of the study or run.  ``say``: prints a line; called from the thread.  ``name``: for messages that are
    sent.  ``needs``, ``swings``: as of ``Health``.  ``left``: seconds to the end of the whole command, if known.
    ``pauses``: whether this process may wait; one of several that share each step must not.
    """

    def __init__(
        self,
        lookout: Lookout,
        folder: Path,
        say: Callable[[str], None],
        *,
        name: str,
        device: str = "cpu",
        uuid: str = "",
        worker: int | None = None,
        needs: Callable[[], Needs | None] = lambda: None,
        swings: bool = True,
        left: Callable[[], float | None] = lambda: None,
        pauses: bool = True,
    ) -> None:
        sensors = lookout.sensors or MachineSensors(folder, device, uuid)
        log = HealthLog(folder, worker)
        self.health = Health(lookout.thresholds, sensors, time.monotonic(), log, needs=needs, swings=swings)
        self.relief: Relief | None = None
        self._every, self._say, self._name = lookout.every_seconds, say, name
        self._left, self._pauses = left, pauses
        self._ended = threading.Event()
        self._looks = 0
        self._waited_for = 0  # the number of the pause that was waited for as long as it may last
        context = contextvars.copy_context()  # who gets messages is a context variable
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="health", daemon=True)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(END_SECONDS)  # a driver that hangs may hold it; it ends with the process

    # The work's side

    def begins(self, **place: Any) -> None:
        self.health.begins(**place)

    def on_event(self, event: Event, should_stop: Callable[[], bool] = lambda: False) -> None:
        """A step or file is done.  May wait."""
        self.health.on_event(event)
        self._act(should_stop)

    def on_image(self, done: int, total: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """An image is done.  May wait."""
        self.health.on_image(done, total)
        self._act(should_stop)

    @property
    def should_stop(self) -> bool:
        """Whether the disk is nearly full."""
        return bool(self.health.full)

    def full_error(self, advice: str = "") -> MachineError:
        """Why the work was stopped.  ``advice``: what frees disk space."""
        then = f"{advice}; then {RESUME}" if advice else f"free some space, then {RESUME}"
        return MachineError(f"stopped in time: {self.health.full}; all work so far is saved", then)

    def line(self, width: int = 79) -> str:
        """What matters now, for a live view; empty if nothing does."""
        return health_line(self.health, width)

    def _act(self, should_stop: Callable[[], bool]) -> None:
        if self.health.relief_due:
            self._relieve()
        if not self._pauses or not self.health.paused or self.health.pauses == self._waited_for:
            return
        self._say(f"paused: {self.health.paused}")
        if not self._is_stopped_while_it_waits(should_stop):
            self._say("goes on after the pause")

    def _is_stopped_while_it_waits(self, should_stop: Callable[[], bool]) -> bool:
        """Wait for the end of a pause.  A supervisor is told that the work moves only as long as the thread looks."""
        pause, looks = self.health.pauses, self._looks
        latest = time.monotonic() + 60 * self.health.thresholds.pause_minutes
        while self.health.paused and self._thread.is_alive():
            with standing_still():
                if should_stop():
                    return True
            if time.monotonic() >= latest:
                self._waited_for = pause
                break
            if looks != self._looks:
                looks = self._looks
                moved()
            self._ended.wait(WAIT_SECONDS)
        return should_stop()

    def _relieve(self) -> None:
        text, freed = (
            self.relief() if self.relief is not None else ("nothing is cached that could be given back", 0)
        )
        gc.collect()
        _trim()
        self.health.relieved(text, freed)
        self._say(f"RAM is short: {text}")

    # The thread's side

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            with contextlib.suppress(Exception):  # nothing here may disturb the work
                self.look()

    def look(self) -> None:
        """Look once, and tell what is new."""
        left = None
        with contextlib.suppress(Exception):  # a view that changes while it is read
            left = self._left()
        more = {} if left is None else {"left_of_all": round(left, 1)}
        for alert in self.health.look(time.monotonic(), **more):
            self._say(f"warning: {alert.text}")
            # A supervisor that ends a process that hangs sends that itself: one message for one event.
            if alert.event and not (alert.event == HUNG and ends_hangs()):
                tell(alert.event, f"{self._name}: {alert.event}", alert.text, self._say)
        self._looks += 1


def _trim() -> None:
    """Let the C library give freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
