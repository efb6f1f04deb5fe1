"""Terminal output of a search: the live view, the plain-text lines and the last lines.

Owns wording and layout.  Every number comes from the study or an event; only rates and times are computed
here. All external text goes through ``clean_text`` and is printed without markup.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.terminal.text import figures, left, pace, short
from trainer.events import Event, Skipped, Step
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import Result, Standing, StudyKind

PLAIN_SECONDS = 10.0  # between progress lines if the output is not a terminal
REFRESH_PER_SECOND = 4
STOPPING = "stopping after this step; press Ctrl-C again to stop at once"
TRAINING, GENERATING = "training", "generating images"
OVERDUE = 0.2  # of the time without progress, at least so much is left (assumed)
SMOOTHING = 0.9  # of the displayed loss and rate


@dataclass
class Current:
    """The running trial, as shown in the view."""

    number: int
    settings: Mapping[str, Any]
    standing: Standing
    phase: str = TRAINING
    done: int = 0
    total: int = 0
    loss: float | None = None
    rate: float | None = None
    skipped: int = 0
    _first: tuple[int, float] | None = None  # the first progress of this phase, and when
    _slowdown: float = 1.0
    _last: float = field(default_factory=time.monotonic)  # when there was progress

    def on_event(self, event: Event) -> None:
        if isinstance(event, Step):
            self._progress(TRAINING, event.step, event.total_steps)
            rate = 1.0 / event.seconds if event.seconds > 0 else None
            self.loss = (
                event.loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * event.loss
            )
            if rate is not None:
                self.rate = rate if self.rate is None else SMOOTHING * self.rate + (1 - SMOOTHING) * rate
        elif isinstance(event, Skipped):
            self.skipped += 1

    def on_image(self, done: int, total: int) -> None:
        self._progress(GENERATING, done, total)

    def _progress(self, phase: str, done: int, total: int) -> None:
        if self.standing.forecast and self.phase == TRAINING != phase:
            self._slowdown = self.standing.forecast.slowdown(self.total, self._each())
        self._last = time.monotonic()
        if self._first is None or phase != self.phase:
            self._first = done, self._last
        self.phase, self.done, self.total = phase, done, total

    def seconds_left(self) -> float | None:
        """For the whole study: the rest of this trial by its own pace, and the trials after it.  None if unknown."""
        forecast = self.standing.forecast
        if forecast is None:
            return None
        if self.phase == TRAINING:
            seconds = forecast.while_training(self.done, self.total, self._each())
        else:
            seconds = forecast.while_generating(self.done, self.total, self._each(), self._slowdown)
        waited = time.monotonic() - self._last
        return max(seconds - waited, forecast.after_seconds + OVERDUE * waited)

    def _each(self) -> float | None:
        """Measured seconds per step or image of this phase.  None after its first progress."""
        if self._first is None or self.done <= self._first[0]:
            return None
        return (self._last - self._first[1]) / (self.done - self._first[0])

    def progress_text(self) -> str:
        if self.phase != TRAINING:
            return f"{self.done}/{self.total} images"
        if not self.total:  # the trial loads, or goes on with images of a trial that is trained
            return "preparing …"
        rate = "" if self.rate is None else f", {pace(self.rate)}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"step {self.done}/{self.total}{rate}{loss}" + (
            f", {self.skipped} skipped" if self.skipped else ""
        )


class PlainView:
    """Plain-text lines, for logs and pipes."""

    def __init__(self, console: Console, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.console = console
        self.current: Current | None = None
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.baseline = "the usual settings"  # what the study's baseline is
        self.health: Callable[[], str] = lambda: ""  # a line about the machine
        self.ranks = True  # whether the trials compete; those of a confirmation are repeats
        self._settings = settings
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print one line.  Long lines are wrapped by the terminal, so that they can be searched and copied."""
        self.console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows at a terminal that something goes on, and for how long, until the block ends.  Lines can be said
        meanwhile."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as shown:
            shown.add_task(clean_text(what), total=None)
            yield

    def should_stop(self) -> bool:
        return self.asked_to_stop()

    def on_ask(self) -> None:
        """The user asked to stop.  Runs in a signal handler, possibly during a print, so it must not use rich."""
        os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())

    def on_trial(self, number: int, suggested: Mapping[str, Any], adopted: bool, standing: Standing) -> None:
        self.current = Current(number, self._settings(suggested), standing)
        place = f"trial {number} ({standing.complete + 1}/{standing.total})"
        words = ", ".join(f"{name} {short(value)}" for name, value in self.current.settings.items())
        self.announce(f"{place}{', resumed' if adopted else ''}: {words}")
        self._last_line = time.monotonic()

    def announce(self, text: str) -> None:
        self.say(text)

    def phase(self, name: str) -> None:
        """What the session has reached (``hpo.terminal.workers``).  Only a worker reports it."""

    def on_event(self, event: Event) -> None:
        assert self.current is not None
        self.current.on_event(event)
        self.refresh()

    def on_image(self, done: int, total: int) -> None:
        assert self.current is not None
        self.current.on_image(done, total)
        self.refresh()

    def refresh(self) -> None:
        if self.current and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            seconds = self.current.seconds_left()
            text = f"  {self.current.progress_text()}"
            self.say(text + (f", study: {left(seconds)}" if seconds is not None else ""))
            self._last_line = time.monotonic()

    def on_result(self, result: Result, standing: Standing) -> None:
        current, self.current = self.current, None
        if result.message:
            self.say(f"trial {result.number} is {result.state}: {result.message}")
        line = trial_line(result, standing if self.ranks else replace(standing, best=None))
        if not self.ranks and current:  # a repeat: of which trial, with which seed
            words = {name: str(value).replace(" ", "_") for name, value in current.settings.items()}
            line += "".join(f" {name.replace(' ', '_')}={clean_text(value)}" for name, value in words.items())
        self.say(line)

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None: ...


