"""Health: the judgement about a run, from the figures of the machine and from what the run reports.

Owns the levels, the alerts and what should be done about them: ``paused`` (wait until the GPU is cooler),
``relief_due`` (give back memory), ``full`` (stop before the disk is full), ``is_hung`` (end the process).  Does none of
that itself: see ``hpo.health.guard`` for the process that works, and a supervisor for one that hangs.

The work reports from its own thread and is never held up: reports are put into a queue.  ``look`` takes the figures,
from any one other thread or process.  All times are given by the caller, in monotonic seconds.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.health.gauges import (
    CELSIUS,
    GAUGES,
    RAM_AVAILABLE,
    RAM_USED,
    VRAM,
    vram_alert,
    vram_crossing,
)
from hpo.health.levels import Alert, Crossing, Level
from hpo.health.log import HealthLog
from hpo.health.reading import Reading, Sensors
from hpo.health.steps import LossSwing, SlowSteps
from hpo.study import ANOMALY, DISK, GB, HUNG, Thresholds
from trainer.events import Event, Step

RELIEF_SECONDS = 60.0  # between two requests to give back memory
NEARLY_FULL = 0.9  # of the GPU's memory: from here on slow steps are explained by a spill (assumed)
SMALL_FILE = 0.9  # of what the rank predicts (assumed)
REPORTS = 100_000  # that are kept between two looks


@dataclass(frozen=True)
class Needs:
    """Disk space: for the files that are written next, and for all files until the end of the run."""

    next_bytes: int = 0
    rest_bytes: int = 0


class Health:
    """How a run is doing.  ``now``: when it begins.  ``needs``: asked at each look; must not block.

    ``swings``: whether a swing of the loss is worth an alert.  In a search, rates that are too high are part of it.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        sensors: Sensors,
        now: float,
        log: HealthLog | None = None,
        *,
        needs: Callable[[], Needs | None] = lambda: None,
        swings: bool = True,
    ) -> None:
        self.thresholds, self._sensors, self._log = thresholds, sensors, log
        self._needs, self._swings = needs, swings
        self.reading = Reading()
        self.place: dict[str, Any] = {}  # stage, trial
        self.progress: dict[str, Any] = {}  # phase, done, total
        self.paused = ""  # why the work should wait; empty if it should not
        self.pauses = 0  # that have begun
        self.relief_due = False
        self.full = ""  # why the work should stop
        self.is_hung = False
        self._reports: deque[Any] = deque(maxlen=REPORTS)
        self._news_at = self._busy_at = now
        self._gauges = {gauge: gauge.crossing(thresholds) for gauge in GAUGES}
        self._vram: Crossing | None = None
        self._disk = Crossing(None, None, falls=True)
        self._lost = Crossing(None, 0.5)
        self._slow, self._swing = (
            Crossing(thresholds.slow_steps, None),
            Crossing(thresholds.loss_swing, None),
        )
        self._steps, self._loss = SlowSteps(thresholds.slow_steps), LossSwing()
        self._had_gpu = False
        self._is_new_place = False
        self._paused_at: float | None = None
        self._pause_spent = False
        self._relief_at: float | None = None
        self._nothing_left = False
        self._pace: tuple[str, int, float] | None = None  # phase, done, when: where it was measured from
        self._rate: float | None = None

    # The work reports

    def begins(self, **place: Any) -> None:
        """A run or trial begins, or goes on with other settings: step times and losses are compared anew."""
        self._reports.append(("begins", place))

    def on_event(self, event: Event) -> None:
        self._reports.append(event)

    def on_image(self, done: int, total: int) -> None:
        self._reports.append(("images", done, total))

    def news(self) -> None:
        """Something else is new: a file, an encoded image."""
        self._reports.append(None)

    def out_of_memory(self, text: str) -> None:
        """The GPU's memory was too small for a step."""
        self._reports.append(Alert(VRAM, Level.DANGER, text, ANOMALY))

    def saved(self, path: Path, expected_bytes: int) -> None:
        """A file was written whose weights alone have so many bytes."""
        try:
            size = os.stat(path).st_size
        except OSError:
            size = 0
        if size < SMALL_FILE * expected_bytes:
            text = (
                f"{path.name} has {size:,} bytes, but the weights of its rank have {expected_bytes:,}: "
                "it was not saved as a whole; check the disk"
            )
            self._reports.append(Alert("file", Level.DANGER, text, ANOMALY, float(size)))
        else:
            self._reports.append(None)

    def relieved(self, text: str, freed_bytes: int) -> None:
        """Memory was given back, or there was none to give back."""
        self.relief_due = False
        self._nothing_left = freed_bytes == 0
        self.did(text)

    def did(self, text: str) -> None:
        """Write an action to health.jsonl."""
        if self._log is not None:
            self._log.action(text)

    # A look

    def look(self, now: float, **more: Any) -> list[Alert]:
        """Measure, judge and write down.  The alerts that are new.  ``more``: for the row in health.jsonl."""
        self.reading = reading = self._sensors.read()
        alerts = self._reported(now)
        for gauge, crossing in self._gauges.items():
            value = gauge.value(reading)
            if (level := crossing.see(value, now)) is not None and value is not None:
                alerts.append(gauge.alert(level, value, crossing))
        alerts += [*self._gpu_alerts(now), *self._disk_alerts(now), *self._step_alerts(now)]
        alerts += self._hung_alerts(now)
        self._pause(now)
        self._relieve(now)
        if self._log is not None:
            self._log.figures({**self.figures(), **more}, now, at_once=self._is_new_place)
            self._is_new_place = False
            for alert in alerts:
                self._log.alert(alert.figure, alert.level.word, alert.text, alert.value)
        return alerts

    def figures(self) -> dict[str, Any]:
        """The row of health.jsonl.  Figures that are not known are left out."""
        reading, gpu = self.reading, self.reading.gpu
        left = None
        if self._rate and self.progress:
            left = (self.progress["total"] - self.progress["done"]) / self._rate
        values = {
            **self.place,
            **self.progress,
            "rate": self._rate,
            "left": left,
            RAM_USED: reading.ram_used,
            RAM_AVAILABLE: reading.ram_available_bytes,
            "swap": reading.swap_bytes,
            "disk_free": reading.disk_free_bytes,
            CELSIUS: gpu.celsius if gpu else None,
            "gpu_busy": gpu.busy if gpu else None,
            VRAM: gpu.used_bytes if gpu else None,
            "vram_total": gpu.total_bytes if gpu else None,
            "no_gpu": reading.no_gpu or None,
            "paused": self.paused or None,
        }
        known = {name: value for name, value in values.items() if value is not None}
        levels = {name: level.word for name, level in self.levels().items() if level}
        return {
            name: round(value, 3) if isinstance(value, float) else value for name, value in known.items()
        } | ({"levels": levels} if levels else {})

    def levels(self) -> Mapping[str, Level]:
        """The present level of each figure that has one."""
        found = {gauge.name: crossing.level for gauge, crossing in self._gauges.items()}
        if self._vram is not None:
            found[VRAM] = self._vram.level
        return {**found, DISK: self._disk.level, "slow": self._slow.level, "swing": self._swing.level}

    def _reported(self, now: float) -> list[Alert]:
        """Take what the work has reported."""
        alerts = []
        while self._reports:
            report = self._reports.popleft()
            self._news_at = now
            if isinstance(report, Alert):
                alerts.append(report)
            elif isinstance(report, Step):
                self._steps.step(report.seconds)
                self._loss.step(report.loss)
                self._advance("training", report.step, report.total_steps, now)
            elif isinstance(report, tuple) and report[0] == "images":
                self._advance("images", report[1], report[2], now)
            elif isinstance(report, tuple):
                self.place, self.progress, self._rate, self._pace = dict(report[1]), {}, None, None
                self._is_new_place = True
                self._steps, self._loss = SlowSteps(self.thresholds.slow_steps), LossSwing()
                self._slow.begins_anew()
                self._swing.begins_anew()
        return alerts

    def _advance(self, phase: str, done: int, total: int, now: float) -> None:
        self.progress = {"phase": phase, "done": done, "total": total}
        if self._pace is None or self._pace[0] != phase or done < self._pace[1]:
            self._pace, self._rate = (phase, done, now), None
        elif now > self._pace[2] and done > self._pace[1]:
            rate = (done - self._pace[1]) / (now - self._pace[2])
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
            self._pace = phase, done, now

    def _gpu_alerts(self, now: float) -> list[Alert]:
        gpu = self.reading.gpu
        self._had_gpu = self._had_gpu or gpu is not None
        alerts = []
        if self._had_gpu and self._lost.see(float(gpu is None), now) is not None:
            text = f"the GPU no longer answers: {self.reading.no_gpu}; if the run ends, hpo doctor says what to do"
            alerts.append(Alert("gpu", Level.DANGER, text, ANOMALY))
        if gpu is not None and gpu.used_bytes is not None and gpu.total_bytes:
            self._vram = self._vram or vram_crossing(self.thresholds, gpu.total_bytes)
            if self._vram.see(float(gpu.used_bytes), now) is not None:
                alerts.append(vram_alert(gpu.used_bytes, gpu.total_bytes))
        return alerts

    def _disk_alerts(self, now: float) -> list[Alert]:
        free, needs = self.reading.disk_free_bytes, self._needs() or Needs()
        if free is None:
            return []
        reserve = self.thresholds.disk_reserve * GB
        self._disk.danger = needs.next_bytes + reserve
        self._disk.warn = max(needs.next_bytes, needs.rest_bytes) + reserve
        level = self._disk.see(float(free), now)
        if self._disk.level is not Level.DANGER:
            self.full = ""
        elif not self.full and self.thresholds.acts:
            self.full = (
                f"the disk is nearly full: {free / GB:.1f} GB are free, and the next files and the reserve need "
                f"{self._disk.danger / GB:.1f}"
            )
        if level is None:
            return []
        if level is Level.DANGER:
            text = f"disk {free / GB:.1f} GB free, the next files and the reserve need {self._disk.danger / GB:.1f}"
            text += "; the run stops before it is full" if self.thresholds.acts else ""
        else:
            text = f"disk {free / GB:.1f} GB free, the rest of the run needs {self._disk.warn / GB:.1f}"
            text += "; hpo clean frees some"
        return [Alert(DISK, level, text, DISK, float(free))]

    def _step_alerts(self, now: float) -> list[Alert]:
        alerts, times, gpu = [], self._steps.times, self.reading.gpu
        if self._slow.see(times, now) is not None and times is not None and self._steps.usual:
            why = "another program may use the processor or the GPU, or it is too hot"
            if gpu and gpu.used_bytes and gpu.total_bytes and gpu.used_bytes > NEARLY_FULL * gpu.total_bytes:
                why = (
                    "the GPU's memory is full and probably spills to RAM, as the driver does under WSL; "
                    "stop, and use a smaller batch or resolution, or gradient_checkpointing"
                )
            usual = self._steps.usual
            text = f"a step takes {times:.1f} times as long as at first ({usual:.2f} → {usual * times:.2f} s): {why}"
            alerts.append(Alert("slow", Level.WARN, text, ANOMALY, times))
        swing = self._loss.swing if self._swings else None
        if self._swing.see(swing, now) is not None and swing is not None:
            text = f"the mean loss rose by {swing:.3f} within the last 300 steps: the learning rate may be too high"
            alerts.append(Alert("swing", Level.WARN, text, ANOMALY, swing))
        return alerts

    def _hung_alerts(self, now: float) -> list[Alert]:
        gpu = self.reading.gpu
        busy = gpu.busy if gpu is not None and gpu.busy is not None else self.reading.process_busy
        if busy is not None and busy > self.thresholds.gpu_idle:
            self._busy_at = now
        if self.paused:
            self._news_at = now
        wait = 60 * self.thresholds.hang_minutes
        if busy is None:  # only the missing progress counts, so it is given twice the time
            self._busy_at, wait = self._news_at, 2 * wait
        was, self.is_hung = self.is_hung, min(now - self._news_at, now - self._busy_at) >= wait
        if not self.is_hung or was:
            return []
        what = "the GPU is idle" if gpu is not None else "the process is idle"
        text = f"{what} and nothing is new for {(now - self._news_at) / 60:.0f} minutes: the run hangs"
        return [Alert(HUNG, Level.DANGER, text, HUNG)]

    # What should be done

    def _pause(self, now: float) -> None:
        limits, celsius = self.thresholds, self.reading.gpu.celsius if self.reading.gpu else None
        cool = celsius is None or celsius < limits.gpu_temperature[0]
        if cool:
            self._pause_spent = False
        if self._paused_at is None:
            hot = celsius is not None and celsius > limits.gpu_temperature[1]
            if hot and limits.acts and limits.pause_minutes and not self._pause_spent:
                self._paused_at, self.pauses = now, self.pauses + 1
                self.paused = f"GPU {celsius:.0f} °C, goes on below {limits.gpu_temperature[0]:g} °C"
                self.did(f"paused: {self.paused}, at the latest after {limits.pause_minutes:g} minutes")
            return
        seconds = now - self._paused_at
        if cool or seconds >= 60 * limits.pause_minutes:
            self._paused_at, self.paused, self._pause_spent = None, "", not cool
            state = f"at {celsius:.0f} °C" if celsius is not None else "without a temperature"
            self.did(f"goes on after a pause of {seconds:.0f} s, {state}")

    def _relieve(self, now: float) -> None:
        pressed = any(
            crossing.level is Level.DANGER
            for gauge, crossing in self._gauges.items()
            if gauge.name in (RAM_USED, RAM_AVAILABLE)
        )
        if not pressed:
            self._nothing_left = False
            return
        due = self._relief_at is None or now - self._relief_at >= RELIEF_SECONDS
        if due and self.thresholds.acts and not self._nothing_left:
            self.relief_due, self._relief_at = True, now
