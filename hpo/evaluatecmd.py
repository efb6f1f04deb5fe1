"""``hpo evaluate``: every saved checkpoint of a run scored, one chosen, confirmed and marked.

Owns the order of things, the table, evaluation.json and best.safetensors.  Which checkpoint is chosen is
``evaluation.checkpoints``', how it is scored ``hpo.judge``'s.  The same command goes on with a call that was
stopped or killed: what is drawn is kept.

    name.run/evaluation/evaluation.json, curve.png
    name.run/evaluation/<checkpoint>/search/, …/confirmation/     images and metrics
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from hpo.locks import Lock, holder
from hpo.report import STOPPING, clock
from hpo.runfiles import MARK_KEY, Checkpoint, RunFiles, find_run, is_mark
from hpo.stop import Stop
from hpo.study import Inputs
from trainer.errors import ConfigError, Interrupted, InvalidImages, MachineError, ModelFileError
from trainer.files import clean_text, require_space, sha256_file, sweep_tree, write_atomic
from trainer.tensorfile import with_metadata

if TYPE_CHECKING:
    from evaluation.anchors import Anchors
    from evaluation.checkpoints import Choice, Point, Verdict
    from evaluation.prompts import PromptSet
    from evaluation.score import Score
    from hpo.judge import Judge

SEARCH, CONFIRMATION = "search", "confirmation"
TABLE_WIDTH = 132  # characters


@dataclass(frozen=True)
class Outcome:
    """What an evaluation came to.  ``final`` and ``tested`` are indices into ``points``; ``retested`` are the
    tested ones on the confirmation prompts."""

    points: Sequence[Point]
    choice: Choice
    verdict: Verdict
    tested: Sequence[int]
    retested: Sequence[Point]
    rechoice: Choice | None
    final: int
    word: str


def evaluate(path: Path, inputs: Inputs, console: Console) -> Path:
    """Score, choose, confirm, mark; returns the chosen file.  Raises ToolError, Interrupted if stopped."""
    view = View(console)
    run = find_run(path)
    _check_mark(run)
    from hpo import judge as judges  # loads torch: after everything that can be checked without it

    judge = judges.load(run, inputs, view.say)
    with alone(run), Stop(view.on_ask) as stop:
        view.should_stop = stop
        outcome = _judged(run, judge, view)
        _write(run, judge, outcome)
        view.show(outcome)
        chosen = run.checkpoints[outcome.final]
        if not run.trial:
            _mark(run, chosen, outcome)
            view.say(f"best: {run.mark} is a copy of {chosen.path.name}")
        view.say(f"figures: {run.evaluation / 'evaluation.json'}, {run.evaluation / 'curve.png'}")
    return chosen.path


def _judged(run: RunFiles, judge: Judge, view: View) -> Outcome:
    from evaluation import checkpoints

    damaged = _unfit(run, judge)
    anchors = _anchors(judge, judge.prompts, run, view)
    count = len(run.checkpoints) - len(damaged)
    view.say(
        f"{count} checkpoints × {judge.prompts.image_count} images ({len(judge.prompts.prompts)} prompts × "
        f"{len(judge.prompts.seeds)} seeds), {len(judge.reference_files)} references, {judge.scorer.name}"
    )
    points = [
        _point(run, checkpoint, judge, judge.prompts, anchors, SEARCH, damaged, view)
        for checkpoint in run.checkpoints
    ]
    choice = checkpoints.choose(points, anchors)
    verdict = checkpoints.verdict(points, choice, finished=run.finished)
    tested = checkpoints.finalists(points, choice)
    if judge.confirmation is None or len(tested) < 2:
        word = "unconfirmed" if len(tested) > 1 else "only"
        return Outcome(points, choice, verdict, tested, (), None, choice.chosen, word)
    view.say(f"confirming {len(tested)} of them on {judge.confirmation.image_count} other images each")
    fresh = _anchors(judge, judge.confirmation, run, view)
    retested = [
        _point(run, run.checkpoints[n], judge, judge.confirmation, fresh, CONFIRMATION, damaged, view)
        for n in tested
    ]
    rechoice = checkpoints.choose(retested, fresh)
    final, word = checkpoints.confirmed(choice, tested, rechoice)
    return Outcome(points, choice, verdict, tested, retested, rechoice, final, word)


def _unfit(run: RunFiles, judge: Judge) -> dict[str, str]:
    """Checkpoints that cannot be put into the base: name → why.  If none can, its error is the user's."""
    found: dict[str, ModelFileError] = {}
    for checkpoint in run.checkpoints:
        try:
            judge.check(checkpoint.path)
        except ModelFileError as error:
            found[checkpoint.name] = error
    if len(found) == len(run.checkpoints):
        raise found[run.checkpoints[-1].name]
    return {name: error.message for name, error in found.items()}


