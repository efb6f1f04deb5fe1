"""How the process of a worker ended, and what follows from it.

A worker that ends with one of this tool's errors reports it before (``hpo.night.role``).  Without a report the exit
code decides.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import Enum
from typing import Any

from trainer.errors import DeviceLost, Interrupted, MachineError, NoDevice, OutOfMemory, ToolError
from trainer.text import clean_text

LOG_BYTES = 4096  # of the end of a log, for the last line


class Ending(Enum):
    """What follows: nothing, a restart, the end of this post, or the end of all."""

    DONE = "done"
    AGAIN = "again"
    OUT = "out"
    FATAL = "fatal"


# Errors of one device, and a stop that was not asked for here: the other workers go on.
_OUT = {kind.__name__ for kind in (NoDevice, OutOfMemory, Interrupted)}
_STOPPED = (-signal.SIGTERM, -signal.SIGINT, Interrupted.exit_code)


class WorkersFailed(MachineError):
    """No worker could go on, so the work is not finished."""


def ending_of(code: int, error: Mapping[str, Any] | None) -> Ending:
    """``code``: as of ``subprocess``, negative for a signal.  ``error``: what the worker reported, None if nothing."""
    if code == 0:
        return Ending.DONE
    if error is None:
        return Ending.OUT if code in _STOPPED else Ending.AGAIN
    kind = error.get("kind")
    if kind == DeviceLost.__name__:
        return Ending.AGAIN
    return Ending.OUT if kind in _OUT else Ending.FATAL


def as_report(error: ToolError) -> dict[str, Any]:
    """An error as a report."""
    return {
        "kind": type(error).__name__,
        "code": error.exit_code,
        "message": error.message,
        "hint": error.hint,
        "commands": list(error.commands),
    }


def as_error(report: Mapping[str, Any]) -> ToolError:
    """The error of a report, with its exit code."""
    error = ToolError(str(report["message"]), str(report["hint"]), [str(c) for c in report["commands"]])
    error.exit_code = int(report["code"])
    return error


def why(code: int, error: Mapping[str, Any] | None, last_line: str) -> str:
    """How it ended, in words."""
    if error is not None:
        return str(error["message"])
    if code in _STOPPED:
        return "it was stopped from outside"
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"it ended with code {code}" + (f": {last_line}" if last_line else "")


def last_line(log: bytes) -> str:
    """The last line of a log that says something."""
    lines = log[-LOG_BYTES:].decode(errors="replace").splitlines()
    return clean_text(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:200]
