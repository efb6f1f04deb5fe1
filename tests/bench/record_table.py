"""One large table of trainings on the miniatures: everything that decides about the search is replayed on it.

    python -m tests.bench.record_table record [--minutes 60] [--base mini-sd15]   # resumable; two threads
    python -m tests.bench.record_table state                                       # what is there, what is missing

A cell is one training: base × configuration × training seed.  Configurations are quasi-random points of the full
space (table.toml beside this file, and the length in images seen): the first 240 on mini-sd15, the first 120 of
them on mini-sdxl, twenty of them with two more training seeds; and, for each subject, the study's trial 0.  The three
demo subjects have equal shares: configuration n belongs to subject n modulo 3.  A cell is scored after a quarter, a
half, three quarters and the whole of its steps, each time with the weights rounded as a file has them: at the end on
all images of the study, before that on those of the first seed, which are among them.

Finished cells are appended to tests/bench/table/cells.jsonl, one line each, and are never recorded again; a line that
was cut by a kill is recorded anew.  The first line for a base and subject holds prompts and anchors, from which every
score can be computed again.  ``seconds`` has three numbers for each quarter: training, drawing, scoring; they are of
whatever else the machine did then, so compute is better counted in training samples and images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.images import SampledImage, Unchanged, prove_applied, sample
from evaluation.prompts import PromptSet
from evaluation.score import Evaluator, make_anchors
from evaluation.score.score import Score, score
from hpo.search.workbench import Workbench, load
from hpo.study import Choice, Inputs, Range, StudyConfig, StudyFolder, read_study
from tests.bench.bench_ranking import verdict
from trainer.adapters import Adapter
from trainer.adapters import adapter as adapters
from trainer.bases import write_subject
from trainer.config import TrainConfig
from trainer.errors import ConfigError, SettingsFailure
from trainer.events import Step
from trainer.files import append_line, read_records
from trainer.loop import loop

HERE = Path(__file__).parent / "table"
CELLS = HERE / "cells.jsonl"
DEFINITION = HERE / "table.toml"
BASES = {"mini-sd15": 240, "mini-sdxl": 120}
RESOLUTION = {"mini-sd15": 64, "mini-sdxl": 128}
SUBJECTS = ("character", "style", "object")
REPEATED, SEEDS = 20, (0, 1, 2)  # configurations with several training seeds
USUAL = -1  # the configuration number of trial 0; the subject then is the seed's
LENGTH = "images_seen"
IMAGES = Range(120, 1200, log=True)  # an epoch of the demo subjects is 240 images (60 steps of 4)
USUAL_IMAGES = 480
SOBOL_SEED = 14
QUARTERS = 4
TRAIN_SEED = 100
BLOCK = 12  # configurations recorded on one base before the next one


@dataclass(frozen=True, order=True)
class Cell:
    """One training.  ``config`` is the number of the quasi-random point; ``USUAL``: trial 0 of the subject."""

    base: str
    config: int
    seed: int
    subject: str

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.base, self.config, self.seed, self.subject)


def subject_of(config: int) -> str:
    return SUBJECTS[config % len(SUBJECTS)]


def wanted() -> list[Cell]:
    """Every cell, in the order of recording, so that the table is balanced wherever it stops."""
    cells = [Cell(base, USUAL, 0, subject) for base in BASES for subject in SUBJECTS]
    for start in range(0, max(BASES.values()), BLOCK):
        # mini-sdxl has half as many: half a block for each block of mini-sd15
        for base, count in BASES.items():
            share = BLOCK * count // max(BASES.values())
            first = start * share // BLOCK
            block = range(first, min(first + share, count))
            cells += [Cell(base, n, SEEDS[0], subject_of(n)) for n in block]
            repeated = [n for n in block if n < REPEATED]  # noise decides about confirmation: not at the end
            cells += [Cell(base, n, seed, subject_of(n)) for n in repeated for seed in SEEDS[1:]]
    return cells


@cache
def definition() -> StudyConfig:
    return read_study(DEFINITION)


@cache
def points() -> tuple[tuple[float, ...], ...]:
    """The quasi-random points: a scrambled Sobol sequence (Owen 1998), the length last."""
    space = definition().space
    engine = torch.quasirandom.SobolEngine(len(space) + 1, scramble=True, seed=SOBOL_SEED)
    return tuple(tuple(row) for row in engine.draw(max(BASES.values())).tolist())


def suggested(config: int) -> dict[str, Any]:
    """The proposal of a configuration, with its length in images seen."""
    if config == USUAL:
        return {**definition().baseline, LENGTH: USUAL_IMAGES}
    *places, length = points()[config]
    values = {
        p.name: _even(p.domain).from_unit(place) for p, place in zip(definition().space, places, strict=True)
    }
    return {**values, LENGTH: IMAGES.from_unit(length)}


def _even(domain: Range | Choice) -> Range | Choice:
    """A domain whose whole numbers have equal shares of the places; the ends of a rounded range have half of one."""
    if isinstance(domain, Range) and domain.whole:
        return Choice(tuple(range(int(domain.low), int(domain.high) + 1)))
    return domain


def config_of(bench: Workbench, values: Mapping[str, Any], seed: int) -> TrainConfig:
    """The settings of a cell: the length becomes steps of its effective batch."""
    given = {name: value for name, value in values.items() if name != LENGTH}
    config = bench.config(given, 0)
    effective = config.train_batch_size * config.gradient_accumulation_steps
    steps = max(QUARTERS, round(values[LENGTH] / effective))
    return config.with_values({"max_train_epochs": None, "max_train_steps": steps, "seed": TRAIN_SEED + seed})


def recorded(path: Path = CELLS) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """The finished cells."""
    rows = [row for row in read_records(path) if "config" in row]
    return {(row["base"], row["config"], row["seed"], row["subject"]): row for row in rows}


def scales(path: Path = CELLS) -> dict[tuple[str, str], dict[str, Any]]:
    """The row with prompts and anchors of each base and subject."""
    return {(row["base"], row["subject"]): row for row in read_records(path) if "anchors" in row}


@dataclass(frozen=True)
class Setup:
    """A base with a subject: its workbench, and the evaluators of the whole and of the quarters before it."""

    bench: Workbench
    whole: Evaluator
    before: Evaluator


class Recorder:
    """Records cells into the file; keeps the setups of one base."""

    def __init__(self, path: Path, place: Path) -> None:
        self.path, self.place = path, place
        self.setups: dict[tuple[str, str], Setup] = {}

    def setup(self, base: str, subject: str) -> Setup:
        """Loaded once, its anchors measured (they are the same each time) and written once."""
        found = self.setups.get((base, subject))
        if found is not None:
            return found
        self.setups = {key: s for key, s in self.setups.items() if key[0] == base}
        folder = self.place / f"{base}-{subject}"
        preset = "style" if subject == "style" else "character"
        study = read_study(DEFINITION, sets=[f'study.preset="{preset}"', f"resolution={RESOLUTION[base]}"])
        data = folder / "data"
        if not data.is_dir():
            write_subject(subject, data, study.train.resolution)
        bench = load(Inputs(base, data), study, StudyFolder(folder / "study"), lambda text: None)
        bench.measure_anchors(lambda text: None)
        short = bench.evaluator.on(replace(bench.prompts, seeds=bench.prompts.seeds[:1]))
        short = short.with_anchors(make_anchors(short, folder / "first seed"))
        setup = Setup(bench, bench.evaluator, short)
        known = scales(self.path).get((base, subject))
        if known is None:
            asked = [{"id": p.id, "text": p.text, "kind": p.kind} for p in bench.prompts.prompts]
            row = {"base": base, "subject": subject, "prompts": asked}
            row["images"] = [[p.id, seed] for p, seed in bench.prompts.jobs]
            row["images_before"] = [[p.id, seed] for p, seed in short.prompts.jobs]
            row["limits"] = bench.study.limits.as_dict()
            row["space"] = bench.study.space.describe() | {LENGTH: IMAGES.describe()}
            row["anchors"], row["anchors_before"] = bench.anchors.as_dict(), short.scale.as_dict()
            self._write(row)
        elif known["anchors"]["identity"] != bench.anchors.identity:
            raise ConfigError(f"{self.path} was recorded with other anchors", "give another --file")
        self.setups[base, subject] = setup
        return setup

    def record(self, cell: Cell) -> dict[str, Any]:
        """Train, draw and score one cell, and append it."""
        setup = self.setup(cell.base, cell.subject)
        bench = setup.bench
        values = suggested(cell.config)
        config = config_of(bench, values, cell.seed)
        row: dict[str, Any] = {"base": cell.base, "config": cell.config, "seed": cell.seed}
        row |= {"subject": cell.subject, "suggested": values, "steps": config.max_train_steps, "at": []}
        row |= {"seconds": [], "threads": torch.get_num_threads()}
        steps = config.max_train_steps
        marks = [math.ceil(steps * quarter / QUARTERS) for quarter in range(1, QUARTERS + 1)]
        lora = adapters.inject(bench.base, config)
        started = time.monotonic()
        try:
            for event in loop.train(config, bench.base, lora, bench.prepared(config)):
                if isinstance(event, Step) and event.step in marks:
                    trained = time.monotonic() - started
                    by = setup.whole if event.step == steps else setup.before
                    found, seconds = self._measured(by, lora, config)
                    row["at"].append(found)
                    row["seconds"].append([round(trained, 2), *seconds])
                    started = time.monotonic()
        except SettingsFailure as error:
            row["failed"] = error.reason
        finally:
            lora.remove()
        self._write(row)
        return row

    def _measured(
        self, by: Evaluator, lora: Adapter, config: TrainConfig
    ) -> tuple[dict[str, Any], list[float]]:
        """The score of the weights as they are, rounded as a file has them; they are put back afterwards."""
        before = lora.state()
        lora.round_to(config.save_precision)
        began = time.monotonic()
        images = sample(by.base, by.prompts, by.sampling)
        drawn = time.monotonic()
        try:
            prove_applied(images, by.scale.untouched)
            found = _row(score(images, by))
        except Unchanged:
            found = {"failed": "no_effect"}
        except SettingsFailure as error:  # invalid images
            found = {"failed": error.reason}
        scored = time.monotonic()
        found |= _seen(by.prompts, images)
        lora.load_state(before)
        return found, [round(drawn - began, 2), round(scored - drawn, 2)]

    def _write(self, row: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps(row, separators=(",", ":")))


def _row(found: Score) -> dict[str, Any]:
    """A score: what Optuna is told, its parts, the limits' amounts, and the raw cosines of every image."""
    row: dict[str, Any] = {
        "objective": _short(found.objective),
        "se": _short(found.objective_se),
        "following": _short(found.prompt_following),
        "likeness": _short(found.likeness),
    }
    if found.safety:
        row["limits"] = {name: _short(amount) for name, amount in found.safety.amounts.items()}
        row["diversity"] = found.safety.diversity and _short(found.safety.diversity)
    row["t"] = [_short(image.clip_t) for image in found.per_image]
    row["i"] = [_short(image.clip_i) for image in found.per_image]
    return row


