"""What could be told to the sampler where the score is 0: candidate forms, replayed on the recorded ranking study.

Two replays, both of ``tests/data/ranking_mini_sd15.jsonl``:

* *Rank agreement*: the score of every recorded configuration is computed from a few of its prompts, drawn at random,
  and each form is compared with the graded truth of the other prompts – for the configurations that these few prompts
  score above 0, and for those that they score 0.
* *A flat start*: TPE, as in a search, on a response surface that interpolates the recorded parts, after ten forced
  trials that learn nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from evaluation.score.formula import CEILING, CLIPPED, SIGNED, Formula, composite, objective
from evaluation.score.score import anchored
from evaluation.score.statistics import kendall_rows, spearman_rows
from hpo.search.samplers import make_sampler
from tests import ranking
from tests.ranking import SEARCH, Measured, Recorded
from trainer.files import read_records

Form = Callable[[np.ndarray, np.ndarray], np.ndarray]  # prompt following and likeness → what is told


def _negative(part: np.ndarray) -> np.ndarray:
    return np.minimum(part, 0)


def _signed_root(t: np.ndarray, i: np.ndarray) -> np.ndarray:
    worse = np.minimum(t, i)
    return np.sign(worse) * np.sqrt(np.abs(np.minimum(t, CEILING) * np.minimum(i, CEILING)))


def _soft_minimum(t: np.ndarray, i: np.ndarray) -> np.ndarray:
    return -np.logaddexp(-6 * np.minimum(t, CEILING), -6 * np.minimum(i, CEILING)) / 6


def _shifted(t: np.ndarray, i: np.ndarray) -> np.ndarray:
    above = (np.maximum(np.minimum(part, CEILING) + 1, 0) for part in (t, i))
    return np.sqrt(np.prod(list(above), axis=0)) - 1


FORMS: dict[str, Form] = {
    "clipped (the score)": composite,
    "score + negative parts": lambda t, i: composite(t, i) + _negative(t) + _negative(i),
    "score + lesser negative part": lambda t, i: composite(t, i) + np.minimum(_negative(t), _negative(i)),
    "signed root": _signed_root,
    "soft minimum": _soft_minimum,
    "geometric mean of the parts + 1": _shifted,
    "mean of the parts": lambda t, i: (np.minimum(t, CEILING) + np.minimum(i, CEILING)) / 2,
    "**signed (chosen)**": lambda t, i: objective(t, i, Formula(below_zero=SIGNED)),
}
SIZE, DRAWS, SEED, FEWEST = 3, 400, 5, 4


@dataclass(frozen=True)
class Agreement:
    """Mean rank correlations with the graded truth: over all, where the score is above 0, where it is 0.

    A form that is constant where the score is 0 ranks nothing there: Kendall's τ counts as 0.
    """

    spearman: float
    kendall: float
    above: float
    below: float


def agreements(found: Recorded) -> dict[str, Agreement]:
    """Every form on the same draws of ``SIZE`` prompts, the truth from the prompts that were not drawn."""
    every, random = list(found.on[SEARCH].values()), np.random.default_rng(SEED)
    asking = np.flatnonzero(every[0].prompts.asks_P)
    sums: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in FORMS}
    for _ in range(DRAWS):
        drawn = random.choice(asking, SIZE, replace=False)
        t, i = _parts(every, drawn)
        truth = np.array([m.graded_PS[np.setdiff1d(asking, drawn)].mean() for m in every])
        zero = composite(t, i) <= 0
        for name, form in FORMS.items():
            told = form(t, i)
            sums[name].append(
                (
                    float(spearman_rows(told[None], truth[None])[0]),
                    _kendall(told, truth),
                    _kendall(told[~zero], truth[~zero]),
                    _kendall(told[zero], truth[zero]),
                )
            )
    return {name: Agreement(*np.nanmean(rows, axis=0).tolist()) for name, rows in sums.items()}


def _parts(every: list[Measured], drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights_1P = np.zeros((1, len(every[0].prompts.texts)))
    weights_1P[0, drawn] = 1
    rows = [anchored(m.clip_t_PS.mean(1), m.clip_i_PS.mean(1), m.prompts.anchors, weights_1P) for m in every]
    return np.array([t[0] for t, _ in rows]), np.array([i[0] for _, i in rows])


def _kendall(told: np.ndarray, truth: np.ndarray) -> float:
    """NaN with fewer than ``FEWEST`` configurations, or if their truth is the same; 0 if what is told is."""
    if len(told) < FEWEST or np.ptp(truth) == 0:
        return float("nan")
    return float(kendall_rows(told[None], truth[None])[0]) if np.ptp(told) else 0.0


# A flat start

TRIALS, FORCED, SEEDS = 30, 10, 24
SHIFT = (
    -0.1
)  # of likeness: what learned nothing is then below 0, as on the folder of the issue (−0.083 … −0.018)
# Standard deviation of both parts.  Trials share their noise, so what changes nothing scores the same: the recorded
# likeness of the four weakest trials differs by 0.001, that of the next seven by 0.02.
NOISE, CALM = 0.02, -3.0  # CALM: the strength above which the noise is whole; below it falls with the square
SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "learning_rate": optuna.distributions.FloatDistribution(1e-6, 3e-2, log=True),
    "text_encoder_lr_ratio": optuna.distributions.FloatDistribution(0.05, 1.0, log=True),
    "network_dim_log2": optuna.distributions.IntDistribution(1, 5),
    "network_alpha_ratio": optuna.distributions.FloatDistribution(0.25, 2.0, log=True),
    "lr_scheduler": optuna.distributions.CategoricalDistribution(["constant", "cosine"]),
    "max_train_epochs": optuna.distributions.IntDistribution(1, 2),
}


def strength(settings: Mapping[str, Any]) -> float:
    """log10 of rate × √(alpha ratio · rank · epochs): likeness follows it with Spearman 0.97 in the recording."""
    size = settings["network_alpha_ratio"] * settings["max_train_epochs"] * 2 ** settings["network_dim_log2"]
    return float(np.log10(settings["learning_rate"] * np.sqrt(size)))


@dataclass(frozen=True)
class Surface:
    """Prompt following and likeness over strength: the recorded trials, joined by straight lines."""

    strength: np.ndarray
    following: np.ndarray
    alike: np.ndarray

    @classmethod
    def of(cls, found: Recorded) -> Surface:
        suggested = {
            row["name"]: row["suggested"]
            for row in read_records(ranking.FILE)
            if row["set"] == SEARCH and "network_dim_log2" in row.get("suggested", {})
        }
        rows = sorted(
            (strength(settings), *(float(part[0]) for part in found.on[SEARCH][name].parts()))
            for name, settings in suggested.items()
        )
        return cls(*np.array(rows).T)

    def parts(self, settings: Mapping[str, Any]) -> tuple[float, float]:
        place = strength(settings)
        following, alike = (
            np.interp(place, self.strength, values) for values in (self.following, self.alike)
        )
        return float(following), float(alike) + SHIFT


def noise(settings: Mapping[str, Any], *, everywhere: bool = False) -> float:
    return NOISE if everywhere else NOISE * float(min(1.0, 10 ** (2 * (strength(settings) - CALM))))


def flat_start(surface: Surface, random: np.random.Generator) -> list[dict[str, Any]]:
    """Random proposals of the whole space, of which those are kept that score 0 whatever the noise."""
    found: list[dict[str, Any]] = []
    sampler = optuna.samplers.RandomSampler(seed=int(random.integers(2**31)))
    drawing = optuna.create_study(sampler=sampler)
    while len(found) < FORCED:
        settings = drawing.ask(SPACE).params
        if surface.parts(settings)[1] < -2 * noise(settings):
            found.append(settings)
    return found


@dataclass(frozen=True)
class Rule:
    """What the sampler is told below zero, and whether proposals stay random until a trial is above the base."""

    below_zero: str
    waits: bool = False

    def words(self) -> str:
        return f"{self.below_zero}, random until something is learned" if self.waits else self.below_zero


RULES = (Rule(CLIPPED), Rule(SIGNED), Rule(SIGNED, waits=True))


def climbed(surface: Surface, rule: Rule, seed: int, *, everywhere: bool = False) -> np.ndarray:
    """(TRIALS) the best score so far of one simulated search.  All rules see the same start and the same noise."""
    formula, random = Formula(below_zero=rule.below_zero), np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize")
    for settings in flat_start(surface, random):
        study.enqueue_trial(settings)
    scores: list[float] = []
    for number in range(TRIALS):
        learned = not rule.waits or max(scores, default=0.0) > 0
        study.sampler = make_sampler(seed, number, TRIALS, learned=learned)
        trial = study.ask(SPACE)
        sd = noise(trial.params, everywhere=everywhere)
        t, i = (np.array([part + random.normal(0, sd)]) for part in surface.parts(trial.params))
        scores.append(float(composite(t, i)[0]))
        study.tell(trial, float(objective(t, i, formula)[0]))
    return np.maximum.accumulate(scores)


def climbs(found: Recorded, *, everywhere: bool = False) -> dict[str, np.ndarray]:
    """(SEEDS, TRIALS) the best score so far, for each rule."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    surface = Surface.of(found)
    return {
        rule.words(): np.stack([climbed(surface, rule, seed, everywhere=everywhere) for seed in range(SEEDS)])
        for rule in RULES
    }


