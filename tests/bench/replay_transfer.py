"""What a transfer is worth on the recorded table: fills the table of docs/transfer.md.

    python -m tests.bench.replay_transfer [--file CELLS] [--draws 5] [--seeds 3] [--trials 30] [--write]

A search of the tool runs on a draw of mini-sd15 (``table_surface``), with the compute of so many whole trials.  Its
winner is judged on the draw of mini-sdxl that belongs to it: as the rules map it, and after four target trials of the
real model (``hpo.transfer.probes``).  A direct search on mini-sdxl has the compute of both: its trials cost as many
times more as measured in the table's seconds, or 8.4 times, as SDXL's do in multiplications.  Scores are without noise;
the intervals are over pairs of draw and subject, by bootstrap, with the search seeds of a pair averaged first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.study import Space, StudyConfig
from hpo.study.space.space import Parameter
from hpo.transfer import transfer
from hpo.transfer.plan import DatasetFigures
from hpo.transfer.probes.prior import Prior, SourceTrial, decades, place, pool
from hpo.transfer.probes.shifted import Observed, TargetModel
from hpo.transfer.probes.surrogate import fit
from hpo.transfer.profile import read_profile
from tests.bench.bench_probe_grid import DOCS, between
from tests.bench.record_table import CELLS, IMAGES, LENGTH, QUARTERS, SUBJECTS, definition, recorded
from tests.bench.replay_search import SHOWN, TOOL, USUAL, Ended, image_cost, interval, search
from tests.bench.table_surface import BROKEN, Surface, Table, domains
from trainer.files import write_atomic

TARGET_TRIALS = 4
MULTIPLICATIONS = (
    8.4  # a training sample of SDXL at 1024 px against one of SD1.5 at 512 px (docs/transfer.md)
)
FIGURES = DatasetFigures(images=24, samples=240)  # as the demo subjects
SE = 0.1  # of a score, as the prior is told (table: standard errors of 46 images are 0.03 to 0.1)
BEGIN, END = "<!-- replayed transfer: begin -->", "<!-- replayed transfer: end -->"
Values = Mapping[str, Any]


@cache
def study() -> StudyConfig:
    """The table's space as a study, with the length in images seen."""
    table = definition()
    train = table.train.with_values({"max_train_epochs": None, "max_train_steps": 120})
    return replace(table, train=train, space=Space((*table.space, Parameter(LENGTH, IMAGES))), baseline=USUAL)


def mapped(values: Values) -> dict[str, Any]:
    """The settings for mini-sdxl by the rules, in the table's terms.  What is outside the table is its edge."""
    own = study()
    plan = transfer(own.config(values), FIGURES, read_profile("mini-sdxl"))
    found = own.space.proposal(plan.config.as_dict(), fallback=values)
    for name, domain in domains().items():
        if not domain.holds(found[name]) and hasattr(domain, "low"):
            found[name] = min(max(found[name], domain.low), domain.high)
    return found


def by_target_trials(source: Ended, target: Surface, rng: np.random.Generator, seed: int) -> dict[str, Any]:
    """The winner, the usual settings, and the two with the highest expected gain; the highest mean is chosen."""
    own, winner = study(), source.settings
    scores = [max(score, -0.25) for _, score in source.tried]  # as the prior raises very low scores
    trials = [
        SourceTrial(n, values, y, SE)
        for n, ((values, _), y) in enumerate(zip(source.tried, scores, strict=True))
    ]
    x_ND = np.array([place(own, t.suggested) for t in trials])
    prior = Prior(own, tuple(trials), fit(x_ND, scores, [SE] * len(scores)))
    model = TargetModel(prior.surrogate, decades(own))
    tried, measured = [winner, USUAL], []
    while True:
        while len(measured) < len(tried):
            score = target.run(mapped(tried[len(measured)]), rng).score(QUARTERS)
            measured.append(max(score, prior.floor))
        places = np.array([place(own, one) for one in tried])
        after = model.after(Observed(places, measured, [SE] * len(measured)))
        if len(tried) == TARGET_TRIALS:
            return mapped(tried[int(np.argmax(after.predict(places)[0]))])
        every = list(pool(own, winner, seed))
        tried.append(every[int(np.argmax(after.gains(np.array([place(own, one) for one in every]))))])


