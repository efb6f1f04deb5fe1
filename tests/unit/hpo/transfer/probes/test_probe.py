"""Probes: the choice of the next probe, and when a change is accepted."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hpo.transfer.probes.design import (
    DEFAULT,
    DESIGNS,
    TEXT_ON,
    Design,
    Grid,
    Ladder,
    Probe,
    ProbeScore,
    Scope,
    agreement,
    find,
    horizon_shift,
    search_is_better,
)

PROMPTS = np.linspace(-0.2, 0.2, 12)


def curve(
    top: float, height: float = 1.0, off: float = -0.05, curvature: float = 0.1
) -> Callable[[Probe], float]:
    """A score that decreases with the squared distance from ``top`` in octaves."""

    def score(probe: Probe) -> float:
        level = height - curvature * (probe.octaves - top) ** 2 + (0.0 if probe.text_encoder else off)
        return level - {DEFAULT: 0.2, "diverse 1": 0.1, "diverse 2": 0.15}.get(probe.candidate, 0.0)

    return score


def measured(probe: Probe, score: Callable[[Probe], float], noise: float = 0.0, seed: int = 0) -> ProbeScore:
    """An outcome with scores by prompt.  ``noise`` is added by prompt and independent in each probe."""
    key = zlib.crc32(f"{seed} {probe.octaves:.3f} {probe.text_encoder} {probe.candidate}".encode())
    extra = np.random.default_rng(key).normal(0, noise, len(PROMPTS))
    prompts = tuple(float(v) for v in score(probe) + PROMPTS + extra)
    return ProbeScore(probe, float(np.mean(prompts)), 0.05, prompts)


def played(
    design: Design, scope: Scope, score: Callable[[Probe], float], noise: float = 0.0
) -> list[ProbeScore]:
    outcomes: list[ProbeScore] = []
    while (probe := design.next(outcomes, scope)) is not None:
        assert find(outcomes, probe) is None, "a probe is never made twice"
        outcomes.append(measured(probe, score, noise))
    return outcomes


ALL = (DEFAULT, "diverse 1", "diverse 2")


def test_six_probes_of_the_ladder_come_in_the_order_of_the_facts() -> None:
    roles = [o.probe.role for o in played(Ladder(), Scope(6, ALL), curve(0.5))]
    assert roles[:5] == [
        "transferred",
        "default",
        "transferred, rate × 0.5",
        "transferred, rate × 2",
        "diverse 1",
    ]
    assert roles[5] == "transferred, rate × 1.41"  # the parabola's top, half an octave up


def test_more_probes_switch_the_text_encoders_off_and_try_another_candidate() -> None:
    roles = [o.probe.role for o in played(Ladder(), Scope(8, ALL), curve(0.5))]
    assert roles[6] == "transferred, rate × 1.41, text encoders off" and roles[7] == "diverse 2"


def test_text_encoders_that_are_not_trained_are_switched_on_instead() -> None:
    scope = Scope(8, (*ALL, TEXT_ON), trains_text_encoder=False)
    roles = [o.probe.role for o in played(Ladder(), scope, curve(0.5))]
    assert roles[6] == "text encoders on" and not any("off" in role for role in roles)


def test_beyond_the_bracket_the_ladder_is_extended_within_the_limits() -> None:
    high = played(Ladder(), Scope(6, ALL), curve(3.0))
    assert high[5].probe.octaves == 2.0
    bounded = played(Ladder(), Scope(6, ALL, high=1.5), curve(3.0))
    assert bounded[5].probe.octaves == 1.5
    assert all(o.probe.octaves >= -0.5 for o in played(Ladder(), Scope(8, ALL, low=-0.5), curve(0.0)))


def test_without_other_candidates_the_probes_go_to_what_is_left() -> None:
    outcomes = played(Ladder(), Scope(6), curve(0.5))
    assert {o.probe.candidate for o in outcomes} == {"transferred"} and len(outcomes) >= 5
    no_text = played(Ladder(), Scope(8, trains_text_encoder=False), curve(0.5))
    assert all(o.probe.text_encoder for o in no_text)


def test_the_grid_is_rates_with_text_encoders_on_and_off() -> None:
    outcomes = played(Grid(), Scope(8), curve(0.0))
    found = {(round(2**o.probe.octaves, 2), o.probe.text_encoder) for o in outcomes}
    assert found == {(rate, text) for rate in (0.5, 0.77, 1.0, 1.5) for text in (True, False)}


@pytest.mark.parametrize("design", DESIGNS.values(), ids=list(DESIGNS))
def test_a_transferred_value_that_is_right_stays(design: Design) -> None:
    scope = Scope(8, ALL)
    for seed in range(5):
        outcomes = [measured(o.probe, curve(0.0), 0.1, seed) for o in played(design, scope, curve(0.0))]
        decision = design.decide(outcomes, scope)
        assert decision.keeps or abs(decision.probe.octaves) <= 0.6


@pytest.mark.parametrize("design", DESIGNS.values(), ids=list(DESIGNS))
def test_a_real_gain_is_taken_with_its_interval(design: Design) -> None:
    scope = Scope(8, ALL)
    outcomes = played(design, scope, curve(1.0, curvature=0.3), noise=0.01)
    decision = design.decide(outcomes, scope)
    assert not decision.keeps and decision.probe.octaves == pytest.approx(1.0, abs=0.25)
    assert 0 < decision.low < decision.gain < decision.high


@pytest.mark.parametrize("design", DESIGNS.values(), ids=list(DESIGNS))
def test_a_gain_within_the_noise_is_not_believed(design: Design) -> None:
    scope = Scope(8, ALL)
    score = curve(0.0, curvature=0.01, off=0.0)
    probes = [o.probe for o in played(design, scope, score)]
    taken = 0
    for seed in range(20):
        decision = design.decide([measured(p, score, 0.6, seed) for p in probes], scope)
        assert decision.reason
        taken += not decision.keeps
    assert taken <= 8  # with one standard error, noise alone is accepted in a sixth of the cases each way


def test_the_horizon_of_short_runs_is_taken_back() -> None:
    """On the source, short runs prefer a rate half an octave higher; the target's optimum is corrected by this."""
    probes = [o.probe for o in played(Grid(), Scope(8), curve(0.0))]
    short, whole = ([measured(p, curve(top)) for p in probes] for top in (0.5, 0.0))
    shift = horizon_shift(short, whole)
    assert shift == pytest.approx(0.5)
    target = [measured(p, curve(0.5, curvature=0.3), 0.01) for p in probes]
    assert Grid().decide(target, Scope(8)).probe.octaves == pytest.approx(0.5, abs=0.1)
    assert abs(Grid().decide(target, Scope(8), shift).probe.octaves) < 0.1
    assert horizon_shift(short, [measured(p, curve(0.0, curvature=-0.1)) for p in probes]) is None


