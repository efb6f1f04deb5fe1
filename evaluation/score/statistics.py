"""Statistics of scores: noise, intervals, ranks. Pure numpy: no torch, no files.

Owns variance components and the smallest detectable difference, bootstrap draws over prompts and their
results (paired differences, P(best), configurations that cannot be told apart), rank correlations with exact
p values, and shrinkage. Does not own the scores (``evaluation.score.score``) or the decisions based on them.

All seeds are fixed: the same scores always give the same results.

Shapes: C configurations (trials, checkpoints), P prompts, S seeds of a prompt, K bootstrap draws, N pairs ranked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from evaluation.score.formula import USUAL, Formula, objective

DRAWS = 1000  # bootstrap draws; a standard error is then accurate to about 2 %
BOOTSTRAP_SEED = 20240229
CONFIDENCE = 0.95
NORMAL_95 = 1.96  # half of a normal distribution's 95 % interval, in standard errors
SIGNIFICANT = 0.05
# z(97.5 %) + z(80 %): a true difference of this many standard errors is detected with 80 % power at 5 %, two-sided
DETECTABLE = 1.960 + 0.842
ALL_PERMUTATIONS = 8  # up to this many pairs, all permutations are counted (8! = 40,320)
PERMUTATIONS = 2_000  # random permutations for more pairs


@dataclass(frozen=True)
class Difference:
    """Mean of a paired difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def se(self) -> float:
        """The standard error, from the 95 % interval."""
        return (self.high - self.low) / (2 * NORMAL_95)


# Variance components


@dataclass(frozen=True)
class Components:
    """Standard deviations of the parts of an image's score, and the design they were estimated from.

    ``prompt``: between prompts; ``seed``: between images of one prompt. All configurations have the share
    ``shared`` of the seed variance in common (common random numbers). ``interaction``: configuration ×
    prompt. Prompts and shared seeds cancel in paired differences; the rest does not.
    """

    configurations: int
    prompts: int
    seeds: int
    prompt: float
    seed: float
    interaction: float
    shared: float

    def paired_se(self, prompts: int | None = None, seeds: int | None = None) -> float:
        """Standard error of the difference of two configurations, for this or another number of prompts and seeds."""
        p, s = prompts or self.prompts, seeds or self.seeds
        own = self.seed**2 * (1 - self.shared)
        return math.sqrt(2 * self.interaction**2 / p + 2 * own / (p * s))

    @property
    def detectable(self) -> float:
        """The true difference that is detected with 80 % power (two-sided, 5 %)."""
        return DETECTABLE * self.paired_se()

    def sentence(self) -> str:
        return (
            f"a difference of {two_digits(self.detectable)} can be detected with this prompt set "
            f"({self.prompts} prompts × {self.seeds} seeds; 80 % power, paired; training seed not included)"
        )

    def figures(self) -> str:
        return (
            f"of an image's score: prompt sd {self.prompt:.3f}, seed sd {self.seed:.3f} ({self.shared:.0%} of its "
            f"variance shared by all trials), trial × prompt sd {self.interaction:.3f}; from "
            f"{self.configurations} trials"
        )


