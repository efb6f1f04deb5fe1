"""Terminal output of ``hpo evaluate`` and ``hpo compare``: lines, progress bars and tables.

Owns the output texts only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from hpo.terminal import STOPPING
from trainer.errors import Interrupted
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.choice import CheckpointPoint
    from hpo.judge.outcome import Evaluated

TABLE_WIDTH = 132  # characters


class JudgeView:
    """Prints lines, a progress bar (on a terminal only) and the final table."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.should_stop: Callable[[], bool] = lambda: False

    def say(self, text: str) -> None:
        self.console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)

    def on_ask(self) -> None:
        """Acknowledge Ctrl-C.  Runs in a signal handler, so rich cannot be used here."""
        import os

        os.write(2, f"{STOPPING}\n".encode())

    @contextlib.contextmanager
    def drawing(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar while images are generated.  Also checks for Ctrl-C between two chunks."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(clean_text(what), total=None)

            def on_image(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
                if self.should_stop() and done < total:
                    raise Interrupted(
                        f"stopped after image {done} of {total} of {what}; finished images are kept",
                        "run the same command again to resume",
                    )

            yield on_image

    def table(self, table: Table) -> None:
        """Print a table without truncating it, also if the terminal or log is narrower than the table."""
        screen = self.console
        if screen.width < TABLE_WIDTH:
            screen = Console(
                file=screen.file, width=TABLE_WIDTH, force_terminal=screen.is_terminal, highlight=False
            )
        screen.print(table)

    def show(self, outcome: Evaluated) -> None:
        """Print the checkpoints as a table, the verdict and the choice."""
        self.table(_table(outcome))
        if beside := _beside_table(outcome.points):
            self.table(beside)
        verdict = outcome.verdict
        self.say(f"{verdict.word}: {verdict.why}; {verdict.advice}")
        for line in _choice_lines(outcome):
            self.say(line)


def _table(outcome: Evaluated) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for name in ("checkpoint", "epoch", "step", "prompt following", "likeness", "score", "best − this", ""):
        table.add_column(name, justify="left" if name in ("checkpoint", "") else "right", no_wrap=name != "")
    table.add_row(
        *map(Text, ("untrained base", "0", "0", "1.000", "0.000", "0.000", "", "by definition")), style="dim"
    )
    for number, point in enumerate(outcome.points):
        place = [clean_text(point.name), _shown(point.epoch), _shown(point.step)]
        if point.score is None:
            table.add_row(*map(Text, (*place, "–", "–", "–", "", clean_text(point.reason))), style="dim")
            continue
        score, lead = point.score, outcome.choice.lead[number]
        cells = (
            *place,
            f"{score.prompt_following:.3f} ± {score.prompt_following_se:.3f}",
            f"{score.likeness:.3f} ± {score.likeness_se:.3f}",
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
        table.add_column(Text(f"{clean_text(figure.measure)}\n{clean_text(figure.model)}"), justify="right")
    for name, figures in scored:
        table.add_row(*map(Text, (clean_text(name), *(f"{figure.value:.4f}" for figure in figures))))
    return table


def _words(outcome: Evaluated, number: int) -> list[str]:
    words = []
    if number == outcome.choice.best:
        words.append("best")
    elif number in outcome.choice.within:
        words.append("within one SE")
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
        lines.append(f"confirmation: {point.name} {before.value:.3f} → {after}{behind}")
    if outcome.word == "confirmed":
        lines.append(f"chosen: {final}, also with the confirmation prompts")
    else:
        lines.append(f"chosen: {final} with the confirmation prompts; the search prompts had chosen {first}")
    return lines


def _shown(number: int | None) -> str:
    return "–" if number is None else str(number)
