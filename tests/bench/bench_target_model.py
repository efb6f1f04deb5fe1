"""Target trials: do a few of them, chosen by the model, find better settings than the rules alone?

    python -m tests.bench.bench_target_model simulated   # prints a table (10 minutes, one thread)
    python -m tests.bench.bench_target_model recorded    # fills its table in docs/transfer.md (seconds)

A surface is a parabola over five settings, the rate the most important one.  The target's has its best rate ``shift``
decades away from where the rules put it, other curvatures and a slightly different top in the other settings.  A search
of 30 trials (a third at random, then around the best) ends with its measured best, which the rules map.  The regret is
the best true score of the target minus that of the chosen settings; lower is better.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpo.transfer.probes.design import DESIGNS, Probe, ProbeScore
from hpo.transfer.probes.shifted import Observed, TargetModel
from hpo.transfer.probes.surrogate import fit
from tests.bench.bench_probe_grid import (
    OFFSETS,
    RATES,
    Cell,
    Curves,
    Row,
    Scored,
    between,
    read_grid,
    replay,
)
from tests.bench.bench_probe_grid import SEEDS as PAIR
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
BEGIN_RECORDED, END_RECORDED = "<!-- recorded rates: begin -->", "<!-- recorded rates: end -->"
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
    return "\n".join(lines)


# The recorded grid of rates: whole runs on both miniatures (bench_probe_grid)

FEW, MANY = 4, 6


def place_of(rate: float, text_encoder: bool) -> list[float]:
    """A rate and whether the text encoders are trained, as in ``hpo.transfer.probes.prior``."""
    unit = (math.log10(rate) - math.log10(RATES[0])) / (math.log10(RATES[-1]) - math.log10(RATES[0]))
    half = math.sqrt(0.5)
    return [unit, half * text_encoder, half * (not text_encoder)]


KNOWN = tuple((rate, text) for rate in RATES for text in (True, False))


def recorded_search(cells: Mapping[Cell, Scored], seed: int) -> tuple[TargetModel, tuple[float, bool]]:
    """The model of the twelve whole runs on the source with this training seed, and the best of them."""
    curves = Curves(cells, "mini-sd15", 1.0, seed)
    rows = [curves.outcome(Probe(text_encoder=text), rate) for rate, text in KNOWN]
    x_ND = np.array([place_of(*one) for one in KNOWN])
    source = fit(x_ND, [row.score for row in rows], [row.se for row in rows])
    decade = 1 / math.log10(RATES[-1] / RATES[0])
    return TargetModel(source, np.array([decade, 0.0, 0.0])), KNOWN[int(np.argmax([r.score for r in rows]))]


def chosen(
    model: TargetModel, winner: tuple[float, bool], target: Callable[[float, bool], ProbeScore], trials: int
) -> tuple[float, bool]:
    """The settings of the search, at the rate of the search, that are the best after so many whole runs."""
    pool = [(winner[0] * 10**step, text) for step in np.linspace(-1, 1, 41) for text in (True, False)]
    pool_MD = np.array([place_of(*one) for one in pool])
    tried, outcomes = [winner], [target(*winner)]
    while True:
        spots = np.array([place_of(*one) for one in tried])
        after = model.after(Observed(spots, [o.score for o in outcomes], [o.se for o in outcomes]))
        if len(tried) == trials:
            return tried[int(np.argmax(after.predict(spots)[0]))]
        tried.append(pool[int(np.argmax(after.gains(pool_MD)))])
        outcomes.append(target(*tried[-1]))


def replayed(cells: Mapping[Cell, Scored], trials: int) -> Row:
    """Whole runs chosen by the model, from a rate that is off; all else as in ``bench_probe_grid.replay``."""
    searches = {seed: recorded_search(cells, seed) for seed in PAIR}
    regrets, changed = [], []
    for offset in OFFSETS:
        of_offset = []
        for seed, other in itertools.permutations(PAIR, 2):
            model, winner = searches[seed]
            curves, truth = Curves(cells, "mini-sdxl", 1.0, seed), Curves(cells, "mini-sdxl", 1.0, other)
            factor = 2 ** (truth.best()[1] + offset) / winner[0]  # what the rules multiply the rate by

            def target(
                rate: float, text: bool, curves: Curves = curves, factor: float = factor
            ) -> ProbeScore:
                return curves.outcome(Probe(text_encoder=text), rate * factor)

            rate, text = chosen(model, winner, target, trials)
            changed.append((rate, text) != winner)
            of_offset.append(max(0.0, truth.best()[0] - truth.at(rate * factor, text).score))
        regrets.append(float(np.mean(of_offset)))
    return Row(f"model, {trials} whole runs", trials, tuple(regrets), float(np.mean(changed)))


def recorded(cells: Mapping[Cell, Scored]) -> str:
    """Markdown: the model's whole runs beside none, and beside the ladder's with whole and with short runs."""
    rows = [
        replay(cells, None, 0),
        replayed(cells, FEW),
        replayed(cells, MANY),
        replace(replay(cells, DESIGNS["ladder"], MANY, length=1.0), name="ladder, whole runs"),
        replace(replay(cells, DESIGNS["ladder"], MANY), name="ladder, quarter runs"),
    ]
    head = " | ".join(f"{offset:+g}" for offset in OFFSETS)
    lines = [f"| way | target trials | {head} | mean |", "|---" * (len(OFFSETS) + 3) + "|"]
    for row in rows:
        values = " | ".join(f"{value:.3f}" for value in row.regret)
        lines.append(f"| {row.name} | {row.probes:.1f} | {values} | {row.mean:.3f} |")
    return "\n".join(lines)


def main(words: Sequence[str], docs: Path = DOCS) -> None:
    if "simulated" in words:
        print(table())
    if "recorded" in words:
        text = docs.read_text(encoding="utf-8")
        write_atomic(docs, between(text, BEGIN_RECORDED, END_RECORDED, recorded(read_grid())))


if __name__ == "__main__":
    main(sys.argv[1:])
