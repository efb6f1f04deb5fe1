"""``hpo plan``: predict whether a training run fits into GPU memory, and with which settings.  Needs no GPU.

Owns the command's texts and tables.  Does not own the prediction (``trainer.memory.footprint``), the choice
of memory-saving settings (``trainer.memory.stacks``) or the users' measurements (``hpo.cli.plantable``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpo.cli import plantable
from hpo.cli.plantable import GB, Cell
from hpo.terminal import json_text, say, short
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.kohya import read_train_file
from trainer.overrides import read_setting

if TYPE_CHECKING:
    from trainer.memory import Attempt, BaseFacts, Footprint, PhasePlan, Stack

USUAL_GB = 16.0  # of --vram
# The limits of a prediction; shown under every plan.
SAYS = (
    "1 GB = 10⁹ bytes. CUDA context and cuBLAS are estimates, everything else is traced (docs/memory.md)",
    "other phases: networks that a phase does not need leave the GPU where they do not fit together; not included: "
    "other programs on the GPU",
)


@dataclass(frozen=True)
class PlanRequest:
    """The arguments of ``hpo plan``."""

    file: Path | None = None
    base: str | None = None
    vram: float = USUAL_GB
    sets: tuple[str, ...] = ()
    table: bool = False
    as_json: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return dict(map(read_setting, self.sets))


def plan(request: PlanRequest, console: Console, echo: Callable[[str], None]) -> None:
    """Print the prediction and the changes that fit.  If nothing fits, raises ConfigError after the prediction."""
    if request.table:
        _table(request, console, echo)
        return
    from trainer.memory import footprint, phases, stacks

    config = read_settings(request)
    facts = footprint.base_facts(config.pretrained_model_name_or_path)
    if request.file is None and "resolution" not in request.settings:
        config = config.with_values({"resolution": facts.native_resolution_px})

    vram_bytes = int(request.vram * GB)
    if request.as_json:
        stack = stacks.choose(config, facts, vram_bytes)
        given = footprint.predict(config, facts)
        found = phases(stack.config, facts, vram_bytes)
        echo(json_text(as_json(request, facts, given, stack, found)))
        return
    say(console, f"predicting the memory use of {facts.name} …")
    given = footprint.predict(config, facts)
    show_footprint(console, f"{facts.name}, settings as given", config, given)
    limit = _hundredths(vram_bytes * stacks.SAFE_SHARE, math.floor)
    say(console, f"candidates, cheapest change first; {limit} of {request.vram:g} GB may be used:")
    stack = stacks.choose(
        config, facts, vram_bytes, lambda tried: console.print(attempt_row(tried, console.width))
    )
    show_stack(console, request.vram, given, stack)
    show_phases(console, phases(stack.config, facts, vram_bytes))
    for line in SAYS:
        say(console, line)


def attempt_row(tried: Attempt, width: int) -> Text:
    """A row of the table of candidates, printed as soon as its peak is known."""
    verdict = "fits" if tried.fits else "too much"
    wide = max(20, min(56, width - 24))
    peak = _hundredths(tried.peak_bytes, math.floor if tried.fits else math.ceil)
    row = f"  {tried.words:<{wide}} {peak:>7} GB  {verdict}"
    return Text(row, style="green" if tried.fits else "dim")


def _hundredths(size_bytes: float, rounded: Callable[[float], int]) -> str:
    """GB with two digits. What is too much is rounded up and the limit down, so that both differ as shown."""
    return f"{rounded(size_bytes / GB * 100) / 100:.2f}"


def read_settings(request: PlanRequest) -> TrainConfig:
    """The settings from the file, else the defaults with base and ``--set``.  Raises ConfigError without either."""
    places = {"pretrained_model_name_or_path": request.base} if request.base else {}
    if request.file is not None:
        return read_train_file(request.file, sets=request.sets, places=places).require_all().config
    if not request.base:
        raise ConfigError("no base model and no settings file given", "for example: hpo plan --base sdxl")
    return TrainConfig().with_values({**places, **request.settings})


def as_json(
    request: PlanRequest, facts: BaseFacts, given: Footprint, stack: Stack, found: Sequence[PhasePlan]
) -> dict[str, Any]:
    """The whole plan as JSON, for scripts."""
    return {
        "base": facts.name,
        "family": facts.family,
        "vram_bytes": int(request.vram * GB),
        "given": _footprint_json(given),
        "tried": [
            {"settings": dict(tried.values), "peak_bytes": tried.peak_bytes, "fits": tried.fits}
            for tried in stack.tried
        ],
        "moves": [
            {"key": move.key, "old": move.old, "new": move.new, "reason": move.reason} for move in stack.moves
        ],
        "stack": _footprint_json(stack.footprint),
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.peak_bytes,
                "networks": dict(phase.networks),
                "held_bytes": phase.held_bytes,
                "work_bytes": phase.work_bytes,
                "how": phase.how,
            }
            for phase in found
        ],
        "config": stack.config.as_dict(),
    }


def _footprint_json(found: Footprint) -> dict[str, Any]:
    return {
        "peak_bytes": found.peak_bytes,
        "allocated_bytes": found.allocated_bytes,
        "reserved_bytes": found.reserved_bytes,
        "parts": dict(found.parts),
        "bucket_px": list(found.bucket_px),
        "images_at_once": found.images_at_once,
    }


def show_footprint(console: Console, title: str, config: TrainConfig, found: Footprint) -> None:
    """Print the breakdown for the largest bucket and batch."""
    width, height = found.bucket_px
    say(
        console,
        f"{title}: {config.network_type} dim {config.network_dim}, "
        f"{found.images_at_once} × {width}×{height} px at once",
    )
    table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in found.parts.items():
        table.add_row(Text(name), f"{size / GB:.2f} GB")
    table.add_row(Text("peak"), f"{found.peak_bytes / GB:.2f} GB", style="bold")
    console.print(table)


def show_stack(console: Console, vram_gb: float, given: Footprint, stack: Stack) -> None:
    """Print what is enabled already, what has to change, and the new peak."""
    for line in stack.standing:
        say(console, line)
    if not stack.moves:
        say(console, f"fits into {vram_gb:g} GB without changes: {given.peak_bytes / GB:.2f} GB")
    else:
        say(console, f"to fit into {vram_gb:g} GB, smallest slowdown first:")
        for move in stack.moves:
            say(console, f"  {move.key}: {_shown(move.old)} → {_shown(move.new)} – {move.reason}")
        say(console, f"peak with these changes: {stack.footprint.peak_bytes / GB:.2f} GB")
        show_footprint(console, "with these settings", stack.config, stack.footprint)


def show_phases(console: Console, found: Sequence[PhasePlan]) -> None:
    """Print the peak of each phase of the work, and which is the largest."""
    say(console, "each phase, with the networks that it needs:")
    most = max(phase.peak_bytes for phase in found)
    for phase in found:
        names = " + ".join(phase.networks)
        how = f" ({phase.how})" if phase.how else ""
        row = f"  {phase.name:<14}{phase.peak_bytes / GB:>6.2f} GB  {names}{how}"
        console.print(Text(row, style="bold" if phase.peak_bytes == most else ""))


def _shown(value: Any) -> str:
    return "unset" if value is None else short(value)


# The users' table


def _table(request: PlanRequest, console: Console, echo: Callable[[str], None]) -> None:
    cells = []
    given = {
        "FILE": request.file,
        "--base": request.base,
        "--vram": request.vram != USUAL_GB,
        "--set": request.sets,
    }
    if (unused := [name for name, value in given.items() if value]) and not request.as_json:
        say(console, f"warning: --table has settings of its own; without effect: {', '.join(unused)}")
    if not request.as_json:
        say(
            console,
            f"predicting {sum(len(row.measured_gb) for row in plantable.ROWS)} runs, one after the other …",
        )
    for cell in plantable.predicted_cells():
        cells.append(cell)
        if not request.as_json:
            say(console, f"{cell.row.name}, batch {cell.batch}: {cell_text(cell)}")
    if request.as_json:
        echo(json_text([_cell_json(cell) for cell in cells]))
        return
    console.print(table_of(cells))
    judged = [cell for cell in cells if not cell.row.is_full]
    above = [cell for cell in judged if not cell.is_below]
    say(
        console,
        f"{len(judged) - len(above)} of {len(judged)} LoRA and LoCon predictions are at or below "
        "the users' measurement",
    )
    say(console, f"assumed in every row: {plantable.ASSUMED}; full fine-tune: {plantable.ASSUMED_FULL}")


def cell_text(cell: Cell) -> str:
    """Predicted / measured, in GB."""
    mark = " (prediction only)" if cell.row.is_full else "" if cell.is_below else " – above"
    return f"{cell.predicted_bytes / GB:.1f} / {cell.measured_gb:.1f}{mark}"


def _short(cell: Cell) -> str:
    mark = "*" if cell.row.is_full else "" if cell.is_below else "!"
    return f"{cell.predicted_bytes / GB:.1f}/{cell.measured_gb:.1f}{mark}"


def table_of(cells: list[Cell]) -> Table:
    """The table with prediction / measurement in each cell.  Fits 80 columns."""
    batches = sorted({cell.batch for cell in cells})
    title = "SDXL 1024²: predicted / measured by users, GB (* prediction only, ! above)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("training")
    for batch in batches:
        table.add_column(f"batch {batch}", no_wrap=True)
    rows = {cell.row.name: cell.row for cell in cells}
    for name in rows:
        of_row = {cell.batch: _short(cell) for cell in cells if cell.row.name == name}
        table.add_row(name, *(of_row.get(batch, "") for batch in batches))
    return table


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "training": cell.row.name,
        "batch": cell.batch,
        "measured_gb": cell.measured_gb,
        "predicted_bytes": cell.predicted_bytes,
        "parts": dict(cell.parts),
        "prediction_only": cell.row.is_full,
        "assumed": cell.row.assumed,
    }
