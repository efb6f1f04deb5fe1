"""Readable values, times and lines of text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from trainer.text import clean_text

if TYPE_CHECKING:
    pass


def short(value: Any) -> str:
    """A setting in readable form, as in a TOML file: floats with three significant digits, true and false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return (
            f"{value:.3g}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}".replace("e-0", "e-")
        )
    return clean_text(str(value))


def pace(steps_per_second: float) -> str:
    """2.5 steps/s, or 4.0 s/step below one step a second."""
    if steps_per_second >= 1:
        return f"{steps_per_second:.1f} steps/s"
    return f"{1 / steps_per_second:.1f} s/step" if steps_per_second > 0 else "0 steps/s"


def clock(seconds: float) -> str:
    """1:05 for 65 s, 2:00:09 for two hours and nine seconds."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def left(seconds: float) -> str:
    """How long something still takes.  Never 0:00, because something is still being done."""
    if seconds < 10:
        return "a few seconds left"
    if seconds < 60:
        return "less than a minute left"
    return f"about {clock(seconds)} left"


def figures(what: tuple[int, float, float] | None) -> str:
    return f"{what[1]:.4f} ± {what[2]:.4f}" if what else "none yet"


def say(console: Console, text: str) -> None:
    """Print one line.  Long lines are wrapped by the terminal."""
    console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)
