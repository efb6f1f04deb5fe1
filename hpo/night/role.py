"""A worker's side: which worker this process is, what it reports, and when it has to end.

The supervisor of several workers hands over the role in an environment variable, which is removed at once, so that no
other process inherits it (``taken_role``); a single worker is a fork of its supervisor (``hpo.night.front``).  Reports
are JSON lines in a pipe.  A pipe that is full never holds up the work: progress is dropped, everything else is sent
later.

The supervisor holds a pipe to it: the standard input of one of several workers.  A line in it asks to stop.  When it
closes, the supervisor has died: the worker saves and ends, and is killed if it does not.  Both ask with SIGTERM, as a
person would.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpo.night.endings import as_report
from trainer.errors import ConfigError, ToolError

VARIABLE = "HPO_WORKER"
ORPHAN_SECONDS = 60.0  # to save a step, once the supervisor is gone
LEFT_BYTES = 1 << 20  # of reports that the supervisor has not read
FLUSH_SECONDS = 2.0  # for the last reports
STOP_WORD = b"stop\n"
BEGINS, WORKS_ON, SUPERVISES, EXIT, ERROR = "begins", "works-on", "supervises", "exit", "error"
NOTIFIES = "notifies"
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies


@dataclass(frozen=True)
class Role:
    """Which of ``workers`` a process is.

    ``number``: from 1.  ``leads``: the others have not started, and it does what is done once.  ``reports``: the file
    descriptor of its pipe.  ``began`` and ``until`` (``time.monotonic``): when the whole command began, for the first
    start; and when no more work may begin, for a later start.  ``alone``: it is the only one, has the terminal and
    chooses its device itself.
    """

    number: int
    workers: int
    device: str
    leads: bool = False
    reports: int = -1
    began: float | None = None
    until: float | None = None
    alone: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))


def taken_role() -> Supervised | None:
    """This process as a worker; None if a person started it.  Call it once, early, in the main thread."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        role = Role(**json.loads(text))
        os.set_inheritable(role.reports, False)
        os.set_blocking(role.reports, False)
    except (TypeError, ValueError, OSError):
        raise ConfigError(
            f"{VARIABLE} is set, but this command was not started as a worker", f"run: unset {VARIABLE}"
        ) from None
    control = os.dup(0)  # whatever else reads standard input gets nothing
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return Supervised(role, control)


def _wakes_when_its_parent_dies() -> None:
    """A worker that is suspended with its supervisor (Ctrl-Z) could not notice the supervisor's death."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


class Supervised:
    """A process that a supervisor started.

    ``control``: the reading end of the pipe that the supervisor holds.  ``root``: the folder of the work, once it is
    known.  ``points``: steps and images that this process has done.  ``ends_hangs``: its supervisor ends it if it
    hangs.
    """

    def __init__(self, role: Role, control: int) -> None:
        self.role = role
        self.asked = False  # to stop, by whoever it was
        self.root: Path | None = None
        self.points = 0
        self.ends_hangs = False
        self._has_failed = False
        self._left = b""
        self._control = control
        self._sending = threading.Lock()
        _wakes_when_its_parent_dies()
        threading.Thread(target=self._watch, name="supervisor", daemon=True).start()

    def report(self, event: str, *, dropped: bool = False, **values: Any) -> None:
        """Send a report.  ``dropped``: it may be left out while the supervisor does not read."""
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        with self._sending:
            if (dropped and self._left) or len(self._left) > LEFT_BYTES:
                self._send()
                return
            self._left += line
            self._send()

    def _send(self) -> None:
        try:
            while self._left:
                self._left = self._left[os.write(self.role.reports, self._left) :]
        except BlockingIOError:
            return
        except OSError:  # the supervisor is gone
            self._left = b""

    @contextlib.contextmanager
    def errors_reported(self) -> Iterator[None]:
        """Report an error that ends the block."""
        try:
            yield
        except ToolError as error:
            self.fails(error)
            raise
        except (RuntimeError, MemoryError) as error:
            from trainer.oom import named

            known = named(error, "out of memory", "close other programs that use the GPU or much memory")
            if known is not None:
                self.fails(known)
            raise
        finally:
            self.flush()

    def fails(self, error: ToolError) -> None:
        """Report the error that ends this process, once."""
        if not self._has_failed:
            self._has_failed = True
            self.report(ERROR, **as_report(error))

    def flush(self) -> None:
        """Send what is left, if the supervisor reads."""
        until = time.monotonic() + FLUSH_SECONDS
        while self._left and time.monotonic() < until:
            with self._sending:
                self._send()
            time.sleep(0.01)

    def _watch(self) -> None:
        while True:
            try:
                said = os.read(self._control, len(STOP_WORD))
            except OSError:
                said = b""
            if not self.asked:
                self.asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            if not said:
                time.sleep(ORPHAN_SECONDS)
                os.kill(os.getpid(), signal.SIGKILL)
