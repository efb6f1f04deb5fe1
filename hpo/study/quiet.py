"""Quiet hours: a part of the day, by the clock of this machine, in which messages wait."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta

from trainer.errors import ConfigError
from trainer.text import clean_text

_FORM = re.compile(r"\s*(\d{1,2})(?::(\d{2}))?\s*-\s*(\d{1,2})(?::(\d{2}))?\s*")


@dataclass(frozen=True)
class QuietHours:
    """From ``begins`` to ``ends``, over midnight if that is earlier."""

    begins: time
    ends: time

    def seconds_left(self, now: datetime) -> float:
        """From ``now`` (local time, with its zone) to the end; 0 outside.  Right where summer time begins or ends."""
        clock, over_midnight = now.time(), self.ends <= self.begins
        inside = (
            clock >= self.begins or clock < self.ends if over_midnight else self.begins <= clock < self.ends
        )
        if not inside:
            return 0.0
        day = now.date() + timedelta(days=1) if over_midnight and clock >= self.begins else now.date()
        return max(0.0, datetime.combine(day, self.ends).astimezone().timestamp() - now.timestamp())


def read_quiet_hours(text: str) -> QuietHours | None:
    """``23:00-07:00`` or ``23-7``; None for an empty text.  Raises ConfigError."""
    if not text.strip():
        return None
    found = _FORM.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        begins, ends = time(int(found[1]), int(found[2] or 0)), time(int(found[3]), int(found[4] or 0))
        if begins == ends:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"quiet hours {clean_text(text)[:40]!r} are not two times of a day",
            "write for example 23:00-07:00",
        ) from None
    return QuietHours(begins, ends)