def _anchors(judge: Judge, prompts: PromptSet, run: RunFiles, view: View) -> Anchors:
    with view.drawing(f"untrained {judge.base.name}") as on_image:
        anchors = judge.anchors(prompts, run.evaluation, on_image)
    for problem in anchors.problems:
        view.say(f"warning: {problem}")
    return anchors


def _point(
    run: RunFiles,
    checkpoint: Checkpoint,
    judge: Judge,
    prompts: PromptSet,
    anchors: Anchors,
    name: str,
    damaged: Mapping[str, str],
    view: View,
) -> Point:
    from evaluation.checkpoints import Point
    from evaluation.images import Unchanged

    place = checkpoint.name, checkpoint.epoch, checkpoint.step
    if checkpoint.name in damaged:
        return Point(*place, None, damaged[checkpoint.name])
    started = time.monotonic()
    try:
        with view.drawing(checkpoint.name) as on_image:
            folder = run.evaluation / checkpoint.name / name
            score = judge.score(checkpoint.path, prompts, anchors, folder, on_image)
    except InvalidImages as error:
        point = Point(*place, None, error.message)
    except Unchanged:
        point = Point(*place, None, "it changes nothing: its images are the untrained base's")
    else:
        safety = score.safety
        if safety and safety.broken:  # copied or collapsed pictures are no result, however they score
            point = Point(*place, None, "; ".join(map(safety.says, safety.broken)))
        else:
            point = Point(*place, score)
    said = point.reason or f"score {score.value:.4f} ± {score.se:.4f}"
    view.say(f"{checkpoint.name} ({name}): {said}, {clock(time.monotonic() - started)}")
    return point


@contextlib.contextmanager
def alone(run: RunFiles) -> Iterator[None]:
    """No second process draws into the same folder; what a killed one left half-made goes."""
    lock = Lock(run.evaluation / "lock")
    if not lock.try_acquire():
        raise MachineError(
            f"process {holder(lock.path)} evaluates {run.name} already", "wait for it, or stop that process"
        )
    try:
        sweep_tree(run.evaluation)
        yield
    finally:
        lock.release()


# best.safetensors


def _check_mark(run: RunFiles) -> None:
    """Never replace a file of the user's; said before anything is drawn."""
    if not run.trial and run.mark.exists() and not is_mark(run.mark):
        raise ConfigError(
            f"{run.mark} is not a mark of this tool, so it is not replaced",
            "rename that file, or move it away",
        )


def _mark(run: RunFiles, chosen: Checkpoint, outcome: Outcome) -> None:
    """A copy of the chosen file under the name best.safetensors, its source in the metadata."""
    point = outcome.points[outcome.final]
    assert point.score is not None
    source = sha256_file(chosen.path)
    require_space(run.output, chosen.path.stat().st_size)
    retest = next((p.score for p in outcome.retested if p.name == point.name), None)
    extra = {
        MARK_KEY: chosen.path.name,
        f"{MARK_KEY}_sha256": source,
        f"{MARK_KEY}_score": f"{(retest or point.score).value:.4f} ± {(retest or point.score).se:.4f}",
        f"{MARK_KEY}_prompts": CONFIRMATION if retest else SEARCH,
    }
    write_atomic(run.mark, with_metadata(chosen.path, extra))


# evaluation.json


def _write(run: RunFiles, judge: Judge, outcome: Outcome) -> None:
    import numpy as np

    from evaluation.images import png_bytes
    from evaluation.pictures import curve_picture

    write_atomic(run.evaluation / "evaluation.json", json.dumps(_values(run, judge, outcome), indent=1))
    picture = curve_picture(
        outcome.points,
        outcome.choice.best,
        outcome.final,
        outcome.retested,
        f"{run.name} on {judge.base.name}",
    )
    write_atomic(run.evaluation / "curve.png", png_bytes(np.asarray(picture)))


def _values(run: RunFiles, judge: Judge, outcome: Outcome) -> dict[str, Any]:
    names = [point.name for point in outcome.points]
    return {
        "run": run.name,
        "base": {"name": judge.base.name, "identity": judge.base.identity},
        "sampling": asdict(judge.sampling),
        "scorer": {"name": judge.scorer.name, "sha256": judge.scorer.sha},
        "likeness": {"name": judge.likeness.name, "sha256": judge.likeness.sha},
        "references": [str(path) for path in judge.reference_files],
        SEARCH: {"prompts": judge.prompts.hash, **_curve(outcome.points, outcome.choice)},
        CONFIRMATION: {
            "prompts": judge.confirmation.hash if judge.confirmation else None,
            **(_curve(outcome.retested, outcome.rechoice) if outcome.rechoice else {}),
        },
        "chosen": names[outcome.final],
        "chosen_file_sha256": sha256_file(run.checkpoints[outcome.final].path),
        "confirmation_says": outcome.word,
        "verdict": asdict(outcome.verdict),
    }


