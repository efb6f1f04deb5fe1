"""What the work of a command tells its supervisor: that it moves, how far it is, what it works on.

Nothing happens in a process that has no supervisor: a library call, a test's runner, one process of torchrun.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hpo.night.pulse import ANSWERED, ASKS, MOVED, REACHED, WATCH
from hpo.night.role import BEGINS, NOTIFIES, WORKS_ON, Supervised
from trainer.errors import HostMemory, OutOfMemory, ToolError

WATCHED: ContextVar[Supervised | None] = ContextVar("WATCHED", default=None)
MOVED_SECONDS = 0.25  # between two marks that only say that it moves
WARM_POINTS = (
    10  # steps and images after which a process has had everything in memory that its settings need (assumed)
)

_last_moved = 0.0
_STANDS_STILL: ContextVar[bool] = ContextVar("_STANDS_STILL", default=False)


def moved() -> None:
    """The work has come to a place where it could be stopped: between two steps, images, files."""
    global _last_moved
    watched = WATCHED.get()
    if watched is None or _STANDS_STILL.get():
        return
    if (now := time.monotonic()) - _last_moved >= MOVED_SECONDS:
        _last_moved = now
        watched.report(MOVED, dropped=True)


@contextlib.contextmanager
def standing_still() -> Iterator[None]:
    """The work waits: in the block, ``moved`` says nothing."""
    token = _STANDS_STILL.set(True)
    try:
        yield
    finally:
        _STANDS_STILL.reset(token)


def reached(what: str, done: int) -> None:
    """A step, an image or a checkpoint: the work ``what`` is at ``done``."""
    watched = WATCHED.get()
    if watched is not None:
        watched.points += 1
        watched.report(REACHED, dropped=True, what=what, done=done)


def watch(hang_seconds: float) -> None:
    """The command begins.  ``hang_seconds``: without progress, after which it hangs; 0: never."""
    watched = WATCHED.get()
    if watched is not None:
        watched.ends_hangs = hang_seconds > 0
        watched.report(WATCH, hang_seconds=hang_seconds)


def ends_hangs() -> bool:
    """Whether a supervisor ends this process if it hangs, and says so."""
    watched = WATCHED.get()
    return watched is not None and watched.ends_hangs


def notifies(wanted: Mapping[str, Any]) -> None:
    """What the supervisor needs to send messages itself (``hpo.night.front.Send``)."""
    watched = WATCHED.get()
    if watched is not None:
        watched.report(NOTIFIES, wanted=dict(wanted))


def begins(root: Path, words: Sequence[str], cwd: str) -> None:
    """Work in a folder begins, which the command ``words`` goes on with."""
    watched = WATCHED.get()
    if watched is not None:
        watched.root = root.absolute()
        watched.report(BEGINS, root=str(watched.root), words=list(words), cwd=cwd)


def works_on(record: Path | None) -> None:
    """A trial begins whose ends are noted in ``record``; None: it has ended."""
    watched = WATCHED.get()
    if watched is not None:
        watched.report(WORKS_ON, record=None if record is None else str(record.absolute()))


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """A person is asked in the block, who may take any time."""
    watched = WATCHED.get()
    if watched is not None:
        watched.report(ASKS)
    yield
    if watched is not None:
        watched.report(ANSWERED)


def answered(*words: str, name: str | None = None) -> None:
    """Words of the command line that say what was answered, for a process that starts again.  ``name``: its NAME."""
    watched = WATCHED.get()
    if watched is not None:
        watched.report(ANSWERED, words=list(words), name=name)


def failed(error: ToolError) -> None:
    """The command ends with this error, which the user has been shown."""
    watched = WATCHED.get()
    if watched is not None:
        watched.fails(error)


def need_a_fresh_process(error: OutOfMemory) -> None:
    """Raise HostMemory if this machine's memory ran out in a process that has worked for a while: what it holds has
    grown, and a fresh one has room.  Where nobody starts one, or if it was the GPU's memory, nothing happens."""
    watched = WATCHED.get()
    if error.in_ram and watched is not None and watched.points >= WARM_POINTS:
        raise HostMemory(
            f"this process has used up the memory of this machine: {error.message}",
            "close other programs, lower max_data_loader_n_workers, or add memory",
        ) from None
