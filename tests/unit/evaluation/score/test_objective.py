"""What the sampler is told where the score is 0: the form, the replay that chose it, and a search that climbs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluation.score.formula import CEILING, SIGNED, Formula, composite, objective, told_part
from tests import objectives, ranking
from tests.places import ROOT
from tests.ranking import Recorded

FORMULAS = [
    Formula(*values, below_zero=SIGNED)
    for values in (("geometric",), ("geometric", 1.0, 3.0), ("harmonic",), ("harmonic", 0.5, 2.0))
]
PARTS = np.array([-5.0, -1.0, -0.78, -0.083, -0.018, -1e-6, 0.0, 1e-6, 0.02, 0.5, 1.0, CEILING, 1.4])


@pytest.fixture(scope="module")
def found() -> Recorded:
    return ranking.read()


@pytest.fixture(scope="module")
def forms(found: Recorded) -> dict[str, objectives.Agreement]:
    return objectives.agreements(found)


@pytest.fixture(scope="module")
def climbs(found: Recorded) -> dict[str, np.ndarray]:
    return objectives.climbs(found)


def grid() -> tuple[np.ndarray, np.ndarray]:
    t, i = np.meshgrid(PARTS, PARTS, indexing="ij")
    return t, i


@pytest.mark.parametrize("formula", FORMULAS, ids=Formula.words)
def test_the_score_is_the_objective_without_what_is_below_zero(formula: Formula) -> None:
    t, i = grid()
    score, told = composite(t, i, formula), objective(t, i, formula)
    np.testing.assert_allclose(score, np.maximum(told, 0), atol=1e-15)
    assert (told > -1).all(), "an infeasible trial is below every measured one"
    np.testing.assert_array_equal(
        objective(t, i, Formula(formula.mean)), composite(t, i, Formula(formula.mean))
    )


@pytest.mark.parametrize("formula", FORMULAS, ids=Formula.words)
def test_the_objective_rises_with_each_part_and_has_no_step(formula: Formula) -> None:
    t, i = grid()
    told, below = objective(t, i, formula), composite(t, i, formula) == 0
    for axis, part in ((0, t), (1, i)):
        rise = np.diff(told, axis=axis)
        assert (rise >= -1e-15).all(), "monotone"
        first = np.take(below, range(len(PARTS) - 1), axis=axis)
        either = np.take(np.minimum(t, i) < 0, range(len(PARTS) - 1), axis=axis)
        capped = np.take(part, range(len(PARTS) - 1), axis=axis) >= CEILING
        assert (rise[first & either & ~capped] > 0).all(), "never flat where a part is below 0"
    for fixed, side in itertools.product((-0.3, 0.0, 0.2, 1.0), (-1e-9, 1e-9)):
        for parts in ((fixed, side), (side, fixed)):
            near, at = (
                objective(np.array(p[0]), np.array(p[1]), formula) for p in (parts, np.round(parts, 6))
            )
            assert abs(float(near - at)) < 1e-2, "continuous at 0"


def test_a_part_alone_is_told_below_zero_too() -> None:
    told = [told_part(float(part), SIGNED) for part in PARTS]
    assert told == sorted(told) and min(told) > -1 and told[-1] == CEILING
    assert len(set(told[:-2])) == len(PARTS) - 2
    assert [told_part(part, "clipped") for part in (-0.5, 0.4, 1.3)] == [0.0, 0.4, CEILING]


def test_six_trials_that_were_all_told_zero_are_in_order() -> None:
    """The trials of the issue: likeness from −0.083 to −0.018, prompt following as the base's."""
    alike = np.linspace(-0.083, -0.018, 6)
    assert (composite(np.ones(6), alike) == 0).all()
    assert (np.diff(objective(np.ones(6), alike, FORMULAS[0])) > 0).all()
    lost = objective(np.linspace(1, -0.5, 6), np.full(6, -0.02), FORMULAS[0])
    assert (np.diff(lost) < 0).all(), "prompt following lost counts as lost"


def test_the_chosen_form_ranks_best_below_zero_of_those_that_keep_the_score(
    forms: dict[str, objectives.Agreement],
) -> None:
    chosen = next(of for name, of in forms.items() if "chosen" in name)
    keeping = [of for name, of in forms.items() if of.above == chosen.above and of is not chosen]
    assert len(keeping) == 4, "the others change the order of what scores above 0"
    assert chosen.below > 0.55 and all(chosen.below > of.below + 0.05 for of in keeping)
    assert all(chosen.kendall >= of.kendall for of in keeping)


def test_a_sampler_finds_the_hill_from_a_flat_start(climbs: dict[str, np.ndarray]) -> None:
    """Ten trials that learn nothing: told as 0 they say nothing, told as they are they say where to go."""
    clipped, signed, waiting = climbs.values()
    assert all((best[:, :10] == 0).all() for best in climbs.values()), "the start is flat"
    stuck = [int((best[:, 19] == 0).sum()) for best in climbs.values()]
    assert stuck[0] >= 5 and max(stuck[1:]) <= 1, stuck
    assert min(signed[:, 19].mean(), waiting[:, 19].mean()) > clipped[:, 19].mean() + 0.1
    assert np.median(signed[:, 14]) > 0.5


def test_noise_alone_does_not_hold_a_search_at_its_start(found: Recorded) -> None:
    """Where trials that learn nothing differ by noise only, a model of them stays where it is; random proposals
    do not."""
    clipped, signed, waiting = (
        int((best[:, 19] == 0).sum()) for best in objectives.climbs(found, everywhere=True).values()
    )
    assert waiting <= 1 < 3 <= min(clipped, signed)


def test_the_page_shows_this_replay(
    forms: dict[str, objectives.Agreement], climbs: dict[str, np.ndarray]
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for line in (*objectives.form_lines(forms), *objectives.climb_lines("as recorded", climbs)):
        assert line in page, line