def two_digits(value: float) -> str:
    """0.04, 0.12, 0.007: two decimals, or more if they would round to 0."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"


def variance_components(scores_CPS: np.ndarray) -> Components:
    """Method of moments: configurations × (seeds within prompts), every cell once (Searle et al. 1992, ch. 4).

        y_cps = m + c + p + s(p) + cp + e     E[MS_e]  = e²            E[MS_cp]  = e² + S·cp²
                                              E[MS_sp] = e² + C·s²     E[MS_p]   = e² + S·cp² + C·s² + C·S·p²

    Negative estimates are set to 0. With one seed per prompt, e cannot be separated from cp
    and counts as interaction.
    """
    scores_CPS = np.asarray(scores_CPS, dtype=float)
    c, p, s = scores_CPS.shape
    assert c > 1 and p > 1 and s > 0, f"too few scores to compare: {scores_CPS.shape}"
    assert bool(np.isfinite(scores_CPS).all()), "a score is not finite"
    mean, mean_C = scores_CPS.mean(), scores_CPS.mean((1, 2))
    mean_P, mean_CP, mean_PS = scores_CPS.mean((0, 2)), scores_CPS.mean(2), scores_CPS.mean(0)
    prompt_ms = c * s * float(np.square(mean_P - mean).sum()) / (p - 1)
    crossed = mean_CP - mean_C[:, None] - mean_P + mean
    interaction_ms = s * float(np.square(crossed).sum()) / ((c - 1) * (p - 1))
    if s == 1:
        between = max(0.0, prompt_ms - interaction_ms) / c
        return Components(c, p, s, math.sqrt(between), 0.0, math.sqrt(interaction_ms), 0.0)
    seed_ms = c * float(np.square(mean_PS - mean_P[:, None]).sum()) / (p * (s - 1))
    left = scores_CPS - mean_CP[..., None] - mean_PS + mean_P[:, None]
    error_ms = float(np.square(left).sum()) / (p * (c - 1) * (s - 1))
    shared = max(0.0, seed_ms - error_ms) / c
    interaction = max(0.0, interaction_ms - error_ms) / s
    prompt = max(0.0, prompt_ms - interaction_ms - c * shared) / (c * s)
    seed = shared + error_ms
    return Components(
        c, p, s, math.sqrt(prompt), math.sqrt(seed), math.sqrt(interaction), shared / seed if seed else 0.0
    )


@dataclass(frozen=True)
class Scale:
    """The anchors of a study as numbers: what 0 and 1 of each part are, per prompt (``evaluation.score.anchors``)."""

    base_t_P: np.ndarray
    chance_t_P: np.ndarray
    base_i_P: np.ndarray
    asks_P: np.ndarray
    real_i: float
    t_unit_se: float = 0.0
    i_unit_se: float = 0.0

    @classmethod
    def of(cls, anchors: Mapping[str, Any]) -> Scale:
        """From the content of the anchors file, or from the fields of Anchors."""
        base_t_P, chance_t_P, base_i_P = (
            np.asarray(anchors[key], float) for key in ("base_t_P", "chance_t_P", "base_i_P")
        )
        return cls(
            base_t_P,
            chance_t_P,
            base_i_P,
            np.asarray(anchors["asks_for_subject"], bool),
            float(anchors["real_i"]),
            float(anchors["t_unit_se"]),
            float(anchors["i_unit_se"]),
        )


def image_scores(
    clip_t_PS: np.ndarray, clip_i_PS: np.ndarray, scale: Scale, formula: Formula = USUAL
) -> np.ndarray | None:
    """The contribution (P, S) of every image to the objective of a configuration (its score, where that is above
    0); their mean is the objective.

    The objective is not a mean over images, so this is its first-order approximation: the objective plus the
    influence of each image (Hampel 1974, doi:10.1080/01621459.1974.10482962). None if it is clipped at 0, where
    it has no slope.
    """
    asks = scale.asks_P
    t_unit_P, i_unit_P = scale.base_t_P - scale.chance_t_P, scale.real_i - scale.base_i_P[asks]
    following_PS, t = _influence(clip_t_PS - scale.chance_t_P[:, None], t_unit_P, 2 * scale.t_unit_se)
    alike_PS, i = _influence((clip_i_PS - scale.base_i_P[:, None])[asks], i_unit_P, 2 * scale.i_unit_se)
    if (t <= 0 or i <= 0) and not formula.signed:
        return None
    slope_t, slope_i = formula.slopes(t, i)
    out_PS = float(objective(np.array(t), np.array(i), formula)) + slope_t * following_PS
    out_PS[asks] += slope_i * alike_PS * len(asks) / asks.sum()
    return out_PS


def _influence(above_PS: np.ndarray, unit_P: np.ndarray, least: float) -> tuple[np.ndarray, float]:
    """Influence of each image on a ratio of means, and the ratio. The unit is at least ``least``."""
    unit = float(unit_P.mean())
    if unit < max(least, 1e-6):
        unit_P = np.full_like(unit_P, max(least, 1e-6))
        unit = float(unit_P[0])
    ratio = float(above_PS.mean()) / unit
    return (above_PS - ratio * unit_P[:, None]) / unit, ratio


# Bootstrap over prompts


def prompt_draws(prompts: int) -> np.ndarray:
    """(K, P) how often each prompt is in each bootstrap draw. The images of a prompt stay together.

    The seed is fixed, so all scores of a study use the same draws and differences are paired.
    """
    picked_KP = np.random.default_rng(BOOTSTRAP_SEED).integers(0, prompts, (DRAWS, prompts))
    return np.stack([(picked_KP == p).sum(1) for p in range(prompts)], axis=1).astype(float)


def interval(draws_K: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central interval of the draws that are not NaN."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(draws_K, [tail, 100 - tail])
    return float(low), float(high)


def difference(a: float, b: float, a_K: np.ndarray, b_K: np.ndarray) -> Difference:
    """a minus b, with the interval of the paired draws."""
    return Difference(a - b, *interval(a_K - b_K))


def repeat_sd(values: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation of a score over training seeds, pooled over configurations, and its degrees of freedom.

    (0, 0) if no configuration was repeated.
    """
    freedom = sum(len(of) - 1 for of in values if len(of))
    squares = sum(float(np.square(np.subtract(of, np.mean(of))).sum()) for of in values if len(of))
    return (math.sqrt(squares / freedom), freedom) if freedom > 0 else (0.0, 0)


