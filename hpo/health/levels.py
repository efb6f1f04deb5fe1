"""Levels: how bad a figure is, and when that is worth an alert.

A figure rises to a level as soon as it crosses the threshold.  It falls back only when it was clearly better than the
threshold for a while, and within an hour the same level of the same figure gives no second alert: a figure that
flutters around a threshold is told once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

CLEARLY = 0.05  # of the threshold (assumed)
CALM_SECONDS = 60.0  # assumed
AGAIN_SECONDS = 3600.0  # assumed


class Level(IntEnum):
    SAFE, WARN, DANGER = 0, 1, 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Alert:
    """One crossing.  ``figure``: its name in health.jsonl.  ``event``: how it is sent (``hpo.study.notify``); empty: it
    is only shown.  ``text``: what happened, where, and what to do."""

    figure: str
    level: Level
    text: str
    event: str = ""
    value: float | None = None


@dataclass
class Crossing:
    """The level of one figure over time.  ``warn`` and ``danger`` are in the unit of the figure; None: there is no such
    level.  ``falls``: a low value is bad."""

    warn: float | None
    danger: float | None
    falls: bool = False
    level: Level = Level.SAFE
    _calm_since: float | None = None
    _told: dict[Level, float] = field(default_factory=dict)

    def see(self, value: float | None, now: float) -> Level | None:
        """The level to alert about; None if there is nothing new.  Times in seconds."""
        if value is None:
            return None
        reached = self._reached(value, 0.0)
        if reached > self.level:
            self.level, self._calm_since = reached, None
            return self._news(reached, now)
        kept = self._reached(value, CLEARLY)
        if kept >= self.level:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= CALM_SECONDS:
            self.level, self._calm_since = kept, None
        return None

    def begins_anew(self) -> None:
        """What is measured is another one now: the level does not hold for it.  What was told lately stays told."""
        self.level, self._calm_since = Level.SAFE, None

    def _reached(self, value: float, margin: float) -> Level:
        """``margin``: how much better than the threshold it must be, as a part of it, to be below it."""
        for level, threshold in ((Level.DANGER, self.danger), (Level.WARN, self.warn)):
            if threshold is None:
                continue
            edge = threshold * (1 + margin) if self.falls else threshold * (1 - margin)
            if (value < edge) if self.falls else (value > edge):
                return level
        return Level.SAFE

    def _news(self, level: Level, now: float) -> Level | None:
        last = self._told.get(level)
        if last is not None and now - last < AGAIN_SECONDS:
            return None
        for lower in Level:
            if lower <= level:
                self._told[lower] = now
        return level
