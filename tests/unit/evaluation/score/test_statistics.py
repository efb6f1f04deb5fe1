"""Tests of evaluation.score.statistics against counting by hand, simulations and the score."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from evaluation.score import statistics as st
from evaluation.score.formula import SIGNED, Formula, composite, objective


def simulated(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    p: float,
    s: float,
    cp: float,
    e: float,
    configurations: float = 1.0,
) -> np.ndarray:
    """Scores (C, P, S) with known standard deviations: prompt, shared seed, interaction, own seed."""
    c, prompts, seeds = shape
    return (
        rng.normal(0, configurations, (c, 1, 1))
        + rng.normal(0, p, (1, prompts, 1))
        + rng.normal(0, s, (1, prompts, seeds))
        + rng.normal(0, cp, (c, prompts, 1))
        + rng.normal(0, e, shape)
    )


def test_variance_components_are_those_that_were_put_in() -> None:
    rng = np.random.default_rng(1)
    found = [st.variance_components(simulated(rng, (8, 16, 2), 0.3, 0.14, 0.07, 0.14)) for _ in range(60)]
    mean = {
        k: float(np.mean([getattr(f, k) for f in found])) for k in ("prompt", "seed", "interaction", "shared")
    }
    assert mean["prompt"] == pytest.approx(0.3, rel=0.05)
    assert mean["seed"] == pytest.approx(math.hypot(0.14, 0.14), rel=0.05)
    assert mean["interaction"] == pytest.approx(0.07, rel=0.1)
    assert mean["shared"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_detectable_difference_is_seen_in_four_of_five_comparisons(seeds: int) -> None:
    """Simulated power: two configurations that differ by this amount, compared by their paired draws."""
    rng, noise = np.random.default_rng(2), (0.3, 0.1, 0.1, 0.2)
    detectable = st.variance_components(simulated(rng, (200, 16, seeds), *noise)).detectable
    weights_KP, seen = st.prompt_draws(16), []
    for _ in range(300):
        scores = simulated(rng, (2, 16, seeds), *noise, configurations=0.0)
        gap_P = (scores[0] - scores[1]).mean(1) + detectable
        low, high = st.interval(weights_KP @ gap_P / 16)
        seen.append(low > 0 or high < 0)
    assert 0.74 < np.mean(seen) < 0.90  # 16 prompts: bootstrap intervals are some 5 % too narrow


def test_prompts_see_more_than_seeds_at_equal_cost() -> None:
    plan = st.Components(8, 8, 4, prompt=3.0, seed=2.0, interaction=0.7, shared=0.5)
    # by hand from SE² = 2·interaction²/P + 2·seed²·(1 − shared)/(P·S): 8 × 4 → 0.50, 16 × 2 → 0.43, 25 × 4 → 0.28
    assert plan.paired_se() == pytest.approx(0.50, abs=0.005)
    assert plan.paired_se(16, 2) == pytest.approx(0.43, abs=0.005)
    assert plan.paired_se(25, 4) == pytest.approx(0.28, abs=0.005)
    assert plan.detectable == pytest.approx(1.4, abs=0.01)


def test_the_sentence_says_what_can_be_seen_and_with_what() -> None:
    text = st.Components(8, 16, 2, 0.3, 0.2, 0.02, 0.5).sentence()
    assert text.startswith("a difference of 0.10 can be detected with this prompt set (16 prompts × 2 seeds")
    assert st.two_digits(0.0042) == "0.0042"


def brute_kendall(x: list[float], y: list[float]) -> float:
    pairs = list(itertools.combinations(range(len(x)), 2))
    sign = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    moved = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    return float(sum(sign) / math.sqrt(moved[0] * moved[1]))


def test_rank_correlations_agree_with_counting_and_with_known_values() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = rng.integers(0, 6, 9).astype(float).tolist(), rng.normal(size=9).tolist()
        assert st.kendall(x, y).value == pytest.approx(brute_kendall(x, y))
    # Kendall's own example of a judge's ranks, and one with ties (Kendall 1948, ch. 1 and 3)
    assert st.kendall([1, 2, 3, 4, 5], [3, 1, 2, 5, 4]).value == pytest.approx(0.4)
    assert st.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]).value == pytest.approx(0.8207826817)
    assert st.kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]).value == pytest.approx(
        -0.4714045208
    )  # scipy's docs


def test_small_samples_have_exact_p() -> None:
    """Exact two-sided tests: four pairs can never reach 5 %; five need τ = 1; eight need τ = 0.643."""
    four = st.kendall([1, 2, 3, 4], [1, 2, 3, 4])
    assert four.exact and four.p == pytest.approx(2 / 24)
    assert st.kendall([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]).p == pytest.approx(2 / 120)
    eight = st.kendall(range(8), [0, 2, 1, 4, 5, 3, 7, 6])
    assert eight.exact and eight.value > 0.643 and eight.p < 0.05
    x, y = np.arange(6.0), np.array([1.0, 0, 3, 2, 5, 4])
    rows = [np.corrcoef(x, y[list(order)])[0, 1] for order in itertools.permutations(range(6))]
    found = st.spearman(x.tolist(), y.tolist())
    assert found.p == pytest.approx(np.mean(np.abs(rows) >= abs(found.value) - 1e-9))


def test_many_pairs_have_a_sampled_p_and_a_constant_side_has_no_correlation() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=30)
    found = st.spearman(x.tolist(), (x + rng.normal(size=30)).tolist())
    assert not found.exact and found.p < 0.01 and found.low < found.value < found.high
    assert math.isnan(st.spearman([1, 2, 3], [5, 5, 5]).value)
    assert st.spearman([1, 2, 3], [5, 5, 5]).p == 1.0


def test_the_interval_of_a_rank_correlation_covers_the_truth() -> None:
    """Normal pairs with r = 0.8 have Spearman's ρ = 6/π·asin(r/2) = 0.786 in the long run."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(40):
        x = rng.normal(size=30)
        found = st.spearman(x.tolist(), (0.8 * x + 0.6 * rng.normal(size=30)).tolist())
        inside += found.low <= 0.786 <= found.high
    assert (
        inside >= 34
    )  # 95 % of 40 is 38, minus the known undercoverage of the bootstrap at 30 pairs, and chance


