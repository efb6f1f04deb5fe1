"""The lines that a search prints at its start and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hpo.study import where
from hpo.terminal import figures, short
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import NothingLearned, Standing, StudyConfig, StudyFolder


def introduction(config: StudyConfig, trials: int) -> RenderableType:
    """The table of searched settings, shown once at the start."""
    table = Table(box=None, padding=(0, 2), title=None, show_edge=False)
    table.add_column("setting", style="bold", no_wrap=True)
    table.add_column("searched")
    table.add_column("trial 0", justify="right", no_wrap=True)
    for p in config.space:
        table.add_row(Text(p.name), Text(clean_text(p.describe())), Text(short(config.baseline[p.name])))
    return table


def ratio_line(settings: int, trials: int) -> str:
    counts = f"{settings} setting{'s'[: settings != 1]}, {trials} trial{'s'[: trials != 1]}"
    return f"{counts}: {trials / settings:.1f} trials for each searched setting"


def summary(
    folder: StudyFolder,
    standing: Standing,
    settings: Mapping[str, Any] | None,
    why: str,
    nothing: NothingLearned | None = None,
    edge: Sequence[str] = (),
) -> list[str]:
    """The summary at the end: best settings, scores of best trial, baseline and untrained
    base, files, next command.  ``nothing``: the search has learned nothing, so hpo confirm would refuse it.
    ``edge``: that the best trial lies on an edge of the space."""
    from hpo.terminal import end_lines, trial_lines

    lines = [f"{folder.name}: {why}", *(nothing.lines() if nothing else ())]
    if standing.best is None or settings is None:
        return [*lines, "no trial has a score yet", f"next: hpo status {folder.words}"]
    number = standing.best[0]
    trial = folder.trial(number)
    baseline = f" (trial {standing.baseline[0]})" if standing.baseline else ""
    trouble = clean_text(standing.baseline_trouble).replace("_", " ") or figures(None)
    said, following = end_lines(folder, standing)
    if nothing:
        said, following = [], nothing.command or f"hpo dashboard {folder.words}"
    confirm = f", confirm with: {following}" if "confirm" in following and not nothing else ""
    lines += [f"best: trial {number}", *(f"  {name} = {short(value)}" for name, value in settings.items())]
    lines += [
        f"search score: {figures(standing.best)}{confirm}",
        f"  usual settings{baseline}: {figures(standing.baseline) if standing.baseline else trouble}",
        "  untrained base: 0.0000, by definition; 1 means that prompts are followed as by",
        "  the base, and that images are as like the references as these are each other;",
        "  ± is one standard error over prompts",
        *(f"  extra metrics: {line}" for line in trial_lines(trial)),
        *said,
        *([] if nothing else edge),
    ]
    if standing.front:
        lines += [
            "Pareto front of prompt following and likeness: trials " + ", ".join(map(str, standing.front)),
            "  no other trial is better in both; the best trial above has the highest combined score;",
            "  convergence is not checked for a study with two objectives",
        ]
    if trial.lora.is_file():
        lines.append(f"LoRA: {trial.lora}")
    lines += [f"images: {trial.grid}", f"figures: {trial.metrics}", f"study: {where(folder)}"]
    if folder.alert.is_file():
        lines.append(f"convergence: {folder.alert}")
    return [*lines, f"next: {following}"]
