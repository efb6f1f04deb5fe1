"""The convergence alert, replayed on the recorded table: how often it is false, and whether it comes in time.

    python -m tests.bench.replay_convergence [--file CELLS] [--studies 200] [--trials 60]

Each study is a search of the tool (the sampler of ``replay_search.TOOL``) on a draw of ``table_surface``.  The alert is
what ``hpo.study.convergence`` says after each trial: *plateau* or *converged*, for the first time after trial n.

* It is **false** if going on to the end gains more than is worth it: the true score (no noise) of the best trial at
  the end is above that of the best trial at n by more than two standard errors of a score, the smallest difference that
  a user could see in the scores.
* It is **in time** if it comes after at most half as many trials again as the search needed.  A search needed the first
  k trials after which its best trial's true score is within one standard error of that at the end.

Random searches are replayed beside it: there, an alert is false by definition of what it says (proposals focus).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from hpo.search.samplers import startup_trials
from hpo.study.convergence import MIN_TRIALS, TrialPoint, detect
from tests.bench.record_table import CELLS, LENGTH, QUARTERS, SUBJECTS, recorded
from tests.bench.replay_search import TOOL, USUAL, Way, sampler_of
from tests.bench.table_surface import Surface, Table, coordinates, domains

ALERTS = ("plateau", "converged")


@dataclass(frozen=True)
class Replayed:
    """``at``: the first trial with an alert; None without one.  ``true_N``: the best trial's score without noise."""

    at: int | None
    true_N: tuple[float, ...]

    def is_false(self, worth: float) -> bool:
        return self.at is not None and self.true_N[-1] - self.true_N[self.at - 1] > worth

    def needed(self, near: float) -> int:
        """Trials after which nothing was gained any more."""
        return next(n for n, value in enumerate(self.true_N, 1) if self.true_N[-1] - value <= near)


def replay(way: Way, surface: Surface, trials: int, se: float, seed: int) -> Replayed:
    """One study of so many whole trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng([seed, 13])
    distributions = {name: domain.distribution() for name, domain in domains().items()}
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(USUAL)
    points: list[TrialPoint] = []
    true: list[float] = []
    at = None
    for number in range(trials):
        study.sampler = sampler_of(way, seed, study, trials)
        trial = study.ask(distributions)
        value = surface.run(trial.params, rng).score(QUARTERS)
        study.tell(trial, value)
        points.append(TrialPoint(number, value, se, tuple(coordinates(trial.params))))
        best = max(points, key=lambda p: p.value).number
        true.append(surface.score(study.get_trials(deepcopy=False)[best].params))
        if at is None and number + 1 >= MIN_TRIALS:
            verdict = detect(points, dimensions=len(domains()), startup=startup_trials(trials))
            if verdict is not None and verdict.level in ALERTS:
                at = number + 1
    return Replayed(at, tuple(true))


def standard_error(path: Path) -> float:
    """The median standard error of whole runs that learned something."""
    found = [
        row["at"][-1]["se"]
        for key, row in recorded(path).items()
        if key[0] == "mini-sd15" and row["at"] and row["at"][-1].get("objective", 0) > 0.1
    ]
    return float(np.median(found))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=CELLS)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--trials", type=int, default=60)
    args = parser.parse_args(argv)
    model, se = Table(args.file).model, standard_error(args.file)
    draws = -(-args.studies // (2 * len(SUBJECTS)))  # two seeds each
    surfaces = [Surface(model, s, d) for d in range(draws) for s in range(len(SUBJECTS))]
    print(f"{model.cells.runs} cells, length {LENGTH}; standard error {se:.3f}; {args.trials} trials\n")
    print(
        "| search | studies | alerts | false | first alert after (median) | in time |\n|---|---|---|---|---|---|"
    )
    for way in (TOOL, Way("random", "random")):
        found = [
            replay(way, surfaces[n // 2 % len(surfaces)], args.trials, se, n) for n in range(args.studies)
        ]
        alerts = [f for f in found if f.at is not None]
        false = sum(f.is_false(2 * se) for f in found)
        due = [f for f in found if 1.5 * max(f.needed(se), MIN_TRIALS) <= args.trials]
        timely = sum(f.at is not None and f.at <= 1.5 * max(f.needed(se), MIN_TRIALS) for f in due)
        after = f"{np.median([f.at for f in alerts]):.0f}" if alerts else "–"
        print(
            f"| {way.name} | {len(found)} | {len(alerts)} | {false} ({false / len(found):.1%}) | {after} "
            f"| {timely} of {len(due)} ({timely / max(1, len(due)):.0%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
