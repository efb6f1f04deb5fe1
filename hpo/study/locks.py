"""Locks that the kernel releases when their process dies: fcntl.lockf on files in runs/<study>/.locks.

Whether a process is alive is decided by a kernel lock, not by a timeout.  The lock is released when its
holder dies, is not inherited by forked children, and is kept by a suspended process.  A process loses such a
lock when it closes any descriptor of the same file.  So this module opens each lock file only once, and
``holder`` must not be used for locks of the same process.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import MachineError
from trainer.files import machine_error

if TYPE_CHECKING:
    import optuna

_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, pid
POLL_SECONDS = 0.05
RETRIES = 100  # if the lock file is deleted while it is being opened


@dataclass(frozen=True)
class Holder:
    """The process that has a lock.  ``host``: its machine; empty if it is this one."""

    pid: int
    host: str = ""

    @property
    def words(self) -> str:
        return f"process {self.pid}" + (f" on {self.host}" if self.host else "")


class Lock:
    """One lock file.  Not reentrant; use one object per file and process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if it is free.  Several processes can hold a shared lock; then none
        can hold it exclusively."""
        assert self._descriptor is None, f"{self.path} is already held by this process"
        for attempt in range(RETRIES, -1, -1):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt:
                    continue  # its folder was just removed (hpo.study.use.in_use)
                raise machine_error(error, self.path) from error
            try:
                taken = self._lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            except MachineError:
                os.close(descriptor)
                raise
            if taken and _is_at(descriptor, self.path):
                self._descriptor = descriptor
                return True
            os.close(descriptor)
            if not taken:
                return False
        return False

    def try_alone(self) -> bool:
        """Make a shared lock exclusive if no other process shares it; otherwise it stays shared."""
        assert self._descriptor is not None, f"{self.path} is not held"
        return self._lock(self._descriptor, fcntl.LOCK_EX)

    def _lock(self, descriptor: int, kind: int) -> bool:
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process holds it
            return False
        except OSError as error:
            raise MachineError(
                f"cannot lock {self.path}: {error.strerror}",
                "put runs/ on a disk whose files can be locked: a local one, or NFS version 4",
            ) from error
        return True

    def check(self, *, certain: bool = False) -> None:
        """A living process cannot lose the lock, so there is nothing to check (``hpo.study.ownership.Claimed``)."""

    def holder(self) -> Holder | None:
        """The process that has the lock.  Not for locks of this process."""
        pid = holder(self.path)
        return None if pid is None else Holder(pid)

    @contextmanager
    def telling(self, trial: optuna.Trial) -> Iterator[optuna.Trial]:
        """The trial as it is: no other process can tell it."""
        yield trial

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # closing releases the lock
            self._descriptor = None

    @contextmanager
    def held(self, wait_seconds: float = 120.0, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock for a block.  Blocks are short, so waiting two minutes raises
        MachineError with the holder."""
        until = time.monotonic() + wait_seconds
        while not self.try_acquire(shared=shared):
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


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the file at ``path``; it may have been deleted since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def holder(path: Path) -> int | None:
    """The id of the process that holds a lock, or None.  Never takes the lock.  Not for locks of this process."""
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


@contextmanager
def alone(path: Path, work: str, hint: str = "wait for it, or stop that process") -> Iterator[None]:
    """Run a block in only one process at a time.  ``work`` describes it for the message, for example "trains NAME".

    Raises MachineError if another process is already doing it.
    """
    lock = Lock(path)
    if not lock.try_acquire():
        raise MachineError(f"process {holder(path)} already {work}", hint)
    try:
        yield
    finally:
        lock.release()
