"""Target trials on simulated surfaces: do a few trials chosen by the model find better settings than the rules alone?

    python -m tests.bench.bench_target_model            # fills the table of docs/transfer.md (15 minutes on one thread)

A surface is a parabola over five settings, the rate the most important one.  The target's has its best rate ``shift``
decades away from where the rules put it, other curvatures and a slightly different top in the other settings.  A search
of 30 trials (a third at random, then around the best) ends with its measured best, which the rules map.  The regret is
the best true score of the target minus that of the chosen settings; lower is better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpo.transfer.probes.shifted import Observed, TargetModel
from hpo.transfer.probes.surrogate import fit
from tests.bench.bench_probe_grid import between
from tests.places import ROOT
from trainer.files import write_atomic

D = 5
DECADES = 2.0  # of the rate, from one edge of the space to the other
DECADE_D = np.array([1 / DECADES, 0, 0, 0, 0])
CURVES_D = np.array([4.0, 0.6, 0.4, 0.3, 0.1])
SHIFTS = (-0.6, -0.3, 0.0, 0.3, 0.6)
NOISES = (0.02, 0.06)  # standard deviation of a score; the best trials of a search differ by about 0.05
SEEDS = 24
DOCS = ROOT / "docs" / "transfer.md"
BEGIN, END = "<!-- simulated target trials: begin -->", "<!-- simulated target trials: end -->"
Surface = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One search and the surface of its target."""

    x_ND: np.ndarray
    y_N: np.ndarray
    target: Surface
    pool_MD: np.ndarray
    best: float
    noise: float
    random: np.random.Generator

    def measured(self, x_D: np.ndarray) -> float:
        return float(self.target(x_D) + self.random.normal(0, self.noise))

    def regret(self, x_D: np.ndarray) -> float:
        return self.best - float(self.target(x_D))

    @property
    def winner(self) -> np.ndarray:
        return np.asarray(self.x_ND[int(np.argmax(self.y_N))])


def surface(top_D: np.ndarray, height: float, steep: float) -> Surface:
    def score(x_D: np.ndarray) -> np.ndarray:
        away = x_D - top_D
        bent = 0.3 * away[..., 0] * away[..., 1]
        return np.asarray(height - steep * (CURVES_D * away**2).sum(-1) - bent)

    return score


def case(seed: int, shift: float, noise: float, trials: int = 30, places: int = 384) -> Case:
    random = np.random.default_rng(seed)
    top_D = np.array([0.5, 0.3, 0.6, 0.5, 0.5]) + random.normal(0, [0.12, 0.2, 0.2, 0.2, 0.2])
    apart_D = random.normal(0, 0.1, D) * np.array([0, 1, 1, 1, 1])
    source, target = surface(top_D, 0.7, 1.0), surface(top_D + shift * DECADE_D + apart_D, 0.6, 1.1)
    x, y = [random.random(D) for _ in range(trials // 3)], []
    y = [float(source(one) + random.normal(0, noise)) for one in x]
    while len(x) < trials:
        x.append(np.clip(x[int(np.argmax(y))] + random.normal(0, 0.15, D), 0, 1))
        y.append(float(source(x[-1]) + random.normal(0, noise)))
    winner = x[int(np.argmax(y))]
    pool_MD = random.random((places, D))
    pool_MD[: places // 3] = np.clip(winner + 0.3 * (pool_MD[: places // 3] - 0.5), 0, 1)
    pool_MD[:, 0] = winner[0] + DECADE_D[0] * random.uniform(-1, 1, places)
    ladder_MD = winner + np.linspace(-1, 1, 21)[:, None] * DECADE_D
    pool_MD = np.concatenate([ladder_MD, pool_MD])
    wide_MD = random.random((20_000, D)) * [1.5, 1, 1, 1, 1] - [0.25, 0, 0, 0, 0]
    best = float(max(target(pool_MD).max(), target(wide_MD).max()))
    return Case(np.array(x), np.array(y), target, pool_MD, best, noise, random)


def by_rules(case: Case, trials: int) -> np.ndarray:
    return case.winner


def by_model(case: Case, trials: int) -> np.ndarray:
    """The design ``model``: winner, usual settings, highest expected gain; the highest posterior mean is chosen."""
    source = fit(case.x_ND, case.y_N.tolist(), [case.noise] * len(case.y_N))
    model = TargetModel(source, DECADE_D)
    x = [case.winner, np.full(D, 0.5)]
    y = [case.measured(one) for one in x]
    while len(x) < trials:
        gains_M = model.after(Observed(np.array(x), y, [case.noise] * len(y))).gains(case.pool_MD)
        x.append(case.pool_MD[int(np.argmax(gains_M))])
        y.append(case.measured(x[-1]))
    mean_n, _ = model.after(Observed(np.array(x), y, [case.noise] * len(y))).predict(np.array(x))
    return np.asarray(x[int(np.argmax(mean_n))])


def by_chance(case: Case, trials: int) -> np.ndarray:
    """The winner and random ones of the same places; the highest score is chosen."""
    return _highest(case, [case.winner, *case.random.permutation(case.pool_MD)[: trials - 1]])


def by_random_search(case: Case, trials: int) -> np.ndarray:
    return _highest(case, list(case.random.random((trials, D))))


def by_rates(case: Case, trials: int) -> np.ndarray:
    """The winner, the usual settings, half and double the rate, and two octaves; the highest score is chosen."""
    octave_D = DECADE_D * np.log10(2)
    rates = [case.winner + n * octave_D for n in (-1, 1, -2, 2)]
    return _highest(case, [case.winner, np.full(D, 0.5), *rates][:trials])


def _highest(case: Case, x: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(x[int(np.argmax([case.measured(one) for one in x]))])


WAYS: dict[str, tuple[Callable[[Case, int], np.ndarray], int]] = {
    "rules alone": (by_rules, 0),
    "model, 4 trials": (by_model, 4),
    "model, 6 trials": (by_model, 6),
    "winner at other rates, 4 trials": (by_rates, 4),
    "winner at other rates, 6 trials": (by_rates, 6),
    "winner and random places, 6 trials": (by_chance, 6),
    "random search on the target, 6 trials": (by_random_search, 6),
}


def regrets(way: str, shift: float, noise: float, seeds: Iterable[int], places: int = 384) -> np.ndarray:
    """Regret for each seed.  All ways have the same searches, surfaces and places."""
    choose, trials = WAYS[way]
    found = []
    for seed in seeds:
        one = case(seed, shift, noise, places=places)
        found.append(one.regret(choose(one, trials)))
    return np.array(found)


def table(noises: Sequence[float] = NOISES, seeds: int = SEEDS) -> str:
    shifts = " | ".join(f"{shift:+.1f}" for shift in SHIFTS)
    lines = [f"| way | noise | {shifts} | mean |", "|---|---|" + "---|" * (len(SHIFTS) + 1)]
    for noise in noises:
        for way in WAYS:
            means = [float(regrets(way, shift, noise, range(seeds)).mean()) for shift in SHIFTS]
            cells = " | ".join(f"{mean:.3f}" for mean in (*means, float(np.mean(means))))
            lines.append(f"| {way} | {noise:g} | {cells} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main(docs: Path = DOCS) -> None:
    text = docs.read_text(encoding="utf-8")
    write_atomic(docs, between(text, BEGIN, END, table()))


if __name__ == "__main__":
    main()