def draws_of(means: list[float], sd: float, seed: int = 6) -> tuple[list[float], np.ndarray]:
    """Scores of configurations on 24 prompts, and their draws over prompts."""
    rng = np.random.default_rng(seed)
    scores_CP = np.array(means)[:, None] + rng.normal(0, 0.3, 24) + rng.normal(0, sd, (len(means), 24))
    scores_CP += (np.array(means) - scores_CP.mean(1))[:, None]
    weights_KP = st.prompt_draws(24)
    return means, (weights_KP @ scores_CP.T / 24).T


def test_what_cannot_be_told_apart_from_the_best_is_kept_and_the_rest_is_not() -> None:
    values, draws_CK = draws_of([0.50, 0.71, 0.70, 0.20], sd=0.05)
    assert st.tied_with_best(values, draws_CK) == (1, 2)
    chance = st.p_best(draws_CK)
    assert chance.sum() == pytest.approx(1.0) and chance[0] == chance[3] == 0
    assert 0.5 < chance[1] < 1.0


def test_equal_configurations_are_told_apart_as_rarely_as_the_level_says() -> None:
    lost = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scores_CP = rng.normal(0, 0.3, 24) + rng.normal(0, 0.1, (4, 24))
        draws_CK = (st.prompt_draws(24) @ scores_CP.T / 24).T
        lost += len(st.tied_with_best(scores_CP.mean(1).tolist(), draws_CK)) < 4
    assert (
        lost <= 25
    )  # tests against the best of four reject slightly more often than 5 %, because the best is selected


def test_equal_scores_share_the_chance_to_be_best() -> None:
    assert st.p_best(np.zeros((4, 10))).tolist() == [0.25] * 4


def test_few_training_seeds_widen_every_interval() -> None:
    values, draws_CK = draws_of([0.70, 0.60], sd=0.02)
    sd, freedom = st.repeat_sd([[0.68, 0.72], [0.57, 0.63]])
    assert freedom == 2 and sd == pytest.approx(math.sqrt((0.0008 + 0.0018) / 2))
    wide_CK = st.with_repeat_noise(draws_CK, [2, 2], sd, freedom)
    narrow, wide = (st.difference(*values, *rows) for rows in (draws_CK, wide_CK))
    assert narrow.low > 0 and wide.low < narrow.low and wide.high > narrow.high
    assert st.repeat_sd([[0.5], [0.6]]) == (0.0, 0)
    assert st.with_repeat_noise(draws_CK, [1, 1], 0.0, 0) is draws_CK


def test_shrunken_scores_are_nearer_to_the_truth_than_the_best_ones_claim() -> None:
    rng, raw, pulled = np.random.default_rng(7), [], []
    for _ in range(200):
        truth = rng.normal(0.5, 0.1, 30)
        seen = truth + rng.normal(0, 0.06, 30)
        best = int(seen.argmax())
        raw.append(seen[best] - truth[best])
        pulled.append(st.shrunken(seen, [0.06] * 30)[best] - truth[best])
    assert np.mean(raw) > 0.04 and abs(np.mean(pulled)) < 0.01
    assert st.shrunken([0.4, 0.4], [0.1, 0.1]).tolist() == [0.4, 0.4]


def scale(prompts: int = 12) -> st.Scale:
    rng = np.random.default_rng(8)
    chance, asks = rng.normal(0.1, 0.02, prompts), np.arange(prompts) < prompts - 2
    return st.Scale(
        chance + rng.normal(0.15, 0.02, prompts), chance, rng.normal(0.4, 0.03, prompts), asks, 0.8
    )


FORMULAS = [Formula(), Formula(likeness=3.0), Formula("harmonic"), Formula("harmonic", 0.5, 2.0)]


