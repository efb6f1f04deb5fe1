"""Several workers of one search: what each reports, and how the command that started them shows it.

Owns the view of a worker (its output is a log, and its progress a report) and the view of all of them.  A report is a
JSON object with an ``event``:

    line      a line that it printed                        text
    trial     a trial begins                                trial, text (its plain line), standing
    progress  steps or images                               phase, done, total, text, left (seconds)
    result    a trial has ended                             trial, state, standing
    loaded, begun, ended, follows                           what the session of a search has reached

A worker prints much that all of them print: what is loaded, the plan, the end.  So until the first trial the lines of
the leading worker are shown, and warnings of the others; of the ends, the last one; between them, every line.
Does not own when a worker starts and ends (``hpo.night``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.terminal.live import PLAIN_SECONDS, REFRESH_PER_SECOND, STOPPING, PlainView
from hpo.terminal.text import figures, left, say
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import Result, Standing

LINE, TRIAL, PROGRESS, RESULT = "line", "trial", "progress", "result"
LOADED, BEGUN, ENDED, FOLLOWS = "loaded", "begun", "ended", "follows"
WARNING, STUDY_LINE = "warning:", "study="


class Report(Protocol):
    """``hpo.night.Supervised.report``."""

    def __call__(self, event: str, *, dropped: bool = False, **values: Any) -> None: ...


# A worker's side


class ReportedLines:
    """A stream that writes to another one and reports every whole line."""

    def __init__(self, stream: TextIO, report: Report) -> None:
        self._stream, self._report, self._begun = stream, report, ""
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._report(LINE, text=line)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def reporting_console(report: Report) -> Console:
    """A console whose lines are reported as well."""
    return Console(file=ReportedLines(sys.stdout, report), highlight=False)  # type: ignore[arg-type]


class ReportingView(PlainView):
    """The view of a worker.  ``console``: of ``reporting_console``.  What only shows progress is a report, and in the
    log."""

    def __init__(
        self, console: Console, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]], report: Report
    ) -> None:
        super().__init__(console, settings)
        self._report = report
        self._log = Console(file=sys.stdout, highlight=False)
        self._last_report = 0.0

    def phase(self, name: str) -> None:
        self._report(name)

    def on_ask(self) -> None:
        """Nothing to print: the command that started this worker says it."""

    def announce(self, text: str) -> None:
        assert self.current is not None
        with self._only_logged():
            self.say(text)
        now = self.current.standing
        self._report(TRIAL, trial=self.current.number, text=text, standing=_figures_of(now))

    def refresh(self) -> None:
        with self._only_logged():
            super().refresh()
        current = self.current
        if current is None or time.monotonic() - self._last_report < 1 / REFRESH_PER_SECOND:
            return
        self._last_report = time.monotonic()
        self._report(
            PROGRESS,
            dropped=True,
            phase=current.phase,
            done=current.done,
            total=current.total,
            text=current.progress_text(),
            left=current.seconds_left(),
        )

    def on_result(self, result: Result, standing: Standing) -> None:
        super().on_result(result, standing)
        self._report(RESULT, trial=result.number, state=result.state, standing=_figures_of(standing))

    @contextlib.contextmanager
    def _only_logged(self) -> Iterator[None]:
        shown, self.console = self.console, self._log
        try:
            yield
        finally:
            self.console = shown


def _figures_of(now: Standing) -> dict[str, Any]:
    names = ("total", "complete", "infeasible", "failed", "best", "baseline")
    return {name: getattr(now, name) for name in names}


# The command's side


@dataclass
class Row:
    """A worker as shown.  ``state``: in words, while it has no trial."""

    number: int
    device: str
    state: str = "waits"
    trial: int | None = None
    done: int = 0
    total: int = 0
    progress: str = ""
    left: float | None = None
    reached: str = ""  # the last phase
    is_at_work: bool = False  # it has begun a trial, or what follows the trials
    restarts_at: float = 0.0  # time.monotonic
    ending: list[str] = field(default_factory=list)  # the lines after its last trial

    @property
    def words(self) -> str:
        if self.trial is None:
            return self.state
        return self.progress or "preparing …"


class WorkersView:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console, name: str, devices: Sequence[str]) -> None:
        self.console, self.name = console, name
        self.rows = {number: Row(number, device) for number, device in enumerate(devices, 1)}
        self.standing: dict[str, Any] = {}
        self.stopping = False
        self.last_end: list[str] = []  # of the worker that ended last
        self.last_study = ""  # the line about the study of a worker that was stopped
        self._leader = 1
        self._said: set[str] = set()
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        self._said.add(clean_text(text))
        say(self.console, text)

    def know(self, lines: Sequence[str]) -> None:
        """Lines that were shown before."""
        self._said.update(map(clean_text, lines))

    def on_ask(self) -> None:
        """The user asked to stop.  Runs in a signal handler, possibly during a print, so it must not use rich."""
        os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())

    def starts(self, number: int, *, leads: bool) -> None:
        """A worker's process begins."""
        self.rows[number] = Row(number, self.rows[number].device, state="starts")
        if leads:
            self._leader = number

    def rests(self, number: int, state: str, seconds: float = 0.0) -> None:
        """A worker has no process."""
        row = self.rows[number]
        row.state, row.trial, row.restarts_at = state, None, time.monotonic() + seconds if seconds else 0.0

    def shows(self, number: int, report: Mapping[str, Any]) -> None:
        """A worker has reported."""
        row, event = self.rows[number], report.get("event")
        if event == LINE:
            self._line(row, str(report.get("text", "")))
        elif event == TRIAL:
            row.trial, row.progress, row.done, row.total, row.is_at_work = (
                int(report["trial"]),
                "",
                0,
                0,
                True,
            )
            self.standing = dict(report["standing"])
            self.announce(f"worker {number}: {report['text']}")
        elif event == PROGRESS:
            row.done, row.total = int(report["done"]), int(report["total"])
            row.progress, row.left = str(report["text"]), report["left"]
        elif event == RESULT:
            row.trial, row.state, row.left = None, "takes the next trial", None
            self.standing = dict(report["standing"])
        elif event in (LOADED, BEGUN, ENDED, FOLLOWS):
            self._reaches(row, event)
        self.refresh()

    def _reaches(self, row: Row, phase: str) -> None:
        row.reached = phase
        if phase == LOADED:
            row.state = "has loaded the base"
        elif phase == BEGUN:
            row.state = "takes the next trial"
        elif phase == ENDED:
            row.state, row.ending = "has no more to do", []
            self.last_end = row.ending
        else:
            row.state, row.is_at_work = "confirms the best trials", True
            for line in row.ending:
                self.say(line)
            row.ending.clear()

    def _line(self, row: Row, text: str) -> None:
        if row.reached == ENDED:
            row.ending.append(text)
            return
        if row.reached == BEGUN and text.startswith(STUDY_LINE):
            self.last_study = text  # every worker says it when it is stopped
            return
        is_new = not text or text not in self._said
        own = row.number == self._leader or text.startswith(WARNING)
        if row.is_at_work or (is_new and own):
            self.say(text)

    def announce(self, text: str) -> None:
        self.say(text)

    def refresh(self) -> None:
        if time.monotonic() - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = time.monotonic()
        busy = [
            f"worker {r.number}: trial {r.trial}, {r.words}"
            for r in self.rows.values()
            if r.trial is not None
        ]
        if busy:
            seconds = self.seconds_left()
            say(
                self.console,
                "  " + "; ".join([*busy, *([f"study: {left(seconds)}"] if seconds is not None else [])]),
            )

    def seconds_left(self) -> float | None:
        """For the whole study: each worker has its own estimate, and the longest one is shown."""
        return max((row.left for row in self.rows.values() if row.left is not None), default=None)

    def __enter__(self) -> WorkersView:
        return self

    def __exit__(self, *_: object) -> None: ...