@dataclass(frozen=True)
class Case:
    """One search on mini-sd15, and the surface of mini-sdxl that belongs to its draw."""

    source: Ended
    target: Surface
    trials: int
    cost: float  # of an image, in training samples
    factor: float  # of a trial on mini-sdxl, in seconds
    seed: int

    def direct(self, factor: float) -> Values:
        trials = self.trials / factor + TARGET_TRIALS
        return search(TOOL, self.target, trials, self.cost, 500 + self.seed).settings

    def among(self, share: float) -> Values:
        """A random trial of the search, from the worst ``share``."""
        rng = np.random.default_rng([self.seed, 3])
        ranked = sorted(self.source.tried, key=lambda one: one[1])
        return ranked[int(rng.integers(max(1, round(share * len(ranked)))))][0]


WAYS: Mapping[str, Callable[[Case], Values]] = {
    "usual settings": lambda case: USUAL,
    "rules": lambda case: mapped(case.source.settings),
    f"rules + {TARGET_TRIALS} target trials": lambda case: by_target_trials(
        case.source, case.target, np.random.default_rng([case.seed, 5]), case.seed
    ),
    "direct search, equal seconds": lambda case: case.direct(case.factor),
    f"direct search, a trial costs {MULTIPLICATIONS} times as much": lambda case: case.direct(
        MULTIPLICATIONS
    ),
    "a random trial, by the rules": lambda case: mapped(case.among(1.0)),
    "one of the worst quarter, by the rules": lambda case: mapped(case.among(0.25)),
}


def factor_of(path: Path) -> float:
    """Seconds of a trial on mini-sdxl over those on mini-sd15: the median over cells that both have."""
    rows = recorded(path)
    found = []
    for key, row in rows.items():
        other = rows.get(("mini-sd15", *key[1:]))
        if key[0] == "mini-sdxl" and other and len(row["seconds"]) == len(other["seconds"]) == QUARTERS:
            found.append(_seconds(row) / _seconds(other))
    return float(np.median(found))


def _seconds(row: Mapping[str, Any]) -> float:
    """Of a training and its last images."""
    return float(sum(part[0] for part in row["seconds"]) + sum(row["seconds"][-1][1:]))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="into docs/transfer.md")
    args = parser.parse_args(argv)
    model, cost, factor = Table(args.file).model, image_cost(args.file), factor_of(args.file)
    print(
        f"{model.cells.runs} runs; a trial on mini-sdxl takes {factor:.1f} times as long; {SHOWN} images each"
    )
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    best = []
    for draw in range(args.draws):
        for subject in range(len(SUBJECTS)):
            source = Surface(model, subject, draw)
            target = Surface(model, subject, draw, "mini-sdxl")
            best.append(target.best)
            scores: dict[str, list[float]] = {name: [] for name in WAYS}
            for number in range(args.seeds):
                seed = (draw * len(SUBJECTS) + subject) * args.seeds + number
                ended = search(TOOL, source, args.trials, cost, seed)
                case = Case(ended, target, args.trials, cost, factor, seed)
                for name, way in WAYS.items():
                    scores[name].append(max(target.score(way(case)), BROKEN))
            for name, values in scores.items():
                found[name].append(values)
            print(
                draw,
                SUBJECTS[subject],
                {n: round(float(np.mean(v)), 3) for n, v in scores.items()},
                flush=True,
            )
    text = table({name: np.array(values).mean(1) for name, values in found.items()}, float(np.mean(best)))
    print(text)
    if args.write:
        write_atomic(DOCS, between(DOCS.read_text(encoding="utf-8"), BEGIN, END, text))


def table(found: Mapping[str, NDArray[np.float64]], best: float) -> str:
    """Markdown.  ``found``: (pairs,) scores of each way."""
    rules = found["rules"]
    lines = ["| settings | score (95 %) | over the rules (95 %) |", "|---|---|---|"]
    lines.append("| untrained | 0.000 | |")
    for name, values in found.items():
        low, high = interval(values)
        more = ""
        if name != "rules":
            apart = values - rules
            more = f"{apart.mean():+.3f} ({interval(apart)[0]:+.3f} … {interval(apart)[1]:+.3f})"
        lines.append(f"| {name} | {values.mean():.3f} ({low:.3f} … {high:.3f}) | {more} |")
    lines.append(f"| the best there is | {best:.3f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