def _curve(points: Sequence[Point], choice: Choice) -> dict[str, Any]:
    rows = []
    for number, point in enumerate(points):
        lead = choice.lead[number]
        rows.append(
            {
                "checkpoint": point.name,
                "epoch": point.epoch,
                "step": point.step,
                "reason": point.reason,
                **_figures(point.score),
                "best_minus_this": asdict(lead) if lead else None,
                "within_one_se": number in choice.within,
            }
        )
    return {"checkpoints": rows, "best": points[choice.best].name, "earliest": points[choice.chosen].name}


def _figures(score: Score | None) -> dict[str, Any]:
    names = (
        *("value", "se", "prompt_following", "prompt_following_se", "likeness", "likeness_se"),
        *("clip_t", "clip_i", "n_images"),
    )
    return {name: getattr(score, name) if score else None for name in names}


# The terminal


class View:
    """Lines, a bar where there is a terminal, and the table at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.should_stop: Callable[[], bool] = lambda: False

    def say(self, text: str) -> None:
        self.console.print(Text(clean_text(text)), soft_wrap=True, highlight=False)

    def on_ask(self) -> None:
        """The user asked to stop.  Runs in a signal handler: no rich here."""
        import os

        os.write(2, f"{STOPPING}\n".encode())

    @contextlib.contextmanager
    def drawing(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar while images are drawn, and the place where Ctrl-C is heard: between two chunks."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(clean_text(what), total=None)

            def on_image(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
                if self.should_stop() and done < total:
                    raise Interrupted(
                        f"stopped after image {done} of {total} of {what}: they are kept",
                        "the same command goes on",
                    )

            yield on_image

    def table(self, table: Table) -> None:
        """Never cut: a log is no narrower than its figures."""
        screen = self.console
        if screen.width < TABLE_WIDTH:
            screen = Console(
                file=screen.file, width=TABLE_WIDTH, force_terminal=screen.is_terminal, highlight=False
            )
        screen.print(table)

    def show(self, outcome: Outcome) -> None:
        """The curve as a table, the verdict and the choice."""
        self.table(_table(outcome))
        verdict = outcome.verdict
        self.say(f"{verdict.word}: {verdict.why}; {verdict.advice}")
        for line in _choice_lines(outcome):
            self.say(line)


def _table(outcome: Outcome) -> Table:
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
            f"{lead.mean:.3f} ± {_se(lead):.3f}" if lead else "",
            ", ".join(_words(outcome, number)),
        )
        table.add_row(*map(Text, cells), style="bold" if number == outcome.final else "")
    return table


def _words(outcome: Outcome, number: int) -> list[str]:
    words = []
    if number == outcome.choice.best:
        words.append("best")
    elif number in outcome.choice.within:
        words.append("within one SE")
    if number == outcome.final:
        words.append("chosen")
    return words


def _choice_lines(outcome: Outcome) -> list[str]:
    final = outcome.points[outcome.final].name
    first = outcome.points[outcome.choice.chosen].name
    if outcome.word == "only":
        return [f"chosen: {final}"]
    if outcome.rechoice is None:
        return [f"chosen: {final}, not confirmed: there are no confirmation prompts without a class word"]
    lines = []
    for place, (number, point) in enumerate(zip(outcome.tested, outcome.retested, strict=True)):
        before, lead = outcome.points[number].score, outcome.rechoice.lead[place]
        after = f"{point.score.value:.3f} ± {point.score.se:.3f}" if point.score else point.reason
        behind = f", {lead.mean:.3f} ± {_se(lead):.3f} behind" if lead else ""
        assert before is not None
        lines.append(f"confirmation: {point.name} {before.value:.3f} → {after}{behind}")
    if outcome.word == "confirmed":
        lines.append(f"chosen: {final}, and the confirmation prompts choose the same")
    else:
        lines.append(f"chosen: {final}; the first prompts chose {first}, the confirmation prompts this one")
    return lines


def _se(lead: Any) -> float:
    from evaluation.checkpoints import standard_error

    return standard_error(lead)


def _shown(number: int | None) -> str:
    return "–" if number is None else str(number)