MARKS = (10, 15, 20, 30)


def form_lines(forms: Mapping[str, Agreement]) -> list[str]:
    lines = ["| told | Spearman, all | Kendall, all | score above 0 | score 0 |", "|---|---|---|---|---|"]
    for name, of in forms.items():
        lines.append(f"| {name} | {of.spearman:.3f} | {of.kendall:.3f} | {of.above:.3f} | {of.below:.3f} |")
    return lines


def climb_lines(words: str, climbed_by: Mapping[str, np.ndarray]) -> list[str]:
    lines = []
    for form, best_ST in climbed_by.items():
        cells = [f"{best_ST[:, n - 1].mean():.3f}" for n in MARKS]
        cells += [f"{int((best_ST[:, n - 1] <= 0).sum())} of {SEEDS}" for n in (20, 30)]
        lines.append(f"| {words} | {form} | " + " | ".join(cells) + " |")
    return lines


def tables(found: Recorded) -> str:
    heads = " | ".join(f"after {n}" for n in MARKS)
    return "\n".join(
        [
            *form_lines(agreements(found)),
            "",
            f"| noise | told below zero | {heads} | still at 0 after 20 | after 30 |",
            "|---|---|" + "---|" * (len(MARKS) + 2),
            *climb_lines("as recorded", climbs(found)),
            *climb_lines("0.02 everywhere", climbs(found, everywhere=True)),
        ]
    )
