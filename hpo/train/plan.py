"""What a run of ``hpo train`` will do, before it does it: settings with their sources, and step arithmetic.

Owns the text of ``--dry-run``. Loads no torch and no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpo.terminal import say, short
from trainer.config import SETTINGS, TrainConfig
from trainer.data import (
    Dataset,
    assign_buckets,
    batches_per_epoch,
    differences,
    length_of,
    warmup_steps,
)
from trainer.errors import ToolError
from trainer.kohya import TrainFile
from trainer.text import clean_text


@dataclass(frozen=True)
class Steps:
    """Images → samples → batches → optimizer steps.  A sample is one image, shown once; ``buckets`` counts
    the samples of an epoch by bucket."""

    images: int
    regularisation_images: int
    samples_per_epoch: int
    buckets: Mapping[str, int]
    batches_per_epoch: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int
    samples_seen: int
    batch_sizes: tuple[int, ...] = ()

    def line(self, config: TrainConfig) -> str:
        """The arithmetic in one line."""
        accumulation = config.gradient_accumulation_steps
        groups = f" / {accumulation} accumulated" if accumulation > 1 else ""
        length = (
            f"{self.steps_per_epoch} steps an epoch × {self.epochs} epoch{'s'[: self.epochs > 1]}"
            if config.max_train_steps is None
            else f"{self.steps_per_epoch} steps an epoch, {self.epochs} epoch{'s'[: self.epochs > 1]} begun"
        )
        return (
            f"{self.samples_per_epoch} samples an epoch in batches of "
            f"{' and '.join(map(str, self.batch_sizes)) or config.train_batch_size} "
            f"→ {self.batches_per_epoch} batches{groups} → {length} → {self.total_steps} steps"
            + (f", {self.warmup_steps} of them warm-up" if self.warmup_steps else "")
        )


def count_steps(config: TrainConfig, data: Dataset) -> Steps:
    """The length of a run (``trainer.data.steps``), with what goes into it."""
    buckets = assign_buckets(data.items, config)
    samples: Counter[str] = Counter()
    for item in sorted(data.items, key=lambda item: buckets[item.key]):
        samples[str(buckets[item.key])] += item.repeats
    batches = batches_per_epoch(config, data, buckets)
    run = length_of(config, batches)
    whole_epoch = sum(samples.values())
    return Steps(
        images=sum(not item.is_reg for item in data.items),
        regularisation_images=sum(item.is_reg for item in data.items),
        samples_per_epoch=whole_epoch,
        buckets=dict(samples),
        batches_per_epoch=batches,
        steps_per_epoch=run.steps_per_epoch,
        epochs=run.total_epochs,
        total_steps=run.total_steps,
        warmup_steps=warmup_steps(config, run.total_steps),
        samples_seen=round(whole_epoch * run.total_steps / run.steps_per_epoch),
        batch_sizes=tuple(sorted({item.setting(config, "train_batch_size") for item in data.items})),
    )


def images_seen(run: Steps, data: Dataset) -> int:
    """How many training images a run sees, each as often as it is repeated; without regularization images."""
    own = sum(item.repeats for item in data.items if not item.is_reg)
    return round(run.samples_seen * own / run.samples_per_epoch)


def as_json(
    file: TrainFile, data: Dataset | None, output: str, findings: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything of a dry run, for scripts."""
    return {
        "file": str(file.path),
        "form": file.form,
        "output": output,
        "config": file.config.as_dict(),
        "origins": {name: file.origins.get(name, file.defaults) for name in SETTINGS},
        "translated": list(file.translated),
        "without_effect": list(file.without_effect),
        "unknown": list(file.unknown),
        "differs": [*file.differs, *(differences(file.config, data) if data else ())],
        "refused": list(file.refused),
        "notes": list(data.notes) if data else [],
        "steps": asdict(count_steps(file.config, data)) if data else None,
        "findings": findings,
    }


def show(console: Console, file: TrainFile, data: Dataset | None, output: str) -> None:
    """The dry run for people: the settings with their sources, the step arithmetic, and a note per key.

    A terminal shows the settings that something gives a value to; a pipe shows all.
    """
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    for name, value in file.config.as_dict().items():
        origin = file.origins.get(name)
        if origin is None and console.is_terminal:
            continue
        shown = "–" if value in (None, "") else short(value)
        table.add_row(Text(name), Text(shown), Text(origin or file.defaults), style="" if origin else "dim")
    if table.row_count:
        console.print(table)
    if left_out := len(SETTINGS) - table.row_count:
        say(console, f"and {left_out} settings with {file.defaults} (the same command with | cat lists them)")
    say(console, f"{clean_text(str(file.path))}: {file.form}; {file.defaults} fill what it leaves out")
    show_lines(console, file)
    if data is not None:
        steps = count_steps(file.config, data)
        for line in differences(file.config, data):
            say(console, f"differs from sd-scripts: {line}")
        for note in data.notes:
            say(console, f"note: {note}")
        reg = f", {steps.regularisation_images} regularisation images" if steps.regularisation_images else ""
        say(console, f"images: {steps.images}{reg}")
        say(console, "buckets: " + ", ".join(f"{size} ({count})" for size, count in steps.buckets.items()))
        say(console, f"steps: {steps.line(file.config)}")
    say(console, f"output: {output}")


def show_lines(console: Console, file: TrainFile) -> None:
    """What became of the lines of a file that are not used as they stand, one row each; unknown keys in one warning."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for title, lines in (
        ("translated", file.translated),
        ("no effect", file.without_effect),
        ("differs", file.differs),
        ("refused", file.refused),
    ):
        for line in lines:
            table.add_row(title, Text(line))
    if table.row_count:
        console.print(table)
    if file.unknown:
        settings = "1 setting" if len(file.unknown) == 1 else f"{len(file.unknown)} settings"
        say(console, f"warning: sd-scripts does not know {settings} of this file; without effect, as there:")
        for line in file.unknown:
            say(console, f"  {line}")


def show_findings(console: Console, errors: Sequence[ToolError], warnings: Sequence[str] = ()) -> None:
    """What is wrong, one finding a row, in the order in which a run would meet them; then what it would go on with."""
    if not errors and not warnings:
        say(console, "findings: none")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("finding", "what to do"):
        table.add_column(name, overflow="fold")
    for error in errors:
        table.add_row(Text(error.message), Text(error.hint))
    for line in warnings:
        table.add_row(Text(f"warning: {clean_text(line)}"), Text("training goes on"))
    console.print(table)
