"""Thresholds: from which figures on a long run is in trouble – the defaults, in this one place.

Owns their keys, defaults and limits, and the section ``[health]`` of a study file or a train file.  Does not own how
they are watched (``hpo.health``).  Sizes are decimal: 1 GB is 10⁹ bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.checks import read, setting
from trainer.errors import ConfigError

SECTION = "health"
GB = 1e9
# Cards sold as 16 GB report 16.7 to 17.2 · 10⁹ bytes, or a little less.  They count as full at 15.5 of 16 GB.
SIXTEEN_GB = range(15 * 10**9, 175 * 10**8)
WARN_OF_16_GB = 15.5 / 16


@dataclass(frozen=True)
class Thresholds:
    """[health].  A pair is (warn, danger).  The first five lines are the users' table of a long run."""

    ram_used: tuple[float, ...] = setting((70.0, 85.0), "RAM in use", unit="%", low=1, high=100)
    ram_available: tuple[float, ...] = setting((8.0, 4.0), "RAM that is left", unit="GB", low=0)
    vram_used: float = setting(98.0, "GPU memory in use", unit="%", low=1, high=100)
    swap_used: tuple[float, ...] = setting((0.5, 2.0), "swap in use", unit="GB", low=0)
    gpu_temperature: tuple[float, ...] = setting((75.0, 85.0), "of the GPU", unit="°C", low=1, high=150)
    gpu_idle: float = setting(5.0, "up to this use, the GPU is idle", unit="%", low=0, high=100)
    hang_minutes: float = setting(30.0, "idle and nothing new for so long: it hangs", unit="minutes", low=0.1)
    loss_swing: float = setting(0.05, "rise of the mean loss", low=0, low_is_excluded=True)
    slow_steps: float = setting(3.0, "a step takes so many times as long as at first", low=1.5)
    pause_minutes: float = setting(
        10.0, "the longest pause at gpu_temperature; 0: none", unit="minutes", low=0
    )
    disk_reserve: float = setting(0.2, "disk space that always stays free", unit="GB", low=0)
    acts: bool = setting(True, "pause, give back memory, stop before the disk is full")

    def vram_limit_bytes(self, total: int) -> int:
        """From so many bytes on, a card counts as full: the next allocation may fail."""
        share = self.vram_used / 100
        if total in SIXTEEN_GB and self.vram_used == type(self).vram_used:
            share = WARN_OF_16_GB
        return int(total * share)


def read_thresholds(body: Any) -> Thresholds:
    """The values of a section ``[health]``.  Raises ConfigError."""
    values = read(Thresholds, body, SECTION)
    for name, falls in (
        ("ram_used", False),
        ("ram_available", True),
        ("swap_used", False),
        ("gpu_temperature", False),
    ):
        pair = getattr(values, name)
        if len(pair) != 2 or ((pair[0] < pair[1]) == falls and pair[0] != pair[1]):
            usual = getattr(Thresholds, name)
            order = "the first one is higher" if falls else "the first one is lower"
            raise ConfigError(
                f"[{SECTION}] {name} = {list(pair)} is not a pair of warning and danger",
                f"write two numbers, {order}, for example {name} = {[int(n) if n == int(n) else n for n in usual]}",
            )
    return values