def with_repeat_noise(draws_CK: np.ndarray, repeats_C: Sequence[int], sd: float, freedom: int) -> np.ndarray:
    """Draws of means over training seeds, widened by the uncertainty of few seeds (Student's t)."""
    if freedom == 0 or sd == 0.0:
        return draws_CK
    noise_CK = np.random.default_rng(BOOTSTRAP_SEED + 1).standard_t(freedom, draws_CK.shape)
    return draws_CK + noise_CK * sd / np.sqrt(np.asarray(repeats_C, float))[:, None]


def p_best(draws_CK: np.ndarray) -> np.ndarray:
    """(C) share of the draws in which a configuration is the best; ties are split equally."""
    known_CK = np.where(np.isnan(draws_CK), -np.inf, draws_CK)
    highest_CK = known_CK == known_CK.max(0)
    return (highest_CK / highest_CK.sum(0)).mean(1)


def tied_with_best(
    values_C: Sequence[float], draws_CK: np.ndarray, level: float = SIGNIFICANT
) -> tuple[int, ...]:
    """The configurations that cannot be told apart from the best: the best first, then the others by value.

    One-sided paired bootstrap tests against the best with Holm's correction (Holm 1979): configurations are
    removed in order of significance, as long as each difference is significant among those that remain.
    """
    order = sorted(range(len(values_C)), key=lambda c: (-values_C[c], c))
    best, others = order[0], order[1:]
    chance = {c: _share_not_above_zero(draws_CK[best] - draws_CK[c]) for c in others}
    apart: set[int] = set()
    for c in sorted(others, key=lambda c: chance[c]):
        if chance[c] > level / (len(others) - len(apart)):
            break
        apart.add(c)
    return (best, *(c for c in others if c not in apart))


def _share_not_above_zero(differences_K: np.ndarray) -> float:
    known = differences_K[np.isfinite(differences_K)]
    return float((1 + (known <= 0).sum()) / (1 + len(known)))  # never 0: Phipson & Smyth 2010


# Selection


def shrunken(values_C: Sequence[float], ses_C: Sequence[float]) -> np.ndarray:
    """The scores corrected for selection of the best: shrunk towards their mean.

    Empirical Bayes with a normal prior: weight t² / (t² + se²), t² is the variance of the scores minus that
    of their noise (Efron & Morris 1975, doi:10.1080/01621459.1975.10479864).
    """
    values, variance = np.asarray(values_C, float), np.square(np.asarray(ses_C, float))
    if len(values) < 2:
        return values
    between = max(0.0, float(values.var(ddof=1) - variance.mean()))
    weight = between / (between + variance) if between else np.zeros_like(values)
    return values.mean() + weight * (values - values.mean())


# Comparison with the untrained base


