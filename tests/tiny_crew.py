"""Several workers of one tiny study: the command and its workers are forks of a process that has everything imported.

What the command does and what a worker does is real; only the fresh interpreter of ``hpo.night.by_command`` is not.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from hpo.machine import ASSIGNED, WORKERS
from hpo.night import HANG_MINUTES, VARIABLE, WATCHED, Launch, Role, taken_role, watch
from hpo.search.workbench import Workbench
from hpo.terminal import reporting_console
from tests.tiny_session import run_session

Loaded = Callable[[Workbench], None]


class Forked:
    """A forked child with what ``hpo.night`` needs of ``subprocess.Popen``."""

    def __init__(self, pid: int, stdin: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def forks(run: Callable[[], None]) -> Callable[[Sequence[str]], Launch]:
    """Starts workers that call ``run`` with the role in their environment."""
    controls: list[
        IO[bytes]
    ] = []  # a fork inherits those of the other workers: a supervisor's death would go unseen

    def launch(role: Role, log: IO[bytes] | None) -> Forked:
        assert log is not None
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            os.dup2(reading, 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            for descriptor in (*(other.fileno() for other in controls if not other.closed), writing):
                os.close(descriptor)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
            os.environ[VARIABLE] = role.text()
            try:
                run()
                os._exit(0)
            except BaseException as error:
                traceback.print_exc()
                os._exit(getattr(error, "exit_code", 1))
        os.close(reading)
        controls.append(os.fdopen(writing, "wb", buffering=0))
        return Forked(pid, controls[-1])

    return lambda more: launch


def run_crew(
    root: Path,
    data: Path,
    trials: int | None,
    screen: Path,
    workers: int = 2,
    loaded: Loaded = lambda bench: None,
    hang_seconds: float = 60 * HANG_MINUTES,
    **words: Any,
) -> None:
    """``hpo search --workers`` for the study at ``root``; what it prints is added to the file ``screen``."""

    def work() -> None:
        worker = taken_role()
        assert worker is not None
        ASSIGNED.set(worker.role.device)
        WORKERS.set(worker.role.workers)
        WATCHED.set(worker)
        watch(hang_seconds)
        own = words if worker.role.leads else {**words, "enqueue": None}
        console = reporting_console(worker.report)
        with worker.errors_reported():
            run_session(
                root,
                data,
                trials,
                loaded,
                console=console,
                report=worker.report,
                until=worker.role.until,
                **own,
            )

    with screen.open("a", buffering=1) as output:
        console = Console(file=output, width=200)
        run_session(root, data, trials, console=console, launch=forks(work), workers=workers, **words)
