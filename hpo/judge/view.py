"""Terminal output of ``hpo evaluate`` and ``hpo compare``: lines, progress bars and tables.

Owns the output texts only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from hpo.judge.runfiles import label
from hpo.night import reached
from hpo.study import RUNS, clean_advice
from hpo.terminal import PLAIN_SECONDS, STOPPING, left
from trainer.errors import Interrupted
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.choice import CheckpointPoint
    from hpo.health import Guard
    from hpo.judge.outcome import Evaluated

FOUND_SECONDS = 0.05  # below this time per image, the images were found on the disk
TABLE_WIDTH = 80  # characters
RULE = (
    "The earliest checkpoint is chosen that is behind the best by no more than the noise (its ±: "
    "one standard error of the difference)."
)


@dataclass
class Pace:
    """How fast images are generated, and how many are still planned in the whole command.

    Images that an earlier call has drawn take almost no time; only the rate of this call's slow images counts.
    """

    planned: int = 0  # images in parts that have not ended
    seconds: float = 0.0
    images: int = 0
    _at: float = field(default_factory=time.monotonic)
    _done: int = 0
    _said: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        self._at, self._done = time.monotonic(), 0

    def drawn(self, done: int) -> None:
        """``done`` images of the current part exist now."""
        now = time.monotonic()
        if now - self._at > FOUND_SECONDS * (done - self._done):
            self.seconds += now - self._at
            self.images += done - self._done
        self._at, self._done = now, done

    def end(self, images: int) -> None:
        """The current part of ``images`` images has ended."""
        self.planned = max(0, self.planned - images)

    def words(self, left_here: int) -> str:
        """``about 1:40 left``; empty until the first images are drawn."""
        if not self.images:
            return ""
        return left(self.seconds / self.images * max(left_here, self.planned - self._done))

    def is_due(self) -> bool:
        """Whether another line may be printed where there is no terminal."""
        if time.monotonic() - self._said < PLAIN_SECONDS:
            return False
        self._said = time.monotonic()
        return True


class JudgeView:
    """Prints lines, a progress bar (on a terminal only) and the final table."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.should_stop: Callable[[], bool] = lambda: False
        self.pace = Pace()
        self.guard: Guard | None = None

    def say(self, text: str) -> None:
        self.console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def guarded(self, guard: Guard) -> Iterator[None]:
        """Watch the health while images are drawn.  Raises MachineError if the disk gets full."""
        self.guard = guard
        try:
            with guard:
                yield
        except Interrupted:
            if guard.should_stop and not self.should_stop():
                raise guard.full_error(clean_advice(RUNS)) from None
            raise

    def on_ask(self) -> None:
        """Acknowledge Ctrl-C.  Runs in a signal handler, so rich cannot be used here."""
        import os

        os.write(2, f"{STOPPING}\n".encode())

    @contextlib.contextmanager
    def drawing(self, what: str, images: int = 0) -> Iterator[Callable[[int, int], None]]:
        """Progress while images are generated: a bar on a terminal, else a line now and then.

        Also checks for Ctrl-C between two chunks.  ``images``: how many this part has, for the time left of the whole
        command (``plan``).
        """
        columns = (
            SpinnerColumn(),  # moves within a chunk too, as does the time
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(clean_text(what), total=images or None, left="")
            self.pace.begin()
            if self.should_stop():
                raise Interrupted(
                    f"stopped before {what}; finished images are kept", "run the same command again to resume"
                )

            def on_image(done: int, total: int) -> None:
                reached(f"images of {what}", done)
                self.pace.drawn(done)
                words = self.pace.words(total - done)
                bar.update(task, completed=done, total=total, left=words)
                if not self.console.is_terminal and self.pace.is_due() and 0 < done < total:
                    self.say(f"  {what}: {done}/{total} images{f', {words}' if words else ''}")
                if self.guard is not None:
                    self.guard.on_image(done, total, self.should_stop)
                full = self.guard is not None and self.guard.should_stop
                if (self.should_stop() or full) and done < total:
                    raise Interrupted(
                        f"stopped after image {done}/{total} of {what}; finished images are kept",
                        "run the same command again to resume",
                    )

            try:
                yield on_image
            finally:
                self.pace.end(images)

    def table(self, table: Table) -> None:
        """Print a table.  The tables fit 80 columns; a log without a width gets no narrower one."""
        screen = self.console
        if screen.width < TABLE_WIDTH:
            screen = Console(
                file=screen.file, width=TABLE_WIDTH, force_terminal=screen.is_terminal, highlight=False
            )
        screen.print(table)

    def show(self, outcome: Evaluated) -> None:
        """Print the checkpoints as a table, the verdict and the choice."""
        self.say(RULE)
        self.table(_table(outcome))
        for point in outcome.points:
            if point.score is None:
                self.say(f"{label(point.name)} is not usable: {point.reason}")
        if beside := _beside_table(outcome.points):
            self.table(beside)
        verdict = outcome.verdict
        self.say(f"{verdict.word}: {verdict.why}; {verdict.advice}")
        for line in _choice_lines(outcome):
            self.say(line)


def _table(outcome: Evaluated) -> Table:
    """One row per checkpoint, at most 80 columns wide."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("checkpoint", "following", "likeness", "score", "behind best", ""):
        table.add_column(name, justify="left" if name in ("checkpoint", "") else "right", no_wrap=True)
    table.add_row(*map(Text, ("untrained", "1.00", "0.00", "0.000", "", "by definition")), style="dim")
    for number, point in enumerate(outcome.points):
        if point.score is None:
            table.add_row(*map(Text, (label(point.name), "–", "–", "–", "", "not usable")), style="dim")
            continue
        score, lead = point.score, outcome.choice.lead[number]
        cells = (
            label(point.name),
            f"{score.prompt_following:.2f} ± {score.prompt_following_se:.2f}",
            f"{score.likeness:.2f} ± {score.likeness_se:.2f}",
            f"{score.value:.3f} ± {score.se:.3f}",
            f"{lead.mean:.3f} ± {lead.se:.3f}" if lead else "",
            ", ".join(_words(outcome, number)),
        )
        table.add_row(*map(Text, cells), style="bold" if number == outcome.final else "")
    return table


def _beside_table(points: Sequence[CheckpointPoint]) -> Table | None:
    """Table of the raw extra metrics, one column each.  They are not part of the score."""
    scored = [(point.name, point.score.beside) for point in points if point.score and point.score.beside]
    if not scored:
        return None
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("extra metrics, raw", no_wrap=True)
    for figure in scored[0][1]:
        title = Text(f"{clean_text(figure.measure)}\n{clean_text(figure.model)}")
        table.add_column(title, justify="right", overflow="fold")
    for name, figures in scored:
        table.add_row(*map(Text, (label(name), *(f"{figure.value:.4f}" for figure in figures))))
    return table


def _words(outcome: Evaluated, number: int) -> list[str]:
    words = []
    if number == outcome.choice.best:
        words.append("best")
    elif number in outcome.choice.within and number != outcome.final:
        words.append("equal")
    if number == outcome.final:
        words.append("chosen")
    return words


def _choice_lines(outcome: Evaluated) -> list[str]:
    final = outcome.points[outcome.final].name
    first = outcome.points[outcome.choice.chosen].name
    if outcome.word == "only":
        return [f"chosen: {final}"]
    if outcome.rechoice is None:
        return [f"chosen: {final}, not confirmed: confirmation prompts need a class word"]
    lines = []
    for place, (number, point) in enumerate(zip(outcome.tested, outcome.retested, strict=True)):
        before, lead = outcome.points[number].score, outcome.rechoice.lead[place]
        after = f"{point.score.value:.3f} ± {point.score.se:.3f}" if point.score else point.reason
        behind = f", {lead.mean:.3f} ± {lead.se:.3f} behind" if lead else ""
        assert before is not None
        lines.append(f"confirmation: {label(point.name)} {before.value:.3f} → {after}{behind}")
    if outcome.word == "confirmed":
        lines.append(f"chosen: {final}, also with the confirmation prompts")
    else:
        lines.append(f"chosen: {final} with the confirmation prompts; the search prompts had chosen {first}")
    return lines
