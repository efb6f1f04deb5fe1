"""``hpo dataset check`` and ``hpo dataset prepare``: the request, the report and its tables.

Owns the tables.  Does not own the settings that a check assumes for each base (``trainer.bases``), the
findings (``trainer.data.findings``) or the folder layout that prepare builds (``trainer.data.layout``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpo.study import STYLE_PRESET, preset_of
from hpo.terminal import command, json_text, say
from hpo.train import Steps, count_steps
from trainer.bases import KNOWN_BASES
from trainer.config import TrainConfig
from trainer.data import (
    LISTED,
    REFUSED,
    WARNING,
    Dataset,
    DatasetFinding,
    Question,
    Survey,
    Wish,
    build,
    findings,
    parts_of,
    read_dataset,
    shown,
    survey,
)
from trainer.errors import DataError, ToolError
from trainer.overrides import read_setting
from trainer.text import clean_text

STYLES = {REFUSED: "bold red", WARNING: "yellow"}
BAR = 24  # width of the longest histogram bar, in columns
LISTED_REFUSED = 20  # files of a refused finding listed in the table; --json lists all


@dataclass(frozen=True)
class DatasetRequest:
    """The arguments of ``hpo dataset check``."""

    folder: Path
    base: str = "sd15"
    trigger: str | None = None
    class_word: str | None = None
    sets: tuple[str, ...] = ()
    as_json: bool = False

    @property
    def config(self) -> TrainConfig:
        return TrainConfig().with_values(
            {**KNOWN_BASES[self.base].settings, **dict(map(read_setting, self.sets))}
        )

    @property
    def family(self) -> str:
        return KNOWN_BASES[self.base].family


@dataclass(frozen=True)
class Report:
    """The result of a check.  ``steps`` counts only usable images; None if there are none."""

    survey: Survey
    config: TrainConfig
    findings: tuple[DatasetFinding, ...]
    steps: Steps | None
    trigger: str | None
    class_word: str | None

    @property
    def is_usable(self) -> bool:
        return not any(finding.severity == REFUSED for finding in self.findings)


def check(request: DatasetRequest, console: Console, echo: Callable[[str], None]) -> None:
    """Print the report.  Raises DataError afterwards if training would refuse the folder."""
    report = examine(request)
    if request.as_json:
        echo(json_text(as_json(request, report)))
    else:
        show(console, request, report)
    refused = [finding for finding in report.findings if finding.severity == REFUSED]
    if refused:
        kinds = "one finding" if len(refused) == 1 else f"{len(refused)} findings"
        raise DataError(
            f"{shown(request.folder)} cannot be trained on: {kinds} marked {REFUSED}",
            "fix them and check again",
        )


def examine(request: DatasetRequest) -> Report:
    """Collect all findings, and check whether training itself would accept the folder."""
    config, root = request.config, request.folder
    seen = survey(root, config)
    notes: list[str] = []
    trouble: ToolError | None = None
    try:
        _, notes = parts_of(root, 1)
    except DataError as error:
        trouble = error
    trigger, class_word = request.trigger or seen.trigger, request.class_word or seen.class_word
    question = Question(request.family, config, _counter(request.base), trigger, class_word)
    found = list(findings(seen, question))
    refused = any(finding.severity == REFUSED for finding in found)
    if not refused and trouble is None:  # run the checks of training itself, too
        known = {p.path: (p.width_px, p.height_px, p.sha256, ()) for p in seen.photos}
        try:
            notes = list(read_dataset(root, config, known=known).notes)
        except ToolError as error:
            trouble = error
    if trouble and not (refused and any(b.error.message == trouble.message for b in seen.broken)):
        found.insert(0, DatasetFinding("folder", REFUSED, trouble.message, trouble.hint))
    found += [
        DatasetFinding("folder", "note", note, "rename or move it if it should be used") for note in notes
    ]
    return Report(seen, config, tuple(found), _steps(seen, config), trigger, class_word)


def _counter(base: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text.  The tokenizer is loaded on first use."""

    @cache
    def tokenizer() -> Any:
        from trainer.bases import tokenizer_of

        return tokenizer_of(base)

    return lambda text: len(tokenizer()(text, add_special_tokens=False)["input_ids"])


def _steps(seen: Survey, config: TrainConfig) -> Steps | None:
    """The step counts for the images that fit a bucket."""
    from trainer.data import BucketRules

    rules = BucketRules.of(config)
    items = tuple(p.item for p in seen.trained if rules.fit(p.width_px, p.height_px))
    return count_steps(config, Dataset(seen.root, items)) if items else None


