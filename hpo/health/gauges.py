"""The figures that have thresholds of their own: how each is read, which levels it has, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpo.health.levels import Alert, Crossing, Level
from hpo.health.reading import Reading
from hpo.study import ANOMALY, GB, Thresholds

RAM_USED, RAM_AVAILABLE, SWAP, CELSIUS, VRAM = (
    "ram_used",
    "ram_available",
    "swap_used",
    "gpu_temperature",
    "vram_used",
)


@dataclass(frozen=True)
class Gauge:
    """One figure.  ``name``: of its threshold and in health.jsonl.  ``value``: in the unit of the threshold."""

    name: str
    value: Callable[[Reading], float | None]
    shown: Callable[[float], str]
    falls: bool = False
    advice: str = ""

    def crossing(self, thresholds: Thresholds) -> Crossing:
        warn, danger = getattr(thresholds, self.name)
        return Crossing(warn, danger, self.falls)

    def alert(self, level: Level, value: float, crossing: Crossing) -> Alert:
        edge = crossing.danger if level is Level.DANGER else crossing.warn
        assert edge is not None
        kind = "danger" if level is Level.DANGER else "warning"
        text = f"{self.shown(value)} ({kind} {'below' if self.falls else 'above'} {self.shown_edge(edge)})"
        event = ANOMALY if level is Level.DANGER else ""
        return Alert(self.name, level, text + self.advice, event, value)

    def shown_edge(self, edge: float) -> str:
        return {RAM_USED: f"{edge:g} %", CELSIUS: f"{edge:g} °C"}.get(self.name, f"{edge:g} GB")


def _gb(size: int | None) -> float | None:
    return None if size is None else size / GB


GAUGES = (
    Gauge(
        RAM_USED,
        lambda reading: reading.ram_used,
        lambda value: f"RAM {value:.0f} % used",
        advice="; close other programs",
    ),
    Gauge(
        RAM_AVAILABLE,
        lambda reading: _gb(reading.ram_available_bytes),
        lambda value: f"RAM {value:.1f} GB left",
        falls=True,
        advice="; close other programs",
    ),
    Gauge(
        SWAP,
        lambda reading: _gb(reading.swap_bytes),
        lambda value: f"swap {value:.1f} GB used",
        advice="; RAM was too small for all programs, which makes everything slow",
    ),
    Gauge(
        CELSIUS,
        lambda reading: reading.gpu.celsius if reading.gpu else None,
        lambda value: f"GPU {value:.0f} °C",
        advice="; look at its fans and the air around it",
    ),
)


def vram_crossing(thresholds: Thresholds, total_bytes: int) -> Crossing:
    """Of a card of this size, in bytes.  Danger is an allocation that fails, which the training tells."""
    return Crossing(float(thresholds.vram_limit_bytes(total_bytes)), None)


def vram_alert(used: int, total: int) -> Alert:
    text = (
        f"GPU memory {used / GB:.1f} of {total / GB:.1f} GB used, with other programs; "
        "the next allocation may fail, or spill to RAM under WSL"
    )
    return Alert(VRAM, Level.WARN, text, "", 100 * used / total)
