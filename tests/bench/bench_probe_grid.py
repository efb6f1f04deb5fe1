"""Records one dense grid of short and whole runs, and compares the two probe designs by replaying it.

    python -m tests.bench.bench_probe_grid record --work DIR [--only mini-sd15] [--data DIR]
    python -m tests.bench.bench_probe_grid replay            # the table of docs/transfer.md, written into it

``record`` runs every missing cell (base × horizon × rate × text encoders × seed) and appends it to
tests/data/probe_grid.jsonl.  Finished cells are never repeated, and an interrupted one is resumed.  ``replay``
simulates both designs on the short runs of the target (one seed), starting from a transferred rate that is
wrong by a number of octaves, and evaluates their choices with the target's whole runs of the other seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpo.transfer.probes.design import DESIGNS, Design, Probe, ProbeScore, Scope, horizon_shift
from tests.places import ROOT
from trainer.files import append_line, read_records, write_atomic

GRID = Path(__file__).parent.parent / "data" / "probe_grid.jsonl"
DOCS = ROOT / "docs" / "transfer.md"
BEGIN, END = "<!-- designs of target trials: begin -->", "<!-- designs of target trials: end -->"
BASES = {"mini-sd15": "source", "mini-sdxl": "target"}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TEXT_RATIO = 0.5  # × learning_rate, if the text encoders are trained
HORIZONS = (0.25, 1.0)
SEEDS = (7000, 7001)
EPOCHS = 1
OFFSETS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # errors of the transferred rate in octaves


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    base: str
    horizon: float
    rate: float
    text_encoder: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """A cell's score and its scores by prompt."""

    score: float
    prompts: tuple[float, ...]


def wanted(bases: Sequence[str]) -> Iterator[Cell]:
    """All cells, the cheapest base first."""
    for base, seed, horizon, text, rate in itertools.product(bases, SEEDS, HORIZONS, (True, False), RATES):
        yield Cell(base, horizon, rate, text, seed)


def read_grid(path: Path = GRID) -> dict[Cell, Scored]:
    names = [f.name for f in dataclasses.fields(Cell)]
    return {
        Cell(**{name: row[name] for name in names}): Scored(row["score"], tuple(row["prompts"]))
        for row in read_records(path)
    }


# Recording


def record(args: argparse.Namespace) -> None:
    for base in [args.only] if args.only else list(BASES):
        missing = [cell for cell in wanted([base]) if cell not in read_grid(args.file)]
        print(f"{base}: {len(missing)} cells are missing", flush=True)
        if missing:
            _record(base, missing, args)


def _record(base: str, cells: Sequence[Cell], args: argparse.Namespace) -> None:
    from hpo.search.trial import run_trial
    from hpo.search.workbench import load
    from hpo.study.config import Inputs, find_study, read_study
    from hpo.study.folder import StudyFolder
    from hpo.study.result import COMPLETE, INFEASIBLE, write_params
    from hpo.study.standing import by_prompt
    from tests.tiny_search import Recorder

    study = read_study(find_study(None, base), sets=args.sets)
    bench = load(Inputs(base, args.data), study, StudyFolder(args.work / base), print)
    bench.measure_anchors(print)
    for cell in cells:
        number = list(wanted([base])).index(cell)
        whole = bench.config({**study.baseline, "max_train_epochs": EPOCHS}, number)
        samples = sum(item.repeats for item in bench.data.items)
        steps = max(1, round(cell.horizon * EPOCHS * samples / whole.train_batch_size))
        config = whole.with_values(
            {
                "learning_rate": cell.rate,
                "text_encoder_lr": TEXT_RATIO * cell.rate if cell.text_encoder else 0.0,
                "lr_scheduler": "constant",
                "max_train_steps": steps,
                "seed": cell.seed,
            }
        )
        folder = bench.folder.trial(number)
        write_params(folder, dataclasses.asdict(cell), (), config)
        result = run_trial(bench, folder, config, Recorder())
        if result.state not in (COMPLETE, INFEASIBLE):
            raise SystemExit(f"{cell}: {result.reason}: {result.message}")
        prompts = by_prompt(folder.metrics, bench.anchors) or (0.0,) * len(bench.prompts.prompts)
        row = dataclasses.asdict(cell) | {
            "score": round(result.value if result.state == COMPLETE else 0.0, 5),  # type: ignore[arg-type]
            "se": round(result.se or 0.0, 5),
            "steps": steps,
            "prompts": [round(value, 4) for value in prompts],
        }
        append_line(args.file, json.dumps(row))
        print(json.dumps({k: v for k, v in row.items() if k != "prompts"}), flush=True)


# Replaying


@dataclasses.dataclass(frozen=True)
class Curves:
    """The grid of one base, horizon and seed as curves over log2 rate, linearly interpolated."""

    cells: Mapping[Cell, Scored]
    base: str
    horizon: float
    seed: int

    def at(self, rate: float, text_encoder: bool) -> Scored:
        known = sorted(c.rate for c in self.cells if self._is_mine(c, text_encoder))
        rows = [self.cells[Cell(self.base, self.horizon, r, text_encoder, self.seed)] for r in known]
        x = np.log2(known)
        place = np.clip(np.log2(rate), x[0], x[-1])
        score = float(np.interp(place, x, [row.score for row in rows]))
        by_prompt = zip(*(row.prompts for row in rows), strict=True)
        return Scored(score, tuple(float(np.interp(place, x, of_one)) for of_one in by_prompt))

    def _is_mine(self, cell: Cell, text_encoder: bool) -> bool:
        mine = (self.base, self.horizon, self.seed, text_encoder)
        return (cell.base, cell.horizon, cell.seed, cell.text_encoder) == mine

    def best(self) -> tuple[float, float]:
        """(score, log2 rate) of the best recorded point."""
        own = [
            (s.score, float(np.log2(c.rate)))
            for c, s in self.cells.items()
            if self._is_mine(c, c.text_encoder)
        ]
        return max(own)

    def outcome(self, probe: Probe, rate: float) -> ProbeScore:
        found = self.at(rate * 2**probe.octaves, probe.text_encoder)
        spread = float(np.std(found.prompts, ddof=1) / np.sqrt(len(found.prompts)))
        return ProbeScore(probe, found.score, spread, found.prompts)


