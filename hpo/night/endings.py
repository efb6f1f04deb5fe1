"""How the process of a worker ended, and what follows from it.

A worker that ends with one of this tool's errors reports it before (``hpo.night.role``).  Without a report the exit
code decides.  Owns the reasons that the record of a trial gives for the death of its process:

    hang            no step, image or checkpoint for the hang time (``hpo.night.pulse``)
    host_memory     the memory of the machine was used up
    device_lost     the driver has dropped the process from the GPU
    crash:SIGSEGV   a fault in native code: SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL
    process_died    anything else
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from trainer.errors import (
    DeviceLost,
    HostMemory,
    Interrupted,
    MachineError,
    NoDevice,
    OutOfMemory,
    ToolError,
)
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
_STOPPED = (
    -signal.SIGTERM,
    -signal.SIGINT,
    -signal.SIGUSR1,
    Interrupted.exit_code,
    Interrupted.TERMINATED,
)
# A fresh process may do what this one could not.
HANG, HOST_MEMORY, DEVICE_LOST, DIED_REASON = "hang", "host_memory", "device_lost", "process_died"
_AGAIN = {DeviceLost.__name__: DEVICE_LOST, HostMemory.__name__: HOST_MEMORY}
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
DIED = "died"  # the event in the record of a trial


class WorkersFailed(MachineError):
    """No worker could go on, so the work is not finished."""


def needs_a_fresh_process(error: Mapping[str, Any] | None) -> bool:
    """Whether what a worker reported is over once its process is."""
    return error is not None and error.get("kind") in _AGAIN


def was_stopped(code: int) -> bool:
    """Whether an exit code says that somebody asked the process to stop."""
    return code in _STOPPED


def ending_of(code: int, error: Mapping[str, Any] | None) -> Ending:
    """``code``: as of ``subprocess``, negative for a signal.  ``error``: what the worker reported, None if nothing."""
    if code == 0:
        return Ending.DONE
    if error is None:
        return Ending.OUT if code in _STOPPED else Ending.AGAIN
    kind = error.get("kind")
    if kind in _AGAIN:
        return Ending.AGAIN
    return Ending.OUT if kind in _OUT else Ending.FATAL


def reason_of(code: int, error: Mapping[str, Any] | None, *, hung: bool, killed_for_memory: bool) -> str:
    """The reason for its death, one of the list above."""
    if hung:
        return HANG
    if error is not None and error.get("kind") in _AGAIN:
        return _AGAIN[str(error["kind"])]
    if killed_for_memory and code == -signal.SIGKILL:
        return HOST_MEMORY
    if -code in _FAULTS:
        return f"crash:{signal.Signals(-code).name}"
    return DIED_REASON


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory, on this machine and in this process's cgroup."""
    found = 0
    for path in (Path("/proc/vmstat"), _cgroup() / "memory.events"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return found


def _cgroup() -> Path:
    """The folder of this process's cgroup (version 2)."""
    try:
        rows = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        rows = []
    own = next((row.removeprefix("0::/") for row in rows if row.startswith("0::/")), "")
    return Path("/sys/fs/cgroup") / own


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
