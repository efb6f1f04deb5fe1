"""When a worker counts as hung: a clock that counts only what the supervisor has seen pass."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from hpo.cli.main import main
from hpo.night import HANG_MINUTES
from hpo.night.endings import memory_kills, reason_of
from hpo.night.pulse import (
    ASKS,
    LOADING_TIMES,
    MOVED,
    REACHED,
    SUSPENDED_SECONDS,
    TICK_SECONDS,
    WATCH,
    WRITTEN_BYTES,
    Pulse,
)

HANG_SECONDS = 20.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    pulse = Pulse({}, clock)
    pulse.takes({"event": WATCH, "hang_seconds": HANG_SECONDS})
    pulse.starts(os.getpid())
    return pulse


def reaches(pulse: Pulse, done: int, what: str = "steps") -> bool:
    return pulse.takes({"event": REACHED, "what": what, "done": done})


def passes(pulse: Pulse, clock: Clock, seconds: float, tick: float = 1.0) -> bool:
    """Whether it hangs after so much time, seen in ticks."""
    hung = False
    end = clock.now + seconds
    while clock.now < end and not hung:
        clock.now += tick
        hung = pulse.is_hung()
    return hung


def test_it_hangs_after_the_hang_time_without_a_mark(pulse: Pulse, clock: Clock) -> None:
    reaches(pulse, 1)
    assert not passes(pulse, clock, HANG_SECONDS)
    assert passes(pulse, clock, 1)
    assert pulse.silent_words == "21 s"


def test_every_mark_starts_the_clock_anew_also_one_that_is_no_new_progress(
    pulse: Pulse, clock: Clock
) -> None:
    for _ in range(3):
        assert not passes(pulse, clock, HANG_SECONDS)
        reaches(pulse, 1)
    assert not passes(pulse, clock, HANG_SECONDS)
    pulse.takes({"event": MOVED})
    assert not passes(pulse, clock, HANG_SECONDS)


def test_until_the_first_step_it_may_take_longer(pulse: Pulse, clock: Clock) -> None:
    assert not passes(pulse, clock, LOADING_TIMES * HANG_SECONDS)
    assert passes(pulse, clock, 1)


def test_a_download_is_no_hang(pulse: Pulse, clock: Clock, tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "file").write_bytes(b"x" * 2 * WRITTEN_BYTES)
        assert not passes(pulse, clock, LOADING_TIMES * HANG_SECONDS - 1)


def test_a_download_after_the_first_step_is_no_hang_and_what_was_written_before_is_none(
    pulse: Pulse, clock: Clock, tmp_path: Path
) -> None:
    reaches(pulse, 1)
    pulse.is_hung()
    for _ in range(3):
        (tmp_path / "file").write_bytes(b"x" * 2 * WRITTEN_BYTES)
        assert not passes(pulse, clock, HANG_SECONDS + 1)
    (tmp_path / "file").write_bytes(b"x" * 2 * WRITTEN_BYTES)
    reaches(pulse, 2)
    assert not passes(pulse, clock, HANG_SECONDS) and passes(pulse, clock, 1)


def test_what_is_shown_at_a_terminal_is_no_download(pulse: Pulse, clock: Clock, tmp_path: Path) -> None:
    shown = 0
    pulse.shown = lambda: shown
    pulse.is_hung()
    (tmp_path / "file").write_bytes(b"x" * 2 * WRITTEN_BYTES)
    shown = 2 * WRITTEN_BYTES
    assert passes(pulse, clock, LOADING_TIMES * HANG_SECONDS + 1)


def test_a_machine_that_was_suspended_starts_the_clock_anew(pulse: Pulse, clock: Clock) -> None:
    reaches(pulse, 1)
    assert not passes(pulse, clock, HANG_SECONDS - 1)
    assert not passes(pulse, clock, 1, tick=8 * 3600)
    assert not passes(pulse, clock, HANG_SECONDS)


def test_a_supervisor_that_is_late_blames_no_worker(pulse: Pulse, clock: Clock) -> None:
    """On a machine that is overloaded, each of its looks at the clock counts as a short one."""
    reaches(pulse, 1)
    looks = int(HANG_SECONDS / TICK_SECONDS)
    assert not passes(pulse, clock, looks * (SUSPENDED_SECONDS - 1), tick=SUSPENDED_SECONDS - 1)
    assert passes(pulse, clock, 1)


def test_a_question_may_wait_for_ever_and_0_switches_it_off(pulse: Pulse, clock: Clock) -> None:
    reaches(pulse, 1)
    pulse.takes({"event": ASKS})
    assert not passes(pulse, clock, 100 * HANG_SECONDS)
    pulse.takes({"event": WATCH, "hang_seconds": 0})
    pulse.starts(os.getpid())
    assert not passes(pulse, clock, 100 * HANG_SECONDS)


def test_only_what_no_process_has_reached_before_is_new_progress(pulse: Pulse) -> None:
    assert reaches(pulse, 1) and reaches(pulse, 5)
    pulse.starts(os.getpid())
    assert not reaches(pulse, 4) and not reaches(pulse, 5) and reaches(pulse, 6)
    assert reaches(pulse, 1, "images") and not pulse.takes({"event": MOVED})


def test_the_default_is_the_one_that_the_help_names() -> None:
    for name in ("search", "confirm", "transfer", "train", "evaluate", "compare"):
        (option,) = (p for p in main.commands[name].params if p.name == "hang_minutes")
        assert re.search(rf"Default: {HANG_MINUTES:g}\.$", option.help or ""), name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "kind", "hung", "killed", "reason"),
    [
        (-signal.SIGKILL, "", True, True, "hang"),
        (75, "Interrupted", True, False, "hang"),
        (-signal.SIGKILL, "", False, True, "host_memory"),
        (-signal.SIGKILL, "", False, False, "process_died"),
        (-signal.SIGSEGV, "", False, True, "crash:SIGSEGV"),
        (5, "HostMemory", False, False, "host_memory"),
        (5, "DeviceLost", False, False, "device_lost"),
        (1, "", False, False, "process_died"),
    ],
)
def test_a_death_has_one_of_the_fixed_reasons(
    code: int, kind: str, hung: bool, killed: bool, reason: str
) -> None:
    error = {"kind": kind} if kind else None
    assert reason_of(code, error, hung=hung, killed_for_memory=killed) == reason
    assert memory_kills() >= 0