def above_zero(parts: Sequence[tuple[float, float]], among: int = 1) -> bool:
    """Whether every part (value, standard error) is above 0 by more than its noise: one-sided 5 %, with
    Bonferroni's correction for the best of ``among`` configurations.

    Anchored parts are differences to the untrained base, and their standard errors are paired with it.
    """
    z = NormalDist().inv_cdf(1 - SIGNIFICANT / max(1, among))
    return all(value > z * se for value, se in parts)


# Ranks


@dataclass(frozen=True)
class Correlation:
    """A rank correlation, its 95 % bootstrap interval over the pairs, and a two-sided permutation p."""

    value: float
    low: float
    high: float
    p: float
    exact: bool  # whether p counts all permutations
    n: int


Coefficient = Callable[[np.ndarray, np.ndarray], np.ndarray]


def spearman_rows(x_KN: np.ndarray, y_KN: np.ndarray) -> np.ndarray:
    """(K) Spearman's ρ of each row: Pearson's correlation of mean ranks. NaN if one side is constant."""
    a, b = ranks(x_KN), ranks(y_KN)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def kendall_rows(x_KN: np.ndarray, y_KN: np.ndarray) -> np.ndarray:
    """(K) Kendall's τ_b of each row (ties corrected on both sides). NaN if one side is constant."""
    one, other = np.triu_indices(x_KN.shape[-1], k=1)
    a, b = (np.sign(v[..., one] - v[..., other]) for v in (x_KN, y_KN))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def ranks(values_KN: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get their mean rank."""
    below = (values_KN[..., :, None] > values_KN[..., None, :]).sum(-1)
    equal = (values_KN[..., :, None] == values_KN[..., None, :]).sum(-1)
    return below + (equal + 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    return _correlation(spearman_rows, x, y)


def kendall(x: Sequence[float], y: Sequence[float]) -> Correlation:
    return _correlation(kendall_rows, x, y)


def lead(better: Sequence[float], worse: Sequence[float], truth: Sequence[float]) -> Difference:
    """How much more closely one ranking follows the truth than another (Spearman, same resampled pairs)."""
    a, b, t = (np.asarray(v, float) for v in (better, worse, truth))
    picked_KN = _pairs_drawn(len(t))
    gain_K = spearman_rows(a[picked_KN], t[picked_KN]) - spearman_rows(b[picked_KN], t[picked_KN])
    point = float(spearman_rows(a[None], t[None])[0] - spearman_rows(b[None], t[None])[0])
    return Difference(point, *interval(gain_K))


def _correlation(coefficient: Coefficient, x: Sequence[float], y: Sequence[float]) -> Correlation:
    a, b = np.asarray(x, float), np.asarray(y, float)
    assert a.shape == b.shape and a.ndim == 1 and len(a) > 1, f"no pairs: {a.shape} and {b.shape}"
    point = float(coefficient(a[None], b[None])[0])
    if math.isnan(point):
        return Correlation(point, point, point, 1.0, True, len(a))
    picked_KN = _pairs_drawn(len(a))
    p, exact = permutation_p(coefficient, a, b)
    return Correlation(point, *interval(coefficient(a[picked_KN], b[picked_KN])), p, exact, len(a))


def permutation_p(coefficient: Coefficient, x: np.ndarray, y: np.ndarray) -> tuple[float, bool]:
    """Share of permutations whose coefficient is at least as far from 0 as the observed one, and
    whether all were counted."""
    exact = len(x) <= ALL_PERMUTATIONS
    if exact:
        order_KN = np.array(list(itertools.permutations(range(len(x)))))
    else:
        random = np.random.default_rng(BOOTSTRAP_SEED + 2)
        order_KN = random.permuted(np.tile(np.arange(len(x)), (PERMUTATIONS, 1)), axis=1)
    found = abs(float(coefficient(x[None], y[None])[0])) - 1e-9
    beyond = int((np.abs(coefficient(np.broadcast_to(x, order_KN.shape), y[order_KN])) >= found).sum())
    if exact:
        return beyond / len(order_KN), True
    return (beyond + 1) / (PERMUTATIONS + 1), False


def _pairs_drawn(count: int) -> np.ndarray:
    return np.random.default_rng(BOOTSTRAP_SEED + 3).integers(0, count, (DRAWS, count))