def test_a_curve_without_a_top_keeps_the_rate() -> None:
    outcomes = played(Grid(), Scope(8), curve(0.0, curvature=-0.2))
    assert Grid().decide(outcomes, Scope(8)).keeps


def test_text_encoders_are_switched_off_only_for_a_real_gain() -> None:
    outcomes = played(Grid(), Scope(8), curve(0.0, off=0.2), noise=0.01)
    assert not Grid().decide(outcomes, Scope(8)).probe.text_encoder
    outcomes = played(Grid(), Scope(8), curve(0.0, off=-0.2), noise=0.01)
    assert Grid().decide(outcomes, Scope(8)).probe.text_encoder


def test_without_its_own_score_the_transferred_value_stays() -> None:
    for design in DESIGNS.values():
        assert design.decide([measured(Probe(octaves=1.0), curve(1.0))], Scope(6)).keeps


def scores(values: Sequence[float]) -> list[float]:
    return [float(v) for v in values]


def test_agreement_has_exact_p_and_says_when_it_is_inconclusive() -> None:
    few = agreement(scores([1, 2, 3, 4]), scores([1, 2, 3, 4]))
    assert few is not None and few.kendall.p == pytest.approx(2 / math.factorial(4)) and not few.conclusive
    assert "inconclusive" in few.line() and "0.083" in few.line()
    many = agreement(scores(range(8)), scores([0, 1, 2, 3, 4, 5, 7, 6]))
    assert many is not None and many.conclusive and "predicts" in many.line()
    against = agreement(scores(range(8)), scores(range(8, 0, -1)))
    assert against is not None and "misleads" in against.line()
    assert agreement([1.0, 2.0], [1.0, 2.0]) is None and agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_a_direct_search_is_named_when_the_usual_settings_win() -> None:
    won = [measured(Probe(), curve(3.0, curvature=0.3)), measured(Probe(DEFAULT), curve(0.0))]
    assert "default settings" in (search_is_better(won, None) or "")
    lost = [measured(Probe(), curve(0.0)), measured(Probe(DEFAULT), curve(0.0))]
    assert search_is_better(lost, None) is None