class LiveWorkersView(WorkersView):
    """A block at the bottom of the terminal with a line for each worker; finished trials scroll above it."""

    def __init__(self, console: Console, name: str, devices: Sequence[str]) -> None:
        super().__init__(console, name, devices)
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            get_renderable=lambda: workers_block(self, console.width),
            transient=True,
        )

    def on_ask(self) -> None:
        self.stopping = True

    def announce(self, text: str) -> None:
        """Nothing to do: the block shows the trial."""

    def refresh(self) -> None:
        """Nothing to do: rich's Live redraws by itself."""

    def __enter__(self) -> LiveWorkersView:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def workers_view(console: Console, name: str, devices: Sequence[str]) -> WorkersView:
    return (LiveWorkersView if console.is_terminal else WorkersView)(console, name, devices)


def workers_block(view: WorkersView, width: int = 80) -> RenderableType:
    """A line for each worker, then the study: best so far, time left.  Fits 80 columns."""
    now = view.standing
    done = f"  {now['complete']}/{now['total']} trials" if now else ""
    head = Text.assemble((clean_text(view.name), "bold"), f"  {len(view.rows)} workers{done}")
    rows = view.rows.values()
    trials = {row.number: "" if row.trial is None else f"trial {row.trial}" for row in rows}
    devices = {row.number: "" if row.device == "cpu" else row.device for row in rows}
    bar_width = 12 if width < 100 else 26
    table = Table.grid(padding=(0, 1))
    for cells in (map(str, trials), devices.values(), trials.values(), (" " * bar_width,)):
        table.add_column(no_wrap=True, min_width=max(map(len, cells)))  # only the last one gives way
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        at, place = Text(devices[row.number], style="dim"), str(row.number)
        if row.trial is None:
            table.add_row(place, at, "", "", Text(_resting(row), style="dim"))
            continue
        bar = ProgressBar(total=max(1, row.total), completed=row.done, width=bar_width)
        table.add_row(place, at, trials[row.number], bar, Text(clean_text(row.words)))
    return Group(head, table, *_study_lines(view, width))


def _resting(row: Row) -> str:
    if not row.restarts_at:
        return row.state
    return f"{row.state} in {max(0, round(row.restarts_at - time.monotonic()))} s"


def _study_lines(view: WorkersView, width: int) -> list[Text]:
    now = view.standing
    lines = []
    if now:
        best, baseline = now["best"], now["baseline"]
        text = f"best so far: trial {best[0]}, {figures(best)}" if best else "best so far: –"
        usual = f"(trial {baseline[0]}, the usual settings: {baseline[1]:.4f})" if baseline else ""
        if usual:
            text += f"   {usual}" if len(text) + 3 + len(usual) <= width else f"\n  {usual}"
        lines.append(Text(text))
    if view.stopping:
        return [*lines, Text(STOPPING, style="bold")]
    seconds = view.seconds_left()
    tail = left(seconds) if seconds is not None else "time left: known after the first trial"
    troubles = [f"{now[what]} {what}" for what in ("infeasible", "failed") if now and now[what]]
    return [*lines, Text("   ".join([tail, *troubles]), style="dim")]