def as_json(request: DatasetRequest, report: Report) -> dict[str, Any]:
    """The report as JSON, for scripts."""
    return {
        "folder": shown(request.folder),
        "for": request.base,
        "usable": report.is_usable,
        "trigger": report.trigger,
        "class": report.class_word,
        "preset": preset_of(report.trigger, report.class_word),
        "images": len(report.survey.trained),
        "held_out": len(report.survey.held_out),
        "findings": [asdict(finding) for finding in report.findings],
        "steps": asdict(report.steps) if report.steps else None,
    }


def show(console: Console, request: DatasetRequest, report: Report) -> None:
    """Print the report for people."""
    seen, config = report.survey, report.config
    held_out = f", {len(seen.held_out)} held out" if seen.held_out else ""
    subject = " ".join(clean_text(word) for word in (report.trigger, report.class_word) if word)
    is_style = preset_of(report.trigger, report.class_word) == STYLE_PRESET
    about = f", {'style' if is_style else 'subject'} {subject}" if subject else ""
    say(console, f"{shown(request.folder)}: {len(seen.trained)} images{held_out}{about}")
    say(console, f"checked for {request.base} at resolution {config.resolution}")
    if report.findings:
        console.print(_findings_table(report.findings))
    else:
        say(console, "no problems found")
    if report.steps:
        console.print(_histogram(report.steps))
        for line in arithmetic(report.steps, config, {photo.repeats for photo in seen.trained}):
            say(console, line)
    if report.is_usable and not any(finding.kind == "few" for finding in report.findings):
        if not KNOWN_BASES[request.base].study:
            say(
                console,
                f"the search runs on {_searched(request.base)}; "
                f"hpo transfer then adapts its best settings to {request.base}",
            )
        say(console, f"next: {_search_command(request, report)}")


def _searched(base: str) -> str:
    """The base that is searched for this one: itself, or the smaller one if it has no study of its own."""
    if KNOWN_BASES[base].study:
        return base
    return next(known.name for known in KNOWN_BASES.values() if known.hub and known.study)


def _search_command(request: DatasetRequest, report: Report) -> str:
    """The search on these images: on the base itself, or on SD1.5, from which settings are transferred to SDXL."""
    words: list[str | Path] = ["hpo", "search", "--base", _searched(request.base), "--data", request.folder]
    named = {"--trigger": request.trigger, "--class": request.class_word}
    return command(*words, *(word for flag, value in named.items() if value for word in (flag, value)))


def _findings_table(found: tuple[DatasetFinding, ...]) -> Table:
    table = Table(box=None, padding=(0, 1), show_edge=False, expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding", overflow="fold", ratio=5)
    table.add_column("what to do", overflow="fold", ratio=4)
    for finding in found:
        most = LISTED_REFUSED if finding.severity == REFUSED else LISTED
        names = [Path(name).name for name in finding.files[:most]]
        more = f" and {len(finding.files) - most} more" if len(finding.files) > most else ""
        what = Text(clean_text(finding.what))
        if names and not all(name in finding.what for name in names):
            what.append(f": {', '.join(names)}{more}", style="dim")
        style = STYLES.get(finding.severity, "dim")
        table.add_row(Text(finding.severity, style=style), what, Text(clean_text(finding.do)))
    return table


def _histogram(steps: Steps) -> Table:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for name, justify in (("bucket", "right"), ("samples", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    most = max(steps.buckets.values())
    for size, count in sorted(steps.buckets.items(), key=lambda entry: -entry[1]):
        table.add_row(size, str(count), "█" * max(1, round(BAR * count / most)))
    return table


def arithmetic(steps: Steps, config: TrainConfig, repeats: set[int]) -> list[str]:
    """Images → samples → batches → steps, one line each."""
    groups = config.gradient_accumulation_steps
    times = f"{min(repeats)} repeat{'s'[: min(repeats) > 1]}" if len(repeats) == 1 else "their repeats"
    by = "" if groups == 1 else f" / {groups} gradient accumulation steps"
    return [
        f"{steps.images} images × {times} = {steps.samples_per_epoch} samples per epoch",
        f"batch size {config.train_batch_size}: {steps.batches_per_epoch} batches{by}"
        f" = {steps.steps_per_epoch} steps per epoch",
        f"× {steps.epochs} epochs = {steps.total_steps} steps (change the settings with --set)",
    ]


def prepare(source: Path, folder: Path, wish: Wish, echo: Callable[[str], None]) -> None:
    """Build the folder layout, then print what was done and the next command."""
    built = build(source, folder, wish)
    for note in built.notes:
        echo(clean_text(f"note: {note}"))
    if not wish.class_word:
        echo("note: no class word: hpo search needs one; --class girl puts it into the folder's name")
    apart = f", {built.held_out} held out" if built.held_out else ""
    echo(clean_text(f"{built.images} images in {built.folder}{apart}"))
    echo(f"next: {command('hpo', 'dataset', 'check', folder)}")