def _seen(prompts: PromptSet, images: Sequence[SampledImage]) -> dict[str, Any]:
    """The checker's reading of the images, a digit an image: background right, place right."""
    text = {p.id: p.text for p in prompts.prompts}
    read = [verdict(image, text[image.prompt_id]) for image in images]
    return {"background": "".join(str(r[0]) for r in read), "place": "".join(str(r[1]) for r in read)}


def _short(value: float) -> float:
    return round(float(value), 4)


def record(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    until = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    done = recorded(args.file)
    left = [c for c in wanted() if c.key not in done and args.base in (None, c.base)]
    with tempfile.TemporaryDirectory() as temporary:
        recorder = Recorder(args.file, Path(temporary))
        for cell in left:
            if time.monotonic() >= until:
                break
            began = time.monotonic()
            row = recorder.record(cell)
            last = row["at"][-1].get("objective") if row["at"] else row.get("failed")
            print(*cell.key, row["steps"], last, f"{time.monotonic() - began:.1f} s", flush=True)


def state(path: Path = CELLS) -> str:
    """Markdown: how many cells there are of each base and subject, and how many are missing."""
    done = recorded(path)
    lines = ["| base | subject | cells | missing | minutes |", "|---|---|---|---|---|"]
    for base in BASES:
        for subject in SUBJECTS:
            asked = [c for c in wanted() if (c.base, c.subject) == (base, subject)]
            rows = [done[c.key] for c in asked if c.key in done]
            minutes = float(np.sum([np.sum(row["seconds"]) for row in rows])) / 60
            lines.append(f"| {base} | {subject} | {len(rows)} | {len(asked) - len(rows)} | {minutes:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    recorder = parts.add_parser("record")
    recorder.add_argument("--minutes", type=float, help="begin no cell after this time")
    recorder.add_argument("--base", choices=list(BASES))
    recorder.add_argument("--threads", type=int, default=2)
    recorder.set_defaults(do=record)
    shown = parts.add_parser("state")
    shown.set_defaults(do=lambda args: print(state(args.file)))
    for part in parts.choices.values():
        part.add_argument("--file", type=Path, default=CELLS)
    args = parser.parse_args(argv)
    args.do(args)


if __name__ == "__main__":
    main(sys.argv[1:])
