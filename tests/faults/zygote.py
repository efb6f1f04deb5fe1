"""Real processes that die really, in milliseconds: everything is imported once, every attempt is a fork."""

from __future__ import annotations

import os
import pkgutil
import signal
import traceback
from collections.abc import Callable
from typing import Any


def start(fn: Callable[..., Any], *args: Any) -> int:
    """Run fn in a forked child; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            fn(*args)
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def finish(pid: int) -> int:
    """Wait for a child: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attempt(fn: Callable[..., Any], *args: Any) -> int:
    return finish(start(fn, *args))


def die_at(place: str, call: int = 1, when: str = "after") -> None:
    """This process kills itself before or after the n-th call of a function: ``module.function`` or
    ``module.Class.method``."""
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), [0]

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, killing)
