"""Health: one alert for each crossing, none for what flutters, and what should be done about danger.

Time is a number that the test moves, so eight hours take a moment.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from hpo.health.health import Health, Needs
from hpo.health.levels import Alert, Crossing, Level
from hpo.health.log import HealthLog, health_rows
from hpo.health.reading import Gpu, Reading
from hpo.health.steps import LossSwing, SlowSteps
from hpo.study.thresholds import Thresholds
from tests.healthfigures import SAFE, Told
from trainer.events import Step

MINUTE = 60.0


def step(number: int, loss: float = 0.1, seconds: float = 1.0, total: int = 100_000) -> Step:
    return Step(number, total, 1, 1, loss, 1e-4, 0.0, 1.0, seconds)


class Night:
    """A run of tiny steps, one a second, that is looked at every five seconds of a clock that the test drives."""

    def __init__(self, folder: Path, needs: Needs | None = None) -> None:
        self.now, self.done = 0.0, 0
        self.sensors, self.needs = Told(), needs
        self.loss = random.Random(1)
        self.level, self.seconds = 0.1, 1.0
        self.alerts: list[tuple[float, Alert]] = []
        self.works = True
        self.health = Health(Thresholds(), self.sensors, 0.0, HealthLog(folder), needs=lambda: self.needs)
        self.health.begins(stage="train")

    def lasts(self, minutes: float) -> None:
        until = self.now + minutes * MINUTE
        while self.now < until:
            self.now += 1.0
            if self.works and not self.health.paused:
                self.done += 1
                self.health.on_event(step(self.done, self.level + self.loss.gauss(0, 0.03), self.seconds))
            if self.now % 5 == 0:
                self.alerts += [(self.now, alert) for alert in self.health.look(self.now)]
                if self.health.relief_due:
                    self.health.relieved("half of the cached images", 1)

    def told(self) -> Counter[tuple[str, str]]:
        return Counter((alert.figure, alert.level.word) for _, alert in self.alerts)


def test_eight_hours_in_which_every_threshold_is_crossed_once_give_one_alert_each(tmp_path: Path) -> None:
    night = Night(tmp_path, Needs(next_bytes=10**9, rest_bytes=5 * 10**9))
    night.lasts(20)
    for change, back in (
        ({"ram_used": 75.0}, {"ram_used": 40.0}),
        ({"ram_available_bytes": 6 * 10**9}, {"ram_available_bytes": 20 * 10**9}),
        ({"swap_bytes": 10**9}, {"swap_bytes": 0}),
    ):
        night.sensors.machine(**change)
        night.lasts(10)
        night.sensors.machine(**back)
        night.lasts(10)
    night.sensors.machine(ram_used=90.0, ram_available_bytes=3 * 10**9, swap_bytes=3 * 10**9)
    night.lasts(10)
    night.sensors.machine(ram_used=40.0, ram_available_bytes=20 * 10**9, swap_bytes=0)
    night.lasts(15)
    night.sensors.gpu(celsius=80.0)
    night.lasts(10)
    night.sensors.gpu(celsius=88.0)
    night.lasts(3)
    night.sensors.gpu(celsius=62.0, used_bytes=16.8e9)
    night.lasts(10)
    night.sensors.gpu(used_bytes=11e9)
    night.health.out_of_memory("out of memory in step 7")
    night.lasts(10)
    night.seconds = 8.0  # spilled
    night.lasts(10)
    night.seconds = 1.0
    night.lasts(30)
    night.level = 0.25  # the mean loss rises
    night.lasts(20)
    night.level = 0.1
    night.lasts(30)
    small = tmp_path / "zkw-000002.safetensors"
    small.write_bytes(b"x" * 1000)
    night.health.saved(small, 75_000_000)
    night.sensors.machine(disk_free_bytes=4 * 10**9)
    night.lasts(10)
    night.sensors.machine(disk_free_bytes=10**9)
    night.lasts(10)
    night.sensors.machine(disk_free_bytes=500 * 10**9)
    night.lasts(20)
    night.works = False
    night.sensors.gpu(busy=3.0)
    night.lasts(40)
    night.works = True
    night.sensors.gpu(busy=97.0)
    night.lasts(8 * 60 - night.now / MINUTE)
    assert night.now == 8 * 3600
    both = [
        (figure, level)
        for figure in ("ram_used", "ram_available", "swap_used", "gpu_temperature", "vram_used", "disk")
        for level in ("warn", "danger")
    ]
    assert night.told() == Counter(
        [*both, ("slow", "warn"), ("swing", "warn"), ("file", "danger"), ("hung", "danger")]
    )
    rows = health_rows(tmp_path)
    alerts = [row for row in rows if row["event"] == "alert"]
    assert len(alerts) == len(night.alerts) and all("\n" not in row["text"] for row in alerts)


def test_a_figure_that_flutters_around_a_threshold_is_told_once() -> None:
    crossing, noise = Crossing(75.0, 85.0), random.Random(3)
    told = [crossing.see(75 + noise.uniform(-6, 6), now) for now in range(0, 3000, 5)]
    assert [level for level in told if level is not None] == [Level.WARN]
    steady = Crossing(75.0, 85.0)
    small = [steady.see(75 + (1 if now % 10 else -1), now) for now in range(0, 100_000, 5)]
    assert [level for level in small if level is not None] == [Level.WARN]


def test_a_second_crossing_after_a_calm_hour_is_told_again() -> None:
    """Up and down for five minutes each: told at once, and again an hour later, not ten times."""
    swinging = Crossing(70.0, 85.0)
    rises = [swinging.see(90.0 if now // 300 % 2 == 0 else 40.0, now) for now in range(0, 7100, 5)]
    assert [level for level in rises if level is not None] == [Level.DANGER, Level.DANGER]
    crossing = Crossing(70.0, 85.0)
    values = [*(90.0,) * 5, *(40.0,) * 800, *(90.0,) * 5]
    told = [crossing.see(value, 5.0 * number) for number, value in enumerate(values)]
    assert [level for level in told if level is not None] == [Level.DANGER, Level.DANGER]


def test_a_level_falls_only_when_it_is_clearly_better_for_a_while() -> None:
    crossing = Crossing(8.0, 4.0, falls=True)
    assert crossing.see(3.9, 0.0) is Level.DANGER
    for now in range(5, 300, 5):
        crossing.see(4.1, now)
    assert crossing.level is Level.DANGER
    for now in range(300, 400, 5):
        crossing.see(4.3, now)
    assert crossing.level is Level.WARN
    for now in (400.0, 405.0, 455.0):
        crossing.see(20.0, now)
        assert crossing.level is Level.WARN
    crossing.see(20.0, 461.0)
    assert crossing.level is Level.SAFE


def test_a_pause_ends_when_the_gpu_is_cool_or_after_its_limit(tmp_path: Path) -> None:
    night = Night(tmp_path)
    night.lasts(1)
    night.sensors.gpu(celsius=90.0)
    night.lasts(2)
    assert "90 °C" in night.health.paused and "75 °C" in night.health.paused
    done = night.done
    night.sensors.gpu(celsius=80.0)
    night.lasts(2)
    assert night.health.paused and night.done == done, "80 °C is not safe yet"
    night.sensors.gpu(celsius=74.0)
    night.lasts(1)
    assert not night.health.paused and night.done > done
    night.sensors.gpu(celsius=95.0)
    night.lasts(9)
    assert night.health.paused
    night.lasts(2)
    assert not night.health.paused, "the limit is ten minutes"
    night.lasts(60)
    assert not night.health.paused, "a GPU that pauses do not cool is not paused for again"
    assert not night.health.is_hung, "a pause is no hang"
    actions = [row["text"] for row in health_rows(tmp_path) if row["event"] == "action"]
    assert [text.split()[0] for text in actions] == ["paused:", "goes", "paused:", "goes"]


def test_memory_is_asked_for_once_a_minute_until_there_is_none_left() -> None:
    sensors = Told()
    health = Health(Thresholds(), sensors, 0.0)
    sensors.machine(ram_used=95.0)
    asked = []
    for now in range(0, 300, 5):
        health.look(now)
        if health.relief_due:
            asked.append(now)
            health.relieved("half", 0 if len(asked) == 3 else 10)
    assert asked == [0, 60, 120]


def test_with_acts_off_nothing_is_done() -> None:
    sensors = Told()
    health = Health(Thresholds(acts=False), sensors, 0.0, needs=lambda: Needs(10**12, 10**12))
    sensors.machine(ram_used=95.0)
    sensors.gpu(celsius=99.0)
    assert {alert.figure for alert in health.look(5.0)} == {"ram_used", "gpu_temperature", "disk"}
    assert not (health.paused or health.relief_due or health.full)


def test_a_hang_needs_an_idle_gpu_and_half_an_hour_without_anything_new() -> None:
    def hung_at(busy: float | None, process: float | None, news_every: float | None) -> float | None:
        gpu = None if busy is None else Gpu(busy=busy)
        health = Health(Thresholds(), Told(Reading(gpu=gpu, process_busy=process)), 0.0)
        for now in range(0, 7300, 5):
            if news_every and now % news_every == 0:
                health.news()
            alerts = health.look(now)
            if alerts:
                assert health.is_hung and [alert.event for alert in alerts] == ["hung"]
                return now / MINUTE
        return None

    assert hung_at(3.0, 100.0, None) == 30
    assert hung_at(60.0, 0.0, None) is None
    assert hung_at(3.0, 0.0, 1700) is None
    assert hung_at(None, 0.5, None) == 30, "without a GPU the process counts"
    assert hung_at(None, 90.0, None) is None
    assert hung_at(None, None, None) == 60, "with nothing known, twice the time"


def test_a_lost_gpu_is_told_and_a_missing_one_is_not() -> None:
    sensors = Told()
    health = Health(Thresholds(), sensors, 0.0)
    assert not health.look(5.0)
    sensors.reading = Reading(no_gpu="GPU is lost")
    (alert,) = health.look(10.0)
    assert "GPU is lost" in alert.text and alert.level is Level.DANGER
    never = Health(Thresholds(), Told(Reading(no_gpu="NVML Shared Library Not Found")), 0.0)
    assert not never.look(5.0) and never.figures()["no_gpu"]


def test_the_marks_of_one_trial_are_gone_in_the_next_and_are_not_told_again_within_an_hour(
    tmp_path: Path,
) -> None:
    night = Night(tmp_path)
    for trial in (1, 2):
        night.health.begins(trial=trial)
        night.level, night.seconds = 0.1, 1.0
        night.lasts(0.5)
        assert not night.health.levels()["slow"] and not night.health.levels()["swing"]
        night.lasts(10)
        night.level, night.seconds = 0.4, 8.0
        night.lasts(5)
        assert night.health.levels()["slow"] and night.health.levels()["swing"]
    assert night.told() == Counter([("slow", "warn"), ("swing", "warn")])


# Step times


def slow_after(seconds: list[float]) -> float | None:
    watch = SlowSteps(3.0)
    worst = None
    for one in seconds:
        watch.step(one)
        if watch.times is not None and watch.times > 3.0:
            worst = watch.times
    return worst


def test_a_spill_is_seen_and_usual_variation_is_not() -> None:
    noise = random.Random(5)
    usual = [9.0, 4.0, *(noise.uniform(0.9, 1.1) for _ in range(300))]
    assert slow_after(usual) is None
    assert slow_after([*usual, *(noise.uniform(6, 9) for _ in range(40))]) == pytest.approx(7.5, abs=1)
    buckets = [noise.choice((0.6, 1.0, 1.7)) for _ in range(2000)]
    assert slow_after([*(0.6,) * 100, *buckets, *(1.7,) * 100]) is None, "another bucket"
    saves = [20.0 if number % 10 < 3 else 1.0 for number in range(2000)]
    assert slow_after(saves) is None, "steps beside a checkpoint or sample images"
    cold = [30.0, 12.0, 8.0, 5.0, 4.0, *(1.0,) * 500]
    assert slow_after(cold) is None, "the first steps compile"


def swing_of(losses: list[float]) -> float:
    watch, most = LossSwing(), 0.0
    for loss in losses:
        watch.step(loss)
        most = max(most, watch.swing or 0.0)
    return most


def test_a_swing_is_a_rise_of_the_mean_and_not_noise_or_learning() -> None:
    noise = random.Random(9)
    for seed in range(20):
        noise = random.Random(seed)
        flat = [abs(noise.gauss(0.12, 0.08)) for _ in range(3000)]
        assert swing_of(flat) <= 0.05, "noise as of batch size 1"
    learns = [0.5 * 0.998**number + noise.gauss(0, 0.02) for number in range(2000)]
    assert swing_of(learns) <= 0.05
    swings = [0.1 + (0.1 if number // 150 % 2 else 0.0) + noise.gauss(0, 0.03) for number in range(1200)]
    assert swing_of(swings) == pytest.approx(0.1, abs=0.02)
    assert swing_of([float("nan")] * 500) == 0.0


# Files


def test_a_file_smaller_than_its_rank_predicts_is_told_and_a_whole_one_is_not(tmp_path: Path) -> None:
    health = Health(Thresholds(), Told(), 0.0)
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(b"x" * 1100)
    health.saved(whole, 1000)
    health.saved(tmp_path / "missing.safetensors", 1000)
    (alert,) = health.look(5.0)
    assert "missing.safetensors has 0 bytes" in alert.text and alert.event == "anomaly"


def test_the_disk_warns_for_the_rest_and_stops_for_the_next_file() -> None:
    sensors = Told()
    health = Health(Thresholds(), sensors, 0.0, needs=lambda: Needs(2 * 10**9, 40 * 10**9))
    sensors.machine(disk_free_bytes=30 * 10**9)
    (alert,) = health.look(5.0)
    assert alert.level is Level.WARN and "30.0 GB free, the rest of the run needs 40.2" in alert.text
    assert "hpo clean" in alert.text and not health.full
    sensors.machine(disk_free_bytes=2 * 10**9)
    (alert,) = health.look(10.0)
    assert alert.level is Level.DANGER and "2.0 GB" in health.full
    sensors.machine(disk_free_bytes=90 * 10**9)
    health.look(15.0)
    health.look(80.0)
    assert not health.full


# health.jsonl


def test_figures_are_written_every_ten_seconds_and_the_file_stays_small(tmp_path: Path) -> None:
    health = Health(Thresholds(), Told(), 0.0, HealthLog(tmp_path))
    health.begins(stage="search", trial=3)
    for number in range(20_000):
        if number % 10 == 0:
            health.on_event(step(number + 1))
        health.look(number * 5.0)
    rows = health_rows(tmp_path)
    assert rows[-1]["trial"] == 3 and rows[-1]["rate"] == pytest.approx(0.2, rel=0.01)
    size = sum(path.stat().st_size for path in tmp_path.glob("health*.jsonl"))
    assert 1_000_000 < size < 2_010_000, "more than four megabytes were written"
    times = [row["time_utc"] for row in rows]
    assert times == sorted(times) and 2000 < len(rows) < 10_000


def test_a_torn_line_and_foreign_bytes_are_left_out(tmp_path: Path) -> None:
    log = HealthLog(tmp_path)
    log.action("one")
    with log.path.open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"event": "figures", "ram_us')
    assert [row["text"] for row in health_rows(tmp_path)] == ["one"]
    log.action("two")  # after the torn line, on a line of its own
    assert [row["text"] for row in health_rows(tmp_path) if "text" in row] == ["one", "two"]
    assert health_rows(tmp_path / "missing") == []


def test_a_folder_that_cannot_be_written_does_not_end_the_look(tmp_path: Path) -> None:
    health = Health(Thresholds(), Told(), 0.0, HealthLog(tmp_path / "gone"))
    assert health.look(5.0) == []
    json.dumps(health.figures())
    assert SAFE.gpu is not None and health.figures()["gpu_temperature"] == SAFE.gpu.celsius


def test_lines_of_several_writers_stay_whole_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes a line between this one's failed write and what it does about it."""
    one, other, real = HealthLog(tmp_path), HealthLog(tmp_path), os.write
    one.action("first")

    def full(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", real)
        written = real(descriptor, data[:5])
        other.action("of another")
        monkeypatch.setattr(os, "write", fails)
        return written

    def fails(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    one.action("lost")
    monkeypatch.setattr(os, "write", real)
    one.action("last")
    assert [row["text"] for row in health_rows(tmp_path)] == ["first", "of another", "last"]
