"""The guard beside a piece of work: what goes wrong in it reaches neither the work nor its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpo.health.guard import Guard, Lookout
from hpo.health.reading import Reading
from hpo.night import WATCHED, watched
from hpo.study.notify import NOTIFIER, Notifier
from hpo.study.thresholds import Thresholds
from hpo.terminal.stop import Stop
from tests.healthfigures import Told
from tests.inbox import Post
from trainer.events import Step


def step(number: int) -> Step:
    return Step(number, 1000, 1, 1, 0.1, 1e-4, 0.0, 1.0, 0.01)


def guard_of(folder: Path, sensors: Any, lines: list[str], **more: Any) -> Guard:
    return Guard(Lookout(Thresholds(), sensors, 0.002), folder, lines.append, name="luca", **more)


def until(holds: Callable[[], bool]) -> None:
    """Wait for the guard's thread; it looks every two milliseconds."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_driver_that_hangs_holds_up_neither_the_steps_nor_the_end(tmp_path: Path) -> None:
    asked, never = threading.Event(), threading.Event()

    class Hanging:
        def read(self) -> Reading:
            asked.set()
            never.wait()
            return Reading()

    began = time.monotonic()
    with guard_of(tmp_path, Hanging(), []) as guard:
        assert asked.wait(10)
        for number in range(10_000):
            guard.on_event(step(number))
    assert time.monotonic() - began < 5
    never.set()


def test_sensors_that_fail_are_asked_again(tmp_path: Path) -> None:
    class Failing(Told):
        def read(self) -> Reading:
            reading = super().read()
            if self.looks < 5:
                raise RuntimeError("driver/library version mismatch")
            return reading

    sensors = Failing()
    with guard_of(tmp_path, sensors, []) as guard:
        until(lambda: sensors.looks > 8)
        assert guard.line().startswith("GPU 62 °C")


def test_asking_to_stop_ends_a_pause(tmp_path: Path) -> None:
    sensors, lines = Told(), []
    sensors.gpu(celsius=99.0)
    asked = threading.Event()
    with guard_of(tmp_path, sensors, lines) as guard:
        until(lambda: bool(guard.health.paused))
        threading.Timer(0.05, asked.set).start()
        guard.on_event(step(1), asked.is_set)
    assert lines[-1].startswith("paused: GPU 99 °C") and "goes on after the pause" not in lines


def test_one_of_several_processes_never_waits(tmp_path: Path) -> None:
    sensors = Told()
    sensors.gpu(celsius=99.0)
    with guard_of(tmp_path, sensors, [], pauses=False) as guard:
        until(lambda: bool(guard.health.paused))
        guard.on_event(step(1))


def test_danger_is_sent_and_a_warning_is_only_shown(tmp_path: Path) -> None:
    sensors, lines, post = Told(), list[str](), Post()
    token = NOTIFIER.set(Notifier(post))  # type: ignore[arg-type]
    try:
        guard = guard_of(tmp_path, sensors, lines)
    finally:
        NOTIFIER.reset(token)
    with guard:
        sensors.machine(ram_used=75.0)
        until(lambda: len(lines) == 1)
        sensors.machine(ram_used=95.0)
        until(lambda: len(post.messages) == 1)
    assert "RAM 75 % used" in lines[0] and "RAM 95 % used" in post.messages[0].body
    assert post.messages[0].title == "luca: anomaly"


@pytest.mark.parametrize("freed", [0, 12_300_000])
def test_relief_is_done_by_the_work_between_two_steps(tmp_path: Path, freed: int) -> None:
    sensors, lines = Told(), []
    sensors.machine(ram_used=95.0)
    where: list[str] = []

    def relief() -> tuple[str, int]:
        where.append(threading.current_thread().name)
        return "half of it", freed

    with guard_of(tmp_path, sensors, lines) as guard:
        guard.relief = relief
        until(lambda: guard.health.relief_due)
        guard.on_image(1, 10)
        assert not guard.health.relief_due
    assert where == [threading.current_thread().name] and "RAM is short: half of it" in lines


class Idle:
    """Nothing works on this machine."""

    def read(self) -> Reading:
        return Reading(process_busy=0.0)


@pytest.mark.parametrize("ends_hangs", [False, True])
def test_a_hang_is_told_by_the_supervisor_where_there_is_one(tmp_path: Path, ends_hangs: bool) -> None:
    told, lines = Post(), list[str]()
    supervisor: Any = SimpleNamespace(ends_hangs=ends_hangs)
    tokens = NOTIFIER.set(Notifier(told)), WATCHED.set(supervisor)  # type: ignore[arg-type]
    try:
        guard = guard_of(tmp_path, Idle(), lines)
        guard.health._news_at = guard.health._busy_at = time.monotonic() - 3600
        guard.look()
    finally:
        NOTIFIER.reset(tokens[0])
        WATCHED.reset(tokens[1])
    assert [line for line in lines if "the run hangs" in line]
    assert [message.title for message in told.messages] == ([] if ends_hangs else ["luca: hung"])


class Marks:
    """A supervisor that counts what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def report(self, event: str, **_: Any) -> None:
        self.events.append(event)


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marks]:
    monkeypatch.setattr(watched, "MOVED_SECONDS", 0.0)
    found = Marks()
    token = WATCHED.set(found)  # type: ignore[arg-type]
    yield found
    WATCHED.reset(token)


def test_a_driver_that_hangs_in_a_pause_does_not_make_it_endless_and_is_no_progress(
    tmp_path: Path, marks: Marks
) -> None:
    asked, never = threading.Event(), threading.Event()

    class HangsWhenHot(Told):
        def read(self) -> Reading:
            if self.looks:
                asked.set()
                never.wait()
            return super().read()

    sensors, lines = HangsWhenHot(), []
    sensors.gpu(celsius=99.0)
    lookout = Lookout(Thresholds(pause_minutes=0.01), sensors, 0.002)
    began = time.monotonic()
    with Guard(lookout, tmp_path, lines.append, name="luca") as guard:
        assert asked.wait(10) and guard.health.paused
        for number in range(3):
            guard.on_event(step(number), Stop(lambda: None))
            if number == 0:
                told = [event for event in marks.events if event == "moved"]
    assert 0.6 <= time.monotonic() - began < 10
    assert [line for line in lines if "pause" in line and "warning" not in line] == [
        "paused: GPU 99 °C, goes on below 75 °C",
        "goes on after the pause",
    ], "the next steps do not wait for the same pause"
    assert len(told) == 1, "only where the work goes on, not while it waited"
    never.set()


def test_a_long_pause_whose_thread_looks_is_no_hang(tmp_path: Path, marks: Marks) -> None:
    sensors = Told()
    sensors.gpu(celsius=99.0)
    with guard_of(tmp_path, sensors, []) as guard:
        until(lambda: bool(guard.health.paused))
        guard.on_event(step(1), lambda: len(marks.events) > 2)
    assert marks.events == ["moved"] * 3
