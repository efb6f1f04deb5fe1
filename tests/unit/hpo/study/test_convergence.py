"""The detector: an alert needs a plateau, drawn-together proposals and alike winners – never a pause alone."""

from __future__ import annotations

import numpy as np
import pytest

from hpo.study.convergence import TrialPoint, _alike, detect, expected_gain, signed_rank_p

NOISE = 0.02


def points(values: list[float], places: np.ndarray, se: float = NOISE) -> list[TrialPoint]:
    return [TrialPoint(k, v, se, tuple(p)) for k, (v, p) in enumerate(zip(values, places, strict=True))]


def random_places(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 6))


def narrowing_places(n: int, startup: int = 10) -> np.ndarray:
    """Ten random proposals, then ever nearer to one point."""
    rng = np.random.default_rng(0)
    near = 0.5 + 0.05 * rng.standard_normal((n - startup, 6))
    return np.vstack([rng.random((startup, 6)), near])


def rising(n: int) -> list[float]:
    """Startup scores that differ, then winners that differ by less than the noise."""
    rng = np.random.default_rng(1)
    return [*np.linspace(0.1, 0.5, 10), *(0.6 + 0.002 * rng.standard_normal(n - 10))]


def test_alike_winners_from_drawn_together_proposals_are_converged() -> None:
    verdict = detect(points(rising(30), narrowing_places(30)), dimensions=6, startup=10)
    assert verdict is not None and verdict.level == "converged"
    assert verdict.spread_ratio < 0.75 and verdict.gain_in_window < verdict.smallest_gain


def test_a_pause_of_random_search_is_no_convergence() -> None:
    fired = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        verdict = detect(
            points(list(rng.normal(0.5, 0.1, 30)), rng.random((30, 6))), dimensions=6, startup=10
        )
        assert verdict is not None
        fired += verdict.level in ("plateau", "converged")
    assert fired <= 2


def test_nothing_is_claimed_before_twenty_trials_or_one_and_a_half_per_dimension() -> None:
    few = detect(points(rising(19), narrowing_places(19)), dimensions=6, startup=10)
    many_dimensions = detect(points(rising(24), narrowing_places(24)), dimensions=20, startup=10)
    assert few is not None and few.level == "none"
    assert many_dimensions is not None and many_dimensions.level == "none"


def test_a_new_best_ends_a_plateau() -> None:
    values = rising(30)
    values[-1] = 0.7
    verdict = detect(points(values, narrowing_places(30)), dimensions=6, startup=10)
    assert verdict is not None and verdict.level == "none" and verdict.best == 29


def test_trials_of_other_workers_hold_converged_back() -> None:
    verdict = detect(points(rising(30), narrowing_places(30)), dimensions=6, startup=10, running=1)
    assert verdict is not None and verdict.level == "plateau" and verdict.settled


def test_noise_that_hides_all_differences_is_no_signal_not_converged() -> None:
    values = list(np.random.default_rng(0).normal(0.5, 0.01, 30))
    verdict = detect(points(values, narrowing_places(30), se=0.02), dimensions=6, startup=10)
    assert verdict is not None and verdict.level == "no_signal"


def test_winners_that_differ_prompt_by_prompt_are_not_alike() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.6, 0.1, 16)
    found = points(rising(30), narrowing_places(30))
    values = sorted((p.value for p in found), reverse=True)
    paired = [
        TrialPoint(p.number, p.value, p.se, p.place, tuple(base - 0.05 * (p.value < values[0])))
        for p in found
    ]
    verdict = detect(paired, dimensions=6, startup=10)
    assert verdict is not None and not verdict.alike and verdict.level == "plateau"


def test_holm_steps_down_one_winner_that_differs_is_enough_and_none_is_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.6, 0.1, 16)
    shift = np.where(np.arange(16) < 12, 0.05, -0.05)

    def alike(differences: list[np.ndarray]) -> bool:
        top = [TrialPoint(0, 0.6, NOISE, (), tuple(base))]
        top += [TrialPoint(k, 0.59, NOISE, (), tuple(base - d)) for k, d in enumerate(differences, 1)]
        return _alike(top, NOISE)

    chance = signed_rank_p(shift)
    assert 0.1 / 9 < chance < 0.1 / 2  # not rejected in the first step, so never, though below later marks
    assert alike([shift] * 9)
    assert not alike([shift] * 8 + [np.full(16, 0.05)])


def test_the_expected_gain_agrees_with_drawing_trials() -> None:
    rng = np.random.default_rng(0)
    middle, spread, best = 0.5, 0.1, 0.62
    recent = middle + spread * np.array([-2.0, -1.0, -0.5, 0.5, 1.0, np.sqrt(1.75)])  # mean square above: 1
    wider = spread * np.sqrt(1 + np.sqrt(2 / 3))  # by one standard error, of three scores
    draws = rng.normal(middle, wider, (200_000, 10)).max(axis=1)
    known = float(np.maximum(0.0, draws - best).mean())
    assert expected_gain(recent, best, 0.0, 10) == pytest.approx(known, rel=0.01)


def test_scores_that_differ_by_noise_alone_promise_no_gain_and_wide_ones_do() -> None:
    flat, wide = 0.6 + 0.01 * np.linspace(-1, 1, 10), 0.6 + 0.1 * np.linspace(-1, 1, 10)
    assert expected_gain(flat, float(flat.max()), 0.02, 10) == 0.0
    assert expected_gain(wide, float(wide.max()), 0.02, 10) > 0.01
    falls = wide.copy()
    falls[:4] -= 5.0  # proposals that fall far promise nothing more
    assert expected_gain(falls, float(wide.max()), 0.02, 10) == expected_gain(
        wide, float(wide.max()), 0.02, 10
    )


def test_a_plateau_with_gains_to_expect_is_none() -> None:
    values = rising(30)
    values[20:] = list(0.52 + 0.08 * np.linspace(-1, 1, 10))  # no gain, yet they scatter far above the noise
    values[15] = 0.605
    verdict = detect(points(values, narrowing_places(30), se=0.005), dimensions=6, startup=10)
    assert verdict is not None and verdict.gain_in_window < verdict.smallest_gain
    assert verdict.expected_gain > verdict.smallest_gain and verdict.level == "none"
    assert any("expected further gain" in line for line in verdict.lines())


def test_one_trial_says_nothing() -> None:
    assert detect(points([0.5], random_places(1)), dimensions=6, startup=10) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_test_agrees_with_counting_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = np.round(rng.normal(0.2, 1, 8), 1)
    moved = differences[differences != 0]
    size = np.abs(moved)
    ranks = np.array([(size < s).sum() + ((size == s).sum() + 1) / 2 for s in size])
    observed = ranks[moved > 0].sum()
    signs = np.array(np.meshgrid(*[[0, 1]] * len(moved))).reshape(len(moved), -1)
    assert signed_rank_p(differences) == pytest.approx(np.mean(ranks @ signs >= observed - 1e-9))
