"""One process of a worker, as its supervisor sees it.

One of several workers runs the same command as the user typed, in a fresh interpreter, as its supervisor has loaded too
much for a fork.  It has a session of its own, so Ctrl-C at the terminal reaches the supervisor alone, which decides.
Its whole output goes to a log file, also if the supervisor dies.  (A single worker: ``hpo.night.front``.)
"""

from __future__ import annotations

import contextlib
import json
import os
import site
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from hpo.night.endings import LOG_BYTES, last_line
from hpo.night.role import STOP_WORD, VARIABLE, Role
from trainer.files import machine_error

READ_BYTES = 1 << 16


class IsWorker(BaseException):
    """Raised in the fork that is the worker (``hpo.night.front``), so that it leaves the code of its supervisor."""


class Running(Protocol):
    """What is needed of ``subprocess.Popen``."""

    pid: int
    stdin: IO[bytes] | None

    def poll(self) -> int | None: ...


# (the role, with the descriptor for its reports; the log, if it has one) → the process.  May raise OSError.
Launch = Callable[[Role, IO[bytes] | None], Running]


def by_command(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Launch:
    """Run ``hpo WORDS``.  ``environment``: more variables."""

    def launch(role: Role, log: IO[bytes] | None) -> Running:
        return subprocess.Popen(
            # -P: a file in the user's folder that is called like a module must not be imported
            [sys.executable, "-P", "-m", "hpo.cli", *words],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(role.reports,),
            start_new_session=True,
            env={
                **os.environ,
                **_path(),
                **(environment or {}),
                "PYTHONUNBUFFERED": "1",
                VARIABLE: role.text(),
            },
        )

    return launch


def _path() -> dict[str, str]:
    """Where this package is, if only the current folder or the script's folder says so."""
    import hpo

    root = str(Path(hpo.__file__ or "").resolve().parents[1])
    known = [*site.getsitepackages(), site.getusersitepackages()]
    given = os.environ.get("PYTHONPATH", "")
    if root in known or root in given.split(os.pathsep):
        return {}
    return {"PYTHONPATH": os.pathsep.join([root, *([given] if given else [])])}


class Process:
    """A worker's process and its reports.  ``log``: where its output goes; None if it has the terminal.

    Raises MachineError if it cannot be started."""

    def __init__(self, launch: Launch, role: Role, log: Path | None, heading: str) -> None:
        self.log = log
        self._text = b""
        reading, writing = os.pipe()
        try:
            with contextlib.nullcontext() if log is None else log.open("ab") as output:
                if output is not None:
                    output.write(f"== {heading}\n".encode())
                    output.flush()
                self._running = launch(Role(**{**vars(role), "reports": writing}), output)
        except BaseException as error:
            os.close(reading)
            if isinstance(error, OSError):
                raise machine_error(error, log or Path(sys.executable)) from error
            raise
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self.reading: int | None = reading

    @property
    def pid(self) -> int:
        return self._running.pid

    def reports(self) -> list[dict[str, Any]]:
        """What it has reported since the last call."""
        while self.reading is not None:
            try:
                read = os.read(self.reading, READ_BYTES)
            except BlockingIOError:
                break
            self._text += read
            if not read:
                self._close()
        *lines, self._text = self._text.split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                if isinstance(report := json.loads(line), dict):
                    found.append(report)
        return found

    def ask_to_stop(self) -> None:
        """Let it save and end."""
        if self._running.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._running.stdin.write(STOP_WORD)
                self._running.stdin.flush()

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self._running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stands_still(self) -> bool:
        """Whether it is suspended by a signal."""
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._running.poll()

    def forget(self) -> None:
        """Close what belongs to a process that has ended.  Read the last reports before."""
        self._close()
        if self._running.stdin is not None:
            with contextlib.suppress(OSError):
                self._running.stdin.close()

    def last_line(self) -> str:
        """The last line of the log."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - LOG_BYTES))
                return last_line(file.read())
        except OSError:
            return ""

    def _close(self) -> None:
        if self.reading is not None:
            os.close(self.reading)
            self.reading = None