class LiveView(PlainView):
    """A block at the bottom of the terminal that shows the running trial; finished trials scroll above it."""

    def __init__(
        self, console: Console, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]], name: str
    ) -> None:
        super().__init__(console, settings)
        self.name = name
        self.stopping = False
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            get_renderable=lambda: live_block(
                self.name,
                self.current,
                stopping=self.stopping,
                width=console.width,
                baseline=self.baseline if self.ranks else "",
                health=self.health(),
            ),
            transient=True,
        )

    def announce(self, text: str) -> None:
        """Nothing to do: the block shows the trial."""

    def refresh(self) -> None:
        """Nothing to do: rich's Live redraws by itself."""

    def on_ask(self) -> None:
        self.stopping = True

    def __enter__(self) -> LiveView:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def make_view(
    console: Console, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]], name: str
) -> PlainView:
    return LiveView(console, settings, name) if console.is_terminal else PlainView(console, settings)


def live_block(
    name: str,
    current: Current | None,
    *,
    stopping: bool = False,
    width: int = 80,
    baseline: str = "the usual settings",
    health: str = "",
) -> RenderableType:
    """The live block: trial, settings, progress, best so far, time left.  Fits 80 columns without truncation.

    ``baseline``: what the study's baseline is; empty if the trials do not compete, as in a confirmation.  ``health``: a
    line about the machine.
    """
    if current is None:
        return Text(f"{name}: choosing the next trial …", style="dim")
    standing = current.standing
    head = Text.assemble(
        (clean_text(name), "bold"),
        f"  trial {current.number}  ({min(standing.complete + 1, standing.total)}/{standing.total})  ",
        (current.phase, "cyan"),
    )
    cells = [(clean_text(key), short(value)) for key, value in current.settings.items()]
    columns = max(n for n in (1, 2, 3) if n == 1 or _needed(cells, n) <= width)
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(no_wrap=True)
    for row in range(0, len(cells), columns):
        grid.add_row(*(Text(text) for cell in cells[row : row + columns] for text in cell))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(1, current.total), completed=current.done, width=26), current.progress_text()
    )
    seconds = current.seconds_left()
    best = (
        f"best so far: trial {standing.best[0]}, {figures(standing.best)}"
        if standing.best
        else "best so far: –"
    )
    usual = (
        f"(trial {standing.baseline[0]}, {baseline}: {standing.baseline[1]:.4f})" if standing.baseline else ""
    )
    if usual:
        best += f"   {usual}" if len(best) + 3 + len(usual) <= width else f"\n  {usual}"
    tail = left(seconds) if seconds is not None else "time left: known after the first trial"
    troubles = [
        f"{n} {what}"
        for n, what in (
            (standing.infeasible, "infeasible"),
            (standing.pruned, "stopped early"),
            (standing.failed, "failed"),
        )
        if n
    ]
    last = Text(STOPPING, style="bold") if stopping else Text("   ".join([tail, *troubles]), style="dim")
    machine = [Text(clean_text(health), style="dim")] if health else []
    return Group(head, grid, bar, *([Text(best)] if baseline else []), *machine, last)


def _needed(cells: Sequence[tuple[str, str]], columns: int) -> int:
    """Width of the settings in this many pairs of columns, separated by two spaces."""
    widths = [
        max(len(part) for part in parts)
        for n in range(columns)
        for parts in zip(*cells[n::columns], strict=True)
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def trial_line(result: Result, standing: Standing) -> str:
    """The last line of a trial: key=value pairs, for scripts."""
    score = (
        f" score={result.value:.4f} se={result.se:.4f}"
        if result.se is not None
        else f" reason={result.reason}"
    )
    if result.objective is not None and result.value != result.objective:
        score += f" objective={round(result.objective, 4) + 0.0:.4f}"
    best = f" best={standing.best[0]}" if standing.best else ""
    return f"trial={result.number} state={result.state}{score}{best} seconds={result.seconds:.1f}"


def study_line(name: str, standing: Standing, kind: StudyKind | None = None) -> str:
    """The last line of a search and of ``hpo status``: key=value pairs, for scripts.

    The best score is only called ``search_score`` in a search.  A confirmation has no best of its own, and the baseline
    of probes is called ``transferred``.
    """
    word = kind.word if kind else "search"
    words = [f"study={clean_text(name)}"]
    if kind and kind.of:
        words.append(f"{'confirms' if word == 'confirmation' else 'probes_of'}={clean_text(kind.of)}")
    words.append(f"complete={standing.complete}/{standing.total}")
    words += [f"infeasible={standing.infeasible}", f"failed={standing.failed}"]
    if standing.pruned:
        words.append(f"pruned={standing.pruned}")
    if standing.duplicates:
        words.append(f"duplicates={standing.duplicates}")
    if word == "confirmation":
        return " ".join(words)
    score, baseline = ("search_score", "baseline") if word == "search" else ("score", "transferred")
    if standing.best:
        words.append(f"best={standing.best[0]} {score}={standing.best[1]:.4f} se={standing.best[2]:.4f}")
    if standing.baseline:
        words.append(f"{baseline}={standing.baseline[1]:.4f}")
    if standing.front:
        words.append("front=" + ",".join(map(str, standing.front)))
    return " ".join(words)
