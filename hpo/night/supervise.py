"""The supervisor: keeps a worker at every post until there is nothing left to do.

Owns when workers start, stop and start again.  Touches no device.  One worker leads: it starts first, and the others
follow when it says so, so that a mistake is found once and what is downloaded is downloaded once.

A worker that dies is started again after a pause (``hpo.night.restarts``).  When a post is left out, workers that had
nothing left to do start again: its trial is free now.  Does not own what an ending means (``hpo.night.endings``).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from hpo.night.endings import Ending, WorkersFailed, as_error, ending_of, why
from hpo.night.process import Launch, Process
from hpo.night.restarts import Restarts
from hpo.night.role import Role
from trainer.errors import ToolError
from trainer.files import make_folder

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between a second request to stop and SIGKILL
OTHERS_SECONDS = 120.0  # for the others to save, after an error that ends all


class State(Enum):
    """Of a post."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSING = "pausing"
    DONE = "done"
    OUT = "out"


@dataclass
class Post:
    """Where one worker after the other runs.  ``why``: how the last one ended.  ``starts``: how many there were."""

    number: int
    device: str
    log: Path
    restarts: Restarts
    state: State = State.WAITING
    process: Process | None = None
    starts: int = 0
    leads: bool = False  # started before the others
    due: float = 0.0
    why: str = ""
    error: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def words(self) -> str:
        return f"worker {self.number}" + ("" if self.device == "cpu" else f" ({self.device})")


class Watch(Protocol):
    """Is told what happens."""

    def on_start(self, post: Post) -> None: ...
    def on_report(self, post: Post, report: Mapping[str, Any]) -> None: ...
    def on_pause(self, post: Post, seconds: float) -> None: ...
    def on_out(self, post: Post) -> None: ...
    def on_error(self, post: Post) -> None: ...
    def on_done(self, post: Post) -> None: ...


