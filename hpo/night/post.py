"""A post: where one worker after the other runs, and who is told what happens there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from hpo.night.process import Process
from hpo.night.pulse import Pulse
from hpo.night.restarts import Restarts


class State(Enum):
    """Of a post."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSING = "pausing"
    DONE = "done"
    OUT = "out"


@dataclass
class Post:
    """Where one worker after the other runs.

    ``log``: None if the worker has the terminal.  ``code``, ``why``, ``reason``: how the last process ended, the exit
    code as of ``subprocess``.  ``starts``: how many there were.  ``record``: of the trial that it works on, where its
    deaths are noted.  ``hung_at``, ``killed_at``: when the process was asked to end as it hangs, and when it was killed
    (``time.monotonic``; 0 if it was not).
    """

    number: int
    device: str
    log: Path | None
    restarts: Restarts
    pulse: Pulse
    state: State = State.WAITING
    process: Process | None = None
    starts: int = 0
    leads: bool = False  # started before the others
    supervises: bool = False  # it has workers of its own
    due: float = 0.0
    code: int = 0
    why: str = ""
    reason: str = ""
    record: Path | None = None
    hung_at: float = 0.0
    killed_at: float = 0.0
    memory_kills: int = 0  # before the process began
    error: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        return f"worker {self.number}" + ("" if self.device == "cpu" else f" ({self.device})")


class Watch(Protocol):
    """Is told what happens."""

    def on_start(self, post: Post) -> None: ...
    def on_report(self, post: Post, report: Mapping[str, Any]) -> None: ...
    def on_hang(self, post: Post) -> None: ...
    def on_pause(self, post: Post, seconds: float) -> None: ...
    def on_out(self, post: Post) -> None: ...
    def on_error(self, post: Post) -> None: ...
    def on_done(self, post: Post) -> None: ...
