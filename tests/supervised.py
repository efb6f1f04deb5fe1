"""Real long commands under their real supervisor: forks of a process that has everything imported.

A test says what goes wrong in the worker (``Fault``), as a patch of what it calls after every step or image; it goes
wrong once, or again and again.  The supervisor, the signals and the files are real.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hpo.judge.view
import hpo.night
import hpo.search.trial
import hpo.train.adapter
from hpo.cli.main import main
from hpo.night import restarts
from tests.faults.zygote import start
from trainer.loop import Conduct

MIB = 1 << 20
# Called in the worker after every step and image, with its number and the file or images that it belongs to.
Fault = Callable[[int, str], None]


def command(
    here: Path, screen: Path, words: Sequence[str], fault: Fault, prepare: Callable[[], None]
) -> None:
    """``hpo WORDS`` in ``here``; what it prints is added to ``screen``.  ``prepare`` runs before the first fork."""
    os.chdir(here)
    with screen.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    _run(words, fault, prepare)


def command_at_terminal(
    here: Path, terminal: int, words: Sequence[str], fault: Fault, prepare: Callable[[], None]
) -> None:
    """The same, with a terminal: ``terminal`` is the descriptor of its further end."""
    os.setsid()
    os.chdir(here)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    os.close(os.open(os.ttyname(terminal), os.O_RDWR))  # becomes the controlling terminal of this session
    os.environ["TERM"] = "xterm"
    _run(words, fault, prepare)


def _run(words: Sequence[str], fault: Fault, prepare: Callable[[], None]) -> None:
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["hpo", *words]
    restarts.PAUSES = (0.05, 0.05, 0.05)
    _after_each_step(fault)
    prepare()
    main()


def _after_each_step(fault: Fault) -> None:
    write, reached = hpo.train.adapter.StepLog.write, hpo.night.reached

    def writes(self: Any, event: Any, **more: Any) -> None:
        write(self, event, **more)
        if type(event).__name__ == "Step":
            fault(event.step, str(self.path))

    def reaches(what: str, done: int) -> None:
        reached(what, done)
        fault(done, what)

    hpo.train.adapter.StepLog.write = writes  # type: ignore[method-assign]
    hpo.judge.view.reached = hpo.search.trial.reached = reaches


def begin(
    here: Path,
    screen: Path,
    words: Sequence[str],
    fault: Fault = lambda done, what: None,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """The process of the command: that of its supervisor."""
    return start(command, here, screen, words, fault, prepare)


# What goes wrong


def once(marker: Path, step: int, what: Callable[[], None], within: str = "") -> Fault:
    """At this step or image, in one process only.  ``within``: a part of the file or of what is drawn."""

    def fault(done: int, where: str) -> None:
        if done == step and within in where and not marker.exists():
            marker.write_text(str(os.getpid()))
            what()

    return fault


def always(step: int, what: Callable[[], None], within: str = "") -> Fault:
    """The same in every process."""
    return lambda done, where: what() if done == step and within in where else None


def spin() -> None:
    while True:
        pass


def hold_the_interpreter() -> None:
    """Wait in C for a lock that is never free, without letting Python run anything, signal handlers included."""
    library, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)


def crash() -> None:
    ctypes.string_at(0)


def stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def use_up_memory() -> None:
    """A limit on this process's memory, and then all of it."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 200 * MIB, -1))
    kept = []
    while True:
        kept.append(bytearray(16 * MIB))


def tell_supervisor(*numbers: int) -> Callable[[], None]:
    """Send the supervisor these signals, each once the one before has arrived here, and wait to be asked to stop."""

    def what() -> None:
        for number in numbers:
            os.kill(os.getppid(), number)
            until(is_asked_to_stop)

    return what


def is_asked_to_stop() -> bool:
    handler = signal.getsignal(signal.SIGTERM)
    return bool(getattr(getattr(handler, "__self__", None), "asked", False))


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def saves_every_step() -> None:
    """``prepare``: every step is kept as a checkpoint."""
    Conduct.__init__.__kwdefaults__["checkpoint_every_seconds"] = 0.0  # type: ignore[index]


def state_of(pid: int) -> str:
    """The state of a process, a letter as in ``ps``; empty if there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def is_over(pid: int) -> bool:
    """Whether a process has ended; its parent may not have asked for its exit code yet."""
    return state_of(pid) in ("", "Z")


def private_bytes(pid: int) -> int:
    """Memory of a process that is in RAM and not of a file."""
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("RssAnon:"))


def disk_full_after(free: int) -> None:
    """``prepare``: so many writes to files in each process, then the disk is full for ever."""
    write, made = os.write, [0]

    def limited(descriptor: int, content: Any) -> int:
        made[0] += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if made[0] > free and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    os.write = limited