class Supervisor:
    """The workers of one command.

    ``opens``: the report of the leading worker after which the others start.  ``finishes``: whether a report means
    progress, after which earlier deaths no longer count.  ``began``: when the command began (``time.monotonic``).
    ``until``: when no more work may begin, asked at every start but the first.
    """

    def __init__(
        self,
        devices: Sequence[str],
        launch: Launch,
        logs: Path,
        watch: Watch,
        *,
        opens: str,
        finishes: Callable[[Mapping[str, Any]], bool],
        began: float | None = None,
        until: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.posts = [
            Post(number, device, logs / f"worker-{number}.log", Restarts())
            for number, device in enumerate(devices, 1)
        ]
        self._launch, self._logs, self._watch = launch, logs, watch
        self._opens, self._finishes, self._began, self._until = opens, finishes, began, until
        self._is_open = self._stopping = False
        self._fatal: ToolError | None = None
        self._stopped_at = 0.0

    def run(self, asked: Callable[[], bool]) -> bool:
        """Until nothing is left to do.  ``asked``: whether to stop.  False if it was stopped.

        Raises the error of a worker that concerns all, and WorkersFailed if every post is left out.  With
        KeyboardInterrupt, or any other error, all workers end at once.
        """
        make_folder(self._logs)
        try:
            with self._suspended_with_me():
                while self._goes_on():
                    if asked() and not self._stopping:
                        self._stop()
                    for post in self.posts:
                        self._start_if_due(post)
                    self._wait()
                    for post in self.posts:
                        self._look_at(post)
                    self._end_those_that_hang()
        except BaseException:
            self._end_at_once()
            raise
        if self._fatal is not None:
            raise self._fatal
        if self._stopping:
            return False
        if all(post.state is State.OUT for post in self.posts):
            raise self._all_out()
        return True

    @property
    def _running(self) -> list[Process]:
        return [post.process for post in self.posts if post.process is not None]

    def _goes_on(self) -> bool:
        return bool(self._running) or (not self._stopping and any(map(self._will_start, self.posts)))

    def _will_start(self, post: Post) -> bool:
        if post.state is State.PAUSING:
            return True
        return post.state is State.WAITING and (self._is_open or post is self._leader)

    @property
    def _leader(self) -> Post | None:
        return next((post for post in self.posts if post.state is not State.OUT), None)

    def _start_if_due(self, post: Post) -> None:
        if self._stopping or not self._will_start(post) or time.monotonic() < post.due:
            return
        post.starts += 1
        post.leads = not self._is_open
        role = Role(
            number=post.number,
            workers=len(self.posts),
            device=post.device,
            leads=post.leads,
            began=self._began if post.starts == 1 else None,
            until=self._until() if post.starts > 1 else None,
        )
        heading = (
            f"{datetime.now().astimezone().isoformat(timespec='seconds')} {post.words}, start {post.starts}"
        )
        post.process, post.error, post.state = (
            Process(self._launch, role, post.log, heading),
            None,
            State.RUNNING,
        )
        self._watch.on_start(post)

    def _wait(self) -> None:
        pipes = [process.reading for process in self._running if process.reading is not None]
        select.select(pipes, [], [], POLL_SECONDS)

    def _look_at(self, post: Post) -> None:
        if post.process is None:
            return
        code = post.process.ended()  # before the last reports are read
        for report in post.process.reports():
            if report.get("event") == "error":
                post.error = report
                continue
            if report.get("event") == self._opens:
                self._is_open = True
            if self._finishes(report):
                post.restarts.progressed()
            self._watch.on_report(post, report)
        if code is not None:
            self._ended(post, code)

    def _ended(self, post: Post, code: int) -> None:
        assert post.process is not None
        post.why = why(code, post.error, post.process.last_line())
        post.process.forget()
        post.process = None
        ending = ending_of(code, post.error)
        if self._stopping:
            ending = Ending.DONE if ending is not Ending.FATAL or self._fatal is not None else ending
        if ending is Ending.DONE:
            post.state = State.DONE
            self._watch.on_done(post)
        elif ending is Ending.FATAL:
            assert post.error is not None
            self._fatal, post.state = as_error(post.error), State.OUT
            if self._running and not self._stopping:
                self._watch.on_error(post)
            self._stop()
        elif ending is Ending.AGAIN and (pause := post.restarts.died()) is not None:
            post.state, post.due = State.PAUSING, time.monotonic() + pause
            self._watch.on_pause(post, pause)
        else:
            if ending is Ending.AGAIN:
                times = f"it died {post.restarts.deaths} times without finishing a trial"
                post.why = f"{times}, the last time: {post.why}"
            self._leave_out(post)

    def _leave_out(self, post: Post) -> None:
        post.state = State.OUT
        self._watch.on_out(post)
        for other in self.posts:
            if other.state is State.DONE:
                other.state = State.WAITING

    def _all_out(self) -> WorkersFailed:
        post = self.posts[-1]
        which = "the worker" if len(self.posts) == 1 else f"none of the {len(self.posts)} workers"
        hint = str((post.error or {}).get("hint", "")) or f"see {post.log}"
        return WorkersFailed(f"{which} can go on; {post.words}: {post.why}", hint)

    @contextlib.contextmanager
    def _suspended_with_me(self) -> Iterator[None]:
        """Ctrl-Z suspends the workers too, and fg lets them go on: the terminal does not reach their sessions."""
        before = signal.getsignal(signal.SIGTSTP)
        if before is not signal.SIG_DFL:
            yield
            return

        def suspend(number: int, frame: FrameType | None) -> None:
            for process in self._running:
                process.send(signal.SIGSTOP)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)  # this process stands still here
            signal.signal(signal.SIGTSTP, suspend)
            for process in self._running:
                process.send(signal.SIGCONT)

        signal.signal(signal.SIGTSTP, suspend)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, before)

    # The end

    def _stop(self) -> None:
        self._stopping, self._stopped_at = True, time.monotonic()
        for process in self._running:
            process.ask_to_stop()

    def _end_those_that_hang(self) -> None:
        """After an error that concerns all.  A person who asked to stop decides how long to wait."""
        if self._fatal is not None and time.monotonic() - self._stopped_at > OTHERS_SECONDS:
            for process in self._running:
                process.send(signal.SIGKILL)

    def _end_at_once(self) -> None:
        """SIGINT is the second request to stop, after which a worker ends at once."""
        try:
            if not self._stopping:
                self._stop()
            for number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
                for process in self._running:
                    process.send(number)
                until = time.monotonic() + seconds
                while time.monotonic() < until and any(p.ended() is None for p in self._running):
                    time.sleep(POLL_SECONDS)
        finally:
            for process in self._running:
                process.send(signal.SIGKILL)
