"""What hpo status can say about noise where prompts have different numbers of seeds."""

import numpy as np
import pytest

from evaluation.score.formula import Formula, composite
from evaluation.score.statistics import Scale
from hpo.study.noise import _image_scores

SCALE = Scale.of(
    {
        "base_t_P": [0.9, 0.8, 0.7],
        "chance_t_P": [0.1, 0.2, 0.1],
        "base_i_P": [0.2, 0.1, 0.2],
        "real_i": 0.9,
        "t_unit_se": 0.01,
        "i_unit_se": 0.01,
        "asks_for_subject": [True, True, False],
    }
)


def row(prompt: str, seed: int) -> dict[str, object]:
    return {"prompt_id": prompt, "seed": seed, "clip_t": 0.6 + 0.01 * seed, "clip_i": 0.5}


def test_a_prompts_extra_seeds_are_left_out_and_missing_images_are_noticed() -> None:
    even = [row(prompt, seed) for prompt in ("a", "b", "c") for seed in (0, 1)]
    more = [*even, *(row("c", seed) for seed in range(2, 8))]
    found = [_image_scores({"per_image": rows}, ["a", "b", "c"], SCALE) for rows in (even, more)]
    assert found[0] is not None and found[1] is not None
    assert found[0].shape == (3, 2)
    np.testing.assert_array_equal(*found)
    assert _image_scores({"per_image": even[2:]}, ["a", "b", "c"], SCALE) is None
    assert _image_scores(None, ["a", "b", "c"], SCALE) is None


@pytest.mark.parametrize("formula", [{}, {"mean": "harmonic"}, {"likeness": 4.0}], ids=str)
def test_images_are_weighed_as_the_study_weighs_them(formula: dict[str, object]) -> None:
    rows = [row(prompt, seed) for prompt in ("a", "b", "c") for seed in (0, 1)]
    found = _image_scores({"per_image": rows, "formula": formula}, ["a", "b", "c"], SCALE)
    t = (0.605 - np.mean([0.1, 0.2, 0.1])) / np.mean([0.8, 0.6, 0.6])
    i = (0.5 - 0.15) / (0.9 - 0.15)
    assert found is not None
    expected = composite(np.array(t), np.array(i), Formula(**formula))  # type: ignore[arg-type]
    assert found.mean() == pytest.approx(float(expected))
