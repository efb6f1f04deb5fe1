"""What the terminal shows of ``hpo train``: a moving bar, or lines where there is no terminal.

Owns wording and layout; every number comes from an event.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.terminal import PLAIN_SECONDS, REFRESH_PER_SECOND, SMOOTHING, STOPPING, left, pace, short
from trainer.events import Event, Finished, Skipped, Step, Validated
from trainer.text import clean_text


class TrainView:
    """Follows one run.  As a context it shows the moving bar while it lasts."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name
        self.last: Step | None = None
        self.loss = 0.0
        self.seconds = 0.0
        self.skipped = 0
        self.stopping = False
        self.health: Callable[[], str] = lambda: ""  # a line about the machine
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first step of this call, and when it was done
        self._each = 0.0  # mean seconds of a step, with what was done between steps
        self._live = Live(
            console=console, refresh_per_second=REFRESH_PER_SECOND, get_renderable=self.block, transient=True
        )

    def say(self, text: str) -> None:
        """One line, above the bar; long ones are left to the terminal to wrap."""
        self.console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)

    def on_ask(self) -> None:
        """The user asked to stop.  Runs in a signal handler, perhaps in the middle of a print: no rich here."""
        self.stopping = True
        if not self.console.is_terminal:
            os.write(2, f"{STOPPING}\n".encode())

    def on_event(self, event: Event) -> None:
        if isinstance(event, Step):
            first = self.last is None
            self.loss = event.loss if first else SMOOTHING * self.loss + (1 - SMOOTHING) * event.loss
            self.seconds = (
                event.seconds if first else SMOOTHING * self.seconds + (1 - SMOOTHING) * event.seconds
            )
            self.last = event
            now = time.monotonic()
            self._first = self._first or (event.step, now)
            done, began = self._first
            self._each = max(self.seconds, (now - began) / max(1, event.step - done))
        elif isinstance(event, Skipped):
            self.skipped += 1
            self.say(f"step {event.step} is skipped: its {event.reason} is not finite")
        elif isinstance(event, Validated):
            self.say(f"epoch {event.epoch}: validation loss {event.loss:.5f}")
        elif isinstance(event, Finished):
            self.say(f"trained {event.steps} steps, {event.skipped} of them skipped")
        if not self.console.is_terminal and time.monotonic() - self._said >= PLAIN_SECONDS and self.last:
            self.say(self.line())
            self._said = time.monotonic()

    def line(self) -> str:
        """The run's progress as text."""
        return ", ".join(self.parts())

    def parts(self) -> tuple[str, ...]:
        """How far the run is, and how it goes: two lines that each fit 80 columns."""
        if self.last is None:
            return ("preparing …",)
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        speed = f", {pace(1 / self.seconds)}" if self.seconds > 0 else ""
        return (
            f"step {self.last.step}/{self.last.total_steps}, epoch {self.last.epoch}/{self.last.total_epochs}"
            f"{speed}, {left(self.seconds_left())}",
            f"loss {self.loss:.4f}, lr {short(self.last.learning_rate)}{skipped}",
        )

    def seconds_left(self) -> float:
        """To the end of the run.  Samples, validation and saved files count: they are in the mean time of a step."""
        return 0.0 if self.last is None else (self.last.total_steps - self.last.step) * self._each

    def block(self) -> RenderableType:
        """The moving block."""
        bar = Table.grid(padding=(0, 1))
        total, done = (self.last.total_steps, self.last.step) if self.last else (1, 0)
        bar.add_row(
            Text(clean_text(self.name), style="bold"), ProgressBar(total=total, completed=done, width=30)
        )
        tail = [Text(STOPPING, style="bold")] if self.stopping else []
        health = [Text(clean_text(line), style="dim")] if (line := self.health()) else []
        return Group(bar, *map(Text, self.parts()), *health, *tail)

    def __enter__(self) -> TrainView:
        if self.console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