@dataclasses.dataclass(frozen=True)
class Row:
    """The cost of a design over all starting points: regret on whole runs of another seed, and number of probes."""

    name: str
    probes: float
    regret: tuple[float, ...]  # by offset, mean over seeds
    changed: float  # share of the starting points at which a setting was changed

    @property
    def mean(self) -> float:
        return float(np.mean(self.regret))


def replay(
    cells: Mapping[Cell, Scored],
    design: Design | None,
    budget: int,
    *,
    horizon: bool = False,
    length: float = 0.25,
) -> Row:
    """Replay one design with runs of a share of the whole length.  None keeps the transferred settings."""
    regrets, probes, changed = [], [], []
    for offset in OFFSETS:
        of_offset = []
        for seed, other in itertools.permutations(SEEDS, 2):
            short, whole = Curves(cells, "mini-sdxl", length, seed), Curves(cells, "mini-sdxl", 1.0, other)
            optimum = whole.best()[1]
            rate = 2 ** (optimum + offset)
            decided, made = Probe(), 0
            if design is not None:
                scope = Scope(budget)
                outcomes: list[ProbeScore] = []
                while (probe := design.next(outcomes, scope)) is not None:
                    outcomes.append(short.outcome(probe, rate))
                shift = _shift(cells, seed, design, scope) if horizon else None
                decided, made = design.decide(outcomes, scope, shift).probe, len(outcomes)
            chosen = whole.at(rate * 2**decided.octaves, decided.text_encoder).score
            of_offset.append(max(0.0, whole.best()[0] - chosen))
            probes.append(made)
            changed.append(decided != Probe())
        regrets.append(float(np.mean(of_offset)))
    name = "no target trials" if design is None else design.name + (", horizon corrected" if horizon else "")
    return Row(name, float(np.mean(probes)), tuple(regrets), float(np.mean(changed)))


def _shift(cells: Mapping[Cell, Scored], seed: int, design: Design, scope: Scope) -> float | None:
    """The horizon shift, measured on the source around its best rate."""
    curves = [Curves(cells, "mini-sd15", horizon, seed) for horizon in HORIZONS]
    rate = 2 ** curves[1].best()[1]
    both: list[list[ProbeScore]] = []
    for curve in curves:
        outcomes: list[ProbeScore] = []
        while (probe := design.next(outcomes, scope)) is not None:
            outcomes.append(curve.outcome(probe, rate))
        both.append(outcomes)
    return horizon_shift(both[0], both[1])


def compare(cells: Mapping[Cell, Scored]) -> list[Row]:
    """Replay all designs on one recorded grid."""
    ladder, grid = DESIGNS["ladder"], DESIGNS["grid"]
    return [
        replay(cells, None, 0),
        replay(cells, ladder, 6),
        replay(cells, grid, 8),
        replay(cells, grid, 8, horizon=True),
    ]


def better_design(rows: Sequence[Row]) -> str:
    """The design with the smallest mean regret at its number of probes; for ties, the one with fewer probes."""
    own = [row for row in rows if row.probes > 0]
    return min(own, key=lambda row: (round(row.mean, 4), row.probes)).name.split(",")[0]


def table(cells: Mapping[Cell, Scored]) -> str:
    """The comparison as Markdown, or a line on the missing cells."""
    missing = {base: sum(cell not in cells for cell in wanted([base])) for base in BASES}
    if any(missing.values()):
        text = ", ".join(f"{count} cells of {base}" for base, count in missing.items() if count)
        return f"Not recorded yet: {text} (`python -m tests.bench.bench_probe_grid record --work DIR`)."
    rows = compare(cells)
    head = " | ".join(f"{offset:+g}" for offset in OFFSETS)
    lines = [f"| design | target trials | {head} | mean | changed |", "|---" * (len(OFFSETS) + 4) + "|"]
    for row in rows:
        values = " | ".join(f"{value:.3f}" for value in row.regret)
        lines.append(f"| {row.name} | {row.probes:.1f} | {values} | {row.mean:.3f} | {row.changed:.0%} |")
    lines += ["", f"Best design: {better_design(rows)}."]
    return "\n".join(lines)


def between(text: str, begin: str, end: str, new: str) -> str:
    """``text`` with the part between two markers replaced."""
    head, rest = text.split(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record")
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--data", type=Path)
    one.add_argument("--only", choices=list(BASES))
    one.add_argument("--file", type=Path, default=GRID)
    one.add_argument(
        "--set", dest="sets", action="append", default=[], help="as for hpo search; for short test runs"
    )
    one.set_defaults(run=record)
    two = commands.add_parser("replay")
    two.set_defaults(run=lambda args: _write_docs())
    args: Any = parser.parse_args(arguments)
    args.run(args)


def _write_docs() -> None:
    found = table(read_grid())
    print(found)
    write_atomic(DOCS, between(DOCS.read_text(encoding="utf-8"), BEGIN, END, found))


if __name__ == "__main__":
    main(sys.argv[1:])
