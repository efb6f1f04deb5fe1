"""Locks that a dead process cannot hold: fcntl.lockf on files of runs/<study>/.locks.

Liveness is a kernel lock, not a clock: it is free the moment its holder dies, it is not inherited by forked
children, and a suspended holder keeps it.  A process drops such a lock if it opens and closes the same file
again, so a lock's file is opened once, here, and whether another process holds it is asked without opening
it for writing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import MachineError

_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid
POLL_SECONDS = 0.05


class Lock:
    """One lock file.  Not reentrant; use one object per file and process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        assert self._descriptor is None, f"{self.path} is held by this process already"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            raise MachineError(
                f"cannot lock {self.path}: {error.strerror}", "put runs/ on a local disk"
            ) from error
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # closing drops the lock
            self._descriptor = None

    @contextmanager
    def held(self, wait_seconds: float = 120.0) -> Iterator[None]:
        """Hold the lock for a block.  Blocks are short: whoever waits two minutes is told who holds it."""
        until = time.monotonic() + wait_seconds
        while not self.try_acquire():
            if time.monotonic() > until:
                pid = holder(self.path)
                raise MachineError(
                    f"{self.path} is held by process {pid}", "wait for it, or stop that process"
                )
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self.release()


def holder(path: Path) -> int | None:
    """The process id that holds a lock, or None.  Never takes the lock; not for locks of this process."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else int(pid)
