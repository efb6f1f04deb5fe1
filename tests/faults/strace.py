"""A process that is killed by the kernel as it enters a call of the system: libraries in C are met as well."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.zygote import finish, start

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h, Yama


def traced(
    calls: Sequence[str],
    fn: Callable[..., Callable[[], None]],
    *args: Any,
    kill_at: tuple[str, int] | None = None,
) -> int:
    """Run what ``fn`` returns in a fork, under strace; its exit code, negative for a signal.  ``kill_at``: a
    call of the system and its number from 1, at whose entry SIGKILL arrives.  Skips the test if strace is not there or
    may not trace."""
    return _run(calls, [] if kill_at is None else [_inject(*kill_at)], None, fn, *args)


def count_calls(
    calls: Sequence[str], log: Path, fn: Callable[..., Callable[[], None]], *args: Any
) -> Counter[str]:
    """How often what ``fn`` returns makes each of these calls of the system."""
    assert _run(calls, [], log, fn, *args) == 0
    return Counter(line.partition("(")[0] for line in log.read_text().splitlines() if "(" in line)


def _inject(call: str, number: int) -> str:
    return f"inject={call}:signal=KILL:when={number}"


def _run(
    calls: Sequence[str],
    faults: Sequence[str],
    log: Path | None,
    fn: Callable[..., Callable[[], None]],
    *args: Any,
) -> int:
    program = shutil.which("strace")
    if program is None:
        _without("strace is not installed (apt-get install strace)")
    reading, writing = os.pipe()

    def run() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
        os.close(writing)
        part = fn(*args)
        os.read(reading, 1)  # until the tracer has attached
        part()

    pid = start(run)
    os.close(reading)
    expressions = [f"trace={','.join(calls)}", *faults]
    words = [word for text in expressions for word in ("-e", text)]
    with subprocess.Popen(
        [str(program), *words, "-o", str(log or os.devnull), "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        os.close(writing)
        code = finish(pid)
        tracer.stderr.read()
    if "attached" not in said:
        _without(f"strace may not trace: {said.strip()}")
    return code


def _without(why: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs strace: {why}")
    pytest.skip(f"NO STRACE: kills inside of a commit are not tested here: {why}")
