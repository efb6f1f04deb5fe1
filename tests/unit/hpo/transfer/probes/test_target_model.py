"""The surrogate of a search, the model of a target with shifted rates, and what its proposals are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpo.transfer.probes.shifted import Observed, TargetModel, TargetPosterior
from hpo.transfer.probes.surrogate import Kernel, Surrogate, fit
from tests.bench import bench_target_model as bench
from tests.bench.bench_probe_grid import read_grid

DECADE_D = np.array([0.5, 0.0])


def wave(x_ND: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 - 2 * (x_ND[:, 0] - 0.4) ** 2)


def places(count: int, dimensions: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, dimensions))


def scores_of(source: Surrogate, x_MD: np.ndarray) -> np.ndarray:
    return np.asarray(source.centre + source.scale * source.mean(x_MD))


def test_the_kernel_is_matern_with_its_known_values() -> None:
    kernel = Kernel((2.0,), amplitude=3.0)
    r = math.sqrt(5) * 0.5
    expected = 3 * (1 + r + r**2 / 3) * math.exp(-r)
    assert kernel.matrix(np.array([[0.0]]), np.array([[0.0], [1.0]])).tolist() == [
        [3.0, pytest.approx(expected)]
    ]


def test_a_surrogate_predicts_between_its_trials_and_knows_where_it_does_not() -> None:
    x_ND, elsewhere_MD = places(30), places(200, seed=1)
    source = fit(x_ND, wave(x_ND).tolist(), [0.0] * 30)
    assert np.abs(scores_of(source, elsewhere_MD) - wave(elsewhere_MD)).max() < 0.05
    near, far = (np.diag(source.covariance(x, x))[0] for x in (x_ND[:1], np.array([[4.0, 4.0]])))
    assert near < 0.05 < far <= source.kernel.amplitude + 1e-9


def test_the_posterior_is_that_of_the_joint_normal_distribution() -> None:
    """R&W eq. 2.25 and 2.26, written out with an inverse."""
    x_ND, x_MD = places(6), places(3, seed=2)
    y_N, noise_N = np.sin(5 * x_ND[:, 0]), np.full(6, 0.1)
    kernel = Kernel((0.5, 1.0), 1.3)
    source = Surrogate(x_ND, y_N, noise_N, kernel)
    inverse = np.linalg.inv(kernel.matrix(x_ND, x_ND) + np.diag(noise_N))
    cross = kernel.matrix(x_MD, x_ND)
    np.testing.assert_allclose(source.mean(x_MD), cross @ inverse @ y_N, atol=1e-10)
    expected = kernel.matrix(x_MD, x_MD) - cross @ inverse @ cross.T
    np.testing.assert_allclose(source.covariance(x_MD, x_MD), expected, atol=1e-10)


def test_a_setting_without_influence_gets_the_longer_length() -> None:
    x_ND = places(30)
    lengths = fit(x_ND, wave(x_ND).tolist(), [0.01] * 30).kernel.lengths
    assert lengths[1] > 3 * lengths[0]


def test_a_dozen_trials_of_noise_in_eight_settings_are_not_overfitted() -> None:
    """Predictions at other places stay near the mean: a fit without priors would follow the noise."""
    x_ND, random = places(12, 8), np.random.default_rng(5)
    apart = []
    for _ in range(5):
        source = fit(x_ND, random.normal(0, 0.1, 12).tolist(), [0.1] * 12)
        apart.append(np.std(scores_of(source, places(200, 8, seed=3))))
    assert np.mean(apart) < 0.05


def test_equal_scores_and_a_single_trial_are_fitted() -> None:
    assert scores_of(fit(places(6), [0.3] * 6, [0.0] * 6), places(3)) == pytest.approx(0.3)
    assert scores_of(fit(places(1), [0.3], [0.1]), places(3)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="needs a trial"):
        fit(places(0), [], [])


def test_the_same_trials_give_the_same_fit() -> None:
    x_ND = places(12)
    one, other = (fit(x_ND, wave(x_ND).tolist(), [0.05] * 12) for _ in range(2))
    assert one.kernel == other.kernel and one.spread == other.spread


# The target


def model(decade_D: np.ndarray = DECADE_D) -> TargetModel:
    x_ND = places(30)
    return TargetModel(fit(x_ND, wave(x_ND).tolist(), [0.01] * 30), decade_D)


def after(
    shift: float, count: int = 10, *, b: float = 1.0, a: float = 0.0, decade_D: np.ndarray = DECADE_D
) -> TargetPosterior:
    """After trials at rates that the search has tried as well, seen from the shifted target."""
    x_nD = places(count, seed=4)
    x_nD[:, 0] = 0.75 * x_nD[:, 0] + (0.25 if shift > 0 else 0.0)
    scores = a + b * wave(x_nD - shift * DECADE_D)
    return model(decade_D).after(Observed(x_nD, scores.tolist(), [0.01] * count))


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.4])
def test_a_known_shift_of_the_rates_is_found(shift: float) -> None:
    """On a target of another level and scale, as another base has."""
    mean, low, high = after(shift, b=1.2, a=-0.3).shift()
    assert mean == pytest.approx(shift, abs=0.12) and low - 0.05 <= shift <= high + 0.05


def test_before_there_is_evidence_the_rules_are_right_within_half_a_decade() -> None:
    one = model().after(Observed(np.array([[0.4, 0.5]]), [0.5], [0.05]))
    mean, low, high = one.shift()
    assert abs(mean) < 0.15 and low < -0.3 and high > 0.3


def test_without_a_searched_rate_nothing_is_shifted() -> None:
    assert after(0.3, decade_D=np.zeros(2)).shift() == (0.0, 0.0, 0.0)


def test_a_target_that_contradicts_the_source_is_not_predicted_by_it() -> None:
    """Few trials, all in the opposite order: the share of the source shrinks to nothing."""
    x_nD = places(8, seed=4)
    against = model(np.zeros(2)).after(Observed(x_nD, (-wave(x_nD)).tolist(), [0.01] * 8))
    agreeing = model(np.zeros(2)).after(Observed(x_nD, wave(x_nD).tolist(), [0.01] * 8))
    none = [one.weight_SBT.sum((0, 2))[0] for one in (against, agreeing)]
    assert none[0] > 0.5 and none[1] < 0.05


def test_predictions_pass_through_what_was_measured_and_are_sure_there() -> None:
    x_nD = places(5, seed=4)
    scores = [0.1, 0.3, 0.2, 0.4, 0.0]
    posterior = model().after(Observed(x_nD, scores, [0.001] * 5))
    mean_n, deviation_n = posterior.predict(x_nD)
    assert np.abs(mean_n - scores).max() < 0.06
    _, elsewhere_M = posterior.predict(np.array([[1.5, 0.5]]))
    assert elsewhere_M[0] > deviation_n.max()


def test_the_gain_is_positive_and_highest_where_the_shifted_source_is() -> None:
    """Three trials show that higher rates are better; the next one is at a higher rate than they had."""
    x_nD = np.array([[0.2, 0.5], [0.4, 0.5], [0.55, 0.5]])
    posterior = model().after(Observed(x_nD, wave(x_nD - 0.6 * DECADE_D).tolist(), [0.01] * 3))
    ladder_MD = np.array([[rate, 0.5] for rate in np.linspace(0, 1.4, 29)])
    gains_M = posterior.gains(ladder_MD)
    assert (gains_M >= 0).all() and ladder_MD[int(np.argmax(gains_M)), 0] == pytest.approx(0.7, abs=0.15)
    difference, deviation = posterior.apart(2, 0)
    assert difference > 0 and deviation < difference


# Its worth: 32 seeds, shifts drawn for each

SEEDS, PLACES = 32, 160


def simulated(way: str, noise: float = 0.04) -> np.ndarray:
    shifts = np.random.default_rng(11).normal(0, 0.4, SEEDS)
    return np.array([bench.regrets(way, float(s), noise, [seed], PLACES)[0] for seed, s in enumerate(shifts)])


def test_a_few_trials_find_better_settings_than_rules_or_chance() -> None:
    """Regrets on 32 simulated pairs of surfaces; the interval is over seeds, paired."""
    found = simulated("model, 6 trials")
    for way in ("rules alone", "winner and random places, 6 trials", "random search on the target, 6 trials"):
        gain = simulated(way) - found
        assert gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(len(gain)), way
        assert found.mean() < 0.8 * simulated(way).mean(), way


def test_rates_that_are_right_are_not_made_worse() -> None:
    rules, chosen = (
        bench.regrets(way, 0.0, 0.04, range(SEEDS), PLACES) for way in ("rules alone", "model, 4 trials")
    )
    assert chosen.mean() < rules.mean()


def test_the_docs_show_the_recorded_rates_and_whole_runs_pay_there() -> None:
    """The recording decides: with a rate that is off by up to 1.5 octaves, four whole runs lose less than half.

    Other machines may choose a neighbouring rate, so the means are compared, not every digit."""
    cells = read_grid()
    shown, now = (
        [row.split(" | ") for row in text.splitlines() if row.startswith(("| model", "| no", "| ladder"))]
        for text in (
            bench.DOCS.read_text(encoding="utf-8")
            .split(bench.BEGIN_RECORDED)[1]
            .split(bench.END_RECORDED)[0],
            bench.recorded(cells),
        )
    )
    assert [row[0] for row in shown] == [row[0] for row in now]
    means = [[float(row[-1].strip(" |")) for row in rows] for rows in (shown, now)]
    assert means[0] == pytest.approx(means[1], abs=0.03)
    none, four = means[1][:2]
    assert four < none / 2