def anchored_parts(
    own: st.Scale, t_PS: np.ndarray, i_PS: np.ndarray, weights_KP: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    from evaluation.score.anchors import Anchors
    from evaluation.score.score import anchored

    anchors = Anchors(
        {}, tuple(map(str, range(12))), tuple(map(bool, own.asks_P)), tuple(own.base_t_P), tuple(own.chance_t_P),
        tuple(own.base_i_P), own.real_i, 0.0, 0.0, 0.0,
    )  # fmt: skip
    return anchored(t_PS.mean(1), i_PS.mean(1), anchors, weights_KP)


@pytest.mark.parametrize("formula", FORMULAS, ids=Formula.words)
def test_image_scores_average_to_the_score_and_spread_like_its_standard_error(formula: Formula) -> None:
    own, rng = scale(), np.random.default_rng(9)
    clip_t = own.chance_t_P[:, None] + rng.normal(0.1, 0.02, (12, 2))
    clip_i = rng.normal(0.55, 0.04, (12, 2))

    def score(t_PS: np.ndarray, i_PS: np.ndarray, weights_KP: np.ndarray) -> np.ndarray:
        return composite(*anchored_parts(own, t_PS, i_PS, weights_KP), formula)

    alike = np.ones((1, 12))
    value = float(score(clip_t, clip_i, alike)[0])
    found = st.image_scores(clip_t, clip_i, own, formula)
    assert found is not None and found.mean() == pytest.approx(value, abs=1e-12)
    linear = found.mean(1).std(ddof=0) / math.sqrt(12)
    assert linear == pytest.approx(float(np.std(score(clip_t, clip_i, st.prompt_draws(12)))), rel=0.1)
    # a prompt's influence is the score's derivative by that prompt's weight
    for p in range(12):
        step = np.zeros((1, 12))
        step[0, p] = 1e-5
        slope = (score(clip_t, clip_i, alike + step) - score(clip_t, clip_i, alike - step))[0] / 2e-5
        assert found[p].mean() - value == pytest.approx(12 * slope, abs=1e-6)


@pytest.mark.parametrize("formula", FORMULAS, ids=Formula.words)
def test_the_slopes_of_a_formula_are_its_derivatives(formula: Formula) -> None:
    for t, i in ((0.9, 0.4), (0.2, 1.05), (1.0, 1.0)):
        up, low = np.array([t + 1e-6, t]), np.array([t - 1e-6, t])
        also = np.array([i, i + 1e-6]), np.array([i, i - 1e-6])
        numeric = (composite(up, also[0], formula) - composite(low, also[1], formula)) / 2e-6
        assert formula.slopes(t, i) == pytest.approx(numeric.tolist(), abs=1e-7)
    assert formula.slopes(1.2, 0.5)[0] == 0 and formula.slopes(0.5, 1.2)[1] == 0
    assert formula.slopes(0.5, -0.2) == (0, 0)


@pytest.mark.parametrize("formula", FORMULAS, ids=Formula.words)
def test_the_slopes_of_an_objective_below_zero_are_its_derivatives(formula: Formula) -> None:
    signed = replace(formula, below_zero=SIGNED)
    for t, i in ((0.9, -0.08), (-0.7, 0.3), (-0.2, -0.4), (1.3, -0.1), (-0.3, 1.2)):
        up, low = np.array([t + 1e-6, t]), np.array([t - 1e-6, t])
        also = np.array([i, i + 1e-6]), np.array([i, i - 1e-6])
        numeric = (objective(up, also[0], signed) - objective(low, also[1], signed)) / 2e-6
        assert signed.slopes(t, i) == pytest.approx(numeric.tolist(), abs=1e-7)
    assert min(signed.slopes(1.0, 0.0)) >= 0 and signed.slopes(1.0, 0.0)[1] > 0


def test_the_standard_error_of_an_objective_below_zero_is_that_of_its_images() -> None:
    own, rng = scale(), np.random.default_rng(9)
    clip_t = own.chance_t_P[:, None] + rng.normal(0.14, 0.02, (12, 2))
    clip_i = rng.normal(0.33, 0.03, (12, 2))
    signed = Formula(below_zero=SIGNED)
    assert st.image_scores(clip_t, clip_i, own) is None
    found = st.image_scores(clip_t, clip_i, own, signed)
    t, i = (float(part[0]) for part in anchored_parts(own, clip_t, clip_i, np.ones((1, 12))))
    assert i < 0 and found is not None
    assert found.mean() == pytest.approx(float(objective(np.array(t), np.array(i), signed)))
    draws_K = objective(*anchored_parts(own, clip_t, clip_i, st.prompt_draws(12)), signed)
    assert found.mean(1).std() / math.sqrt(12) == pytest.approx(float(np.std(draws_K)), rel=0.15)


def test_a_score_of_zero_has_no_image_scores_and_a_part_at_its_ceiling_has_no_influence() -> None:
    own = scale()
    nothing = np.full((12, 2), 0.1)
    assert st.image_scores(nothing, nothing, own) is None
    high = own.chance_t_P[:, None] + np.random.default_rng(10).normal(0.3, 0.05, (12, 2))  # twice the base's
    found = st.image_scores(high, np.full((12, 2), 0.6), own)
    assert found is not None
    assert np.ptp(found[~own.asks_P]) == 0


def test_the_module_needs_no_torch() -> None:
    code = "import sys, evaluation.score.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
