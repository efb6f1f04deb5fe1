"""The supervisor: keeps a worker at every post until there is nothing left to do.

Owns when workers start, stop and start again.  Touches no device.  One worker leads: it starts first, and the others
follow when it says so, so that a mistake is found once and what is downloaded is downloaded once.

A worker that dies is started again after a pause (``hpo.night.restarts``), and one that shows no progress is ended
first (``hpo.night.pulse``): SIGTERM, a while to save, SIGKILL.  One that does not even die then waits for its driver;
it is left alone, and its post is left out.  When a post is left out, workers that had nothing left to do start again:
its trial is free now.  Does not own what an ending means (``hpo.night.endings``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from hpo.night.endings import (
    DIED,
    HANG,
    HOST_MEMORY,
    Ending,
    WorkersFailed,
    as_error,
    ending_of,
    memory_kills,
    reason_of,
    why,
)
from hpo.night.post import Post, State, Watch
from hpo.night.process import IsWorker, Launch, Process
from hpo.night.pulse import MARKS, Pulse
from hpo.night.restarts import Restarts
from hpo.night.role import ERROR, ORPHAN_SECONDS, SUPERVISES, WORKS_ON, Role
from hpo.night.watched import WATCHED
from trainer.errors import MachineError, ToolError
from trainer.files import append_line, make_folder

NIGHT = "night.jsonl"  # in the folder of the work: a line for every worker that died
POLL_SECONDS = 0.1
STUCK_SECONDS = 30.0  # after SIGKILL: a process that still exists waits for its driver (assumed)
SUSPEND_SECONDS = 1.0  # for a worker that has workers of its own to suspend them
GRACE_SECONDS = 5.0  # between a second request to stop and SIGKILL
OTHERS_SECONDS = 120.0  # for the others to save, after an error that ends all


class Supervisor:
    """The workers of one command.

    ``opens``: the report of the leading worker after which the others start.  ``finishes``: whether a report means
    progress, after which earlier deaths no longer count.  ``began``: when the command began (``time.monotonic``).
    ``until``: when no more work may begin, asked at every start but the first.  ``judge``: what an exit code means.
    ``stop_by``: the signal that asks a worker to stop; without it, the pipe does.  ``logs``: None for a single worker
    that has the terminal (``hpo.night.front``).
    """

    def __init__(
        self,
        devices: Sequence[str],
        launch: Launch,
        logs: Path | None,
        watch: Watch,
        *,
        opens: str,
        finishes: Callable[[Mapping[str, Any]], bool],
        began: float | None = None,
        until: Callable[[], float | None] = lambda: None,
        judge: Callable[[Post, int], Ending] = lambda post, code: ending_of(code, post.error),
        stop_by: Callable[[], int] | None = None,
    ) -> None:
        furthest: dict[str, int] = {}
        self.posts = [
            Post(number, device, logs and logs / f"worker-{number}.log", Restarts(), Pulse(furthest))
            for number, device in enumerate(devices, 1)
        ]
        self.root: Path | None = logs and logs.parent
        self._judge, self._stop_by = judge, stop_by
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
        if self._logs is not None:
            make_folder(self._logs)
        if (above := WATCHED.get()) is not None:
            above.report(SUPERVISES)
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
                        self._look_for_hang(post)
                    self._end_those_that_do_not_stop()
        except IsWorker:  # this is a fork, where none of this goes on
            raise
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
        post.record, post.hung_at, post.killed_at, post.supervises = None, 0.0, 0.0, False
        post.memory_kills = memory_kills()
        heading = (
            f"{datetime.now().astimezone().isoformat(timespec='seconds')} {post.words}, start {post.starts}"
        )
        post.process, post.error, post.state = (
            Process(self._launch, role, post.log, heading),
            None,
            State.RUNNING,
        )
        post.pulse.starts(post.process.pid)
        self._watch.on_start(post)

    def _wait(self) -> None:
        pipes = [process.reading for process in self._running if process.reading is not None]
        select.select(pipes, [], [], POLL_SECONDS)

    def _look_at(self, post: Post) -> None:
        if post.process is None:
            return
        code = post.process.ended()  # before the last reports are read
        for report in post.process.reports():
            event = report.get("event")
            if post.pulse.takes(report) or self._finishes(report):
                post.restarts.progressed()
            if event == ERROR:
                post.error = report
            elif event == WORKS_ON:
                post.record = Path(report["record"]) if report["record"] else None
            elif event == SUPERVISES:
                post.supervises = True
            elif event == self._opens:
                self._is_open = True
            if event not in (ERROR, WORKS_ON, SUPERVISES, *MARKS):
                self._watch.on_report(post, report)
        if code is not None:
            self._ended(post, code)

    def _look_for_hang(self, post: Post) -> None:
        if post.process is None:
            return
        now = time.monotonic()
        if not post.hung_at:
            if post.pulse.is_hung():
                post.hung_at = now
                post.why = f"it hung: no progress for {post.pulse.silent_words}"
                self._watch.on_hang(post)
                post.process.send(signal.SIGTERM)
                post.process.send(signal.SIGCONT)  # it may be suspended
        elif not post.killed_at:
            if now - post.hung_at > post.pulse.grace_seconds:
                post.killed_at = now
                post.process.send(signal.SIGKILL)
        elif now - post.killed_at > STUCK_SECONDS:
            post.why += (
                f"; process {post.process.pid} waits for its driver and cannot be ended, so it keeps its GPU"
            )
            post.reason = HANG
            self._note(post, None)
            post.process.forget()
            post.process = None
            self._leave_out(post)

    def _note(self, post: Post, pause: float | None) -> None:
        """Note a death where the trial is, and where the work is."""
        row = {
            "event": DIED,
            "reason": post.reason,
            "why": post.why,
            "time_utc": datetime.now(UTC).isoformat(),
        }
        more = {"worker": post.number, "restarts_in": pause}
        with contextlib.suppress(MachineError, OSError):  # the disk may be full
            if post.record is not None and post.record.is_file():
                append_line(post.record, json.dumps(row))
            if self.root is not None:
                append_line(self.root / NIGHT, json.dumps({**row, **more}))

    def _ended(self, post: Post, code: int) -> None:
        assert post.process is not None
        hung = bool(post.hung_at) and code != 0
        post.code = code
        if not hung:
            post.why = why(code, post.error, post.process.last_line())
        killed_for_memory = memory_kills() > post.memory_kills
        post.reason = reason_of(code, post.error, hung=hung, killed_for_memory=killed_for_memory)
        if post.reason == HOST_MEMORY and post.error is None:
            post.why += ", as the memory of this machine was used up"
        post.process.forget()
        post.process = None
        ending = Ending.AGAIN if hung else self._judge(post, code)
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
        elif ending is Ending.AGAIN:
            pause = post.restarts.died(in_trial=post.record is not None)
            if pause is not None and post.supervises:  # its workers have to end first
                pause = max(pause, ORPHAN_SECONDS + GRACE_SECONDS)
            self._note(post, pause)
            if pause is not None:
                post.state, post.due = State.PAUSING, time.monotonic() + pause
                self._watch.on_pause(post, pause)
                return
            times = f"it died {post.restarts.deaths} times without new progress"
            post.why = f"{times}, the last time: {post.why}"
            self._leave_out(post)
        else:
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

        # In a session of its own, without a shell, a process is not suspended by SIGTSTP.
        by = signal.SIGTSTP if WATCHED.get() is None else signal.SIGSTOP

        def suspend(number: int, frame: FrameType | None) -> None:
            for post in self.posts:
                if post.process is not None:
                    _suspend(post.process, supervises=post.supervises)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), by)  # this process stands still here
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
            if self._stop_by is None:
                process.ask_to_stop()
            else:
                process.send(self._stop_by())
            process.send(signal.SIGCONT)  # it may be suspended

    def _end_those_that_do_not_stop(self) -> None:
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


def _suspend(process: Process, *, supervises: bool) -> None:
    if supervises:  # it suspends its workers, and then itself
        process.send(signal.SIGTSTP)
        until = time.monotonic() + SUSPEND_SECONDS
        while not process.stands_still() and time.monotonic() < until:
            time.sleep(0.01)
    process.send(signal.SIGSTOP)
