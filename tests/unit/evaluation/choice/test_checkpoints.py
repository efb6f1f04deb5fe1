"""The choice of a checkpoint and the comparison of two bases, on constructed scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.choice.checkpoints import (
    NO_BETTER,
    SPOILED,
    UNCHANGED,
    CheckpointPoint,
    choose,
    confirmed,
    finalists,
    no_better_sentence,
    verdict,
)
from evaluation.choice.compare import ComparedSide, compare, told_apart
from evaluation.choice.pictures import CELL_PX, Column, contact_sheet, curve_picture
from evaluation.images.images import SampledImage
from evaluation.prompts.prompts import Prompt, PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.formula import SIGNED, Formula, objective
from evaluation.score.score import ImageScore, Score, anchored, composite
from hpo.judge.outcome import Evaluated
from trainer.errors import ConfigError, ModelFileError

PROMPTS = 8
IDS = tuple(f"p{n}" for n in range(PROMPTS))
SET = PromptSet(tuple(Prompt(f"luca figure {n}", f"figure {n}", "altered") for n in range(PROMPTS)), (0,))


def anchors(base: str = "b", t: float = 0.3, i: float = 0.1) -> Anchors:
    """t = (T − 0.1) / (t − 0.1), i = (I − i) / (0.9 − i)."""
    identity = {
        "base": base,
        "prompts": "p",
        "sampling": base,
        "scorer": "s",
        "likeness": "l",
        "references": "r",
    }
    every = (True,) * PROMPTS
    return Anchors(
        identity, IDS, every, (t,) * PROMPTS, (0.1,) * PROMPTS, (i,) * PROMPTS, 0.9, 0.01, 0.001, 0.01
    )


def scored(likeness_P: np.ndarray, scale: Anchors, t: float = 0.3) -> Score:
    """A score with a given anchored likeness per prompt."""
    raw_P = np.asarray(likeness_P) * (0.9 - scale.base_i_P[0]) + scale.base_i_P[0]
    rows = tuple(ImageScore(p, 0, t, float(raw)) for p, raw in zip(IDS, raw_P, strict=True))
    t_P, i_P = np.full(PROMPTS, t), raw_P
    following, alike = anchored(t_P, i_P, scale, np.ones((1, PROMPTS)))
    return Score(
        value=float(composite(following, alike)[0]), se=0.1, prompt_following=float(following[0]),
        prompt_following_se=0.02, likeness=float(alike[0]), likeness_se=0.1, clip_t=t,
        clip_i=float(i_P.mean()), n_images=PROMPTS, scorer="s", scorer_sha="s",
        likeness_encoder="l", likeness_sha="l", anchors_key=scale.key, per_image=rows,
    )  # fmt: skip


EASY_AND_HARD = np.linspace(-0.3, 0.3, PROMPTS)  # prompts differ much more than checkpoints do
WOBBLE = np.array([0.01, -0.01] * (PROMPTS // 2))


def curve(*means: float, wobble: float = 1.0) -> list[CheckpointPoint]:
    """Checkpoints whose likeness has these means; prompts vary a lot, differences between checkpoints little."""
    scale = anchors()
    return [
        CheckpointPoint(
            f"zed-{n:06d}", n, 10 * n, scored(mean + EASY_AND_HARD + wobble * WOBBLE * (n % 3), scale)
        )
        for n, mean in enumerate(means, 1)
    ]


def test_a_clear_best_is_chosen_though_the_error_bars_overlap() -> None:
    points = curve(0.4, 0.5, 0.6, 0.55)
    choice = choose(points, anchors())
    assert all(point.score and point.score.se > 0.09 for point in points)
    assert (choice.best, choice.chosen, choice.within) == (2, 2, (2,))
    lead = choice.lead[1]
    assert lead is not None and lead.se < 0.02 and lead.low > 0


@pytest.mark.parametrize("best", [0, 1, 2])
def test_every_checkpoint_counts_not_only_the_last(best: int) -> None:
    """Scoring only the final epoch would be a fault (see tests/unit/hpo/search/test_origin_faults.py)."""
    points = curve(*(0.6 if n == best else 0.4 for n in range(3)))
    choice = choose(points, anchors())
    assert choice.best == choice.chosen == best


def test_the_earliest_of_those_that_cannot_be_told_apart_is_chosen() -> None:
    points = curve(0.4, 0.598, 0.599, 0.6, wobble=3)
    choice = choose(points, anchors())
    assert choice.best == 3 and choice.chosen == 1 and choice.within == (1, 2, 3)


def test_checkpoints_without_a_score_are_never_chosen() -> None:
    points = [replace(curve(0.9)[0], score=None, reason="black"), *curve(0.4, 0.5)]
    choice = choose(points, anchors())
    assert choice.best == choice.chosen == 2 and choice.lead[0] is None
    assert 0 not in finalists(points, choice)
    with pytest.raises(ModelFileError, match="none of 1 checkpoints can be scored: black"):
        choose(points[:1], anchors())


@pytest.mark.parametrize(
    ("means", "word", "says"),
    [
        ((0.4, 0.5, 0.6), "undertrained", "max_train_epochs"),
        ((0.6, 0.5, 0.4), "overtrained", "learning_rate"),
        ((0.4, 0.6, 0.5), "between", "right"),
        ((0.6,), "single", "save_every_n_epochs"),
        ((-0.2,), "no better than the untrained base", "train longer"),
    ],
)
def test_the_verdict_is_where_the_best_lies_and_what_to_do(
    means: tuple[float, ...], word: str, says: str
) -> None:
    points = curve(*means)
    found = verdict(points, choose(points, anchors()))
    assert found.word == word and says in found.advice


def test_a_flat_end_is_no_reason_to_train_longer() -> None:
    points = curve(0.4, 0.599, 0.6, wobble=3)
    found = verdict(points, choose(points, anchors()))
    assert found.word == "undertrained" and "zed-000002 cannot be told apart" in found.why
    assert "would gain little" in found.advice


def test_a_flat_curve_and_one_at_zero_are_said_as_such() -> None:
    flat = curve(0.6, 0.5, 0.599, wobble=3)
    assert "the curve is flat" in verdict(flat, choose(flat, anchors())).advice
    nothing = curve(-0.5, -0.6, -0.7)
    assert verdict(nothing, choose(nothing, anchors())).word == "no better than the untrained base"


def test_a_run_that_still_trains_is_told_to_go_on() -> None:
    points = curve(0.4, 0.5, 0.6)
    assert "run to its end" in verdict(points, choose(points, anchors()), finished=False).advice


def test_the_choice_the_best_and_the_next_best_are_measured_anew() -> None:
    points = curve(0.3, 0.598, 0.58, 0.6, 0.55, wobble=3)
    choice = choose(points, anchors())
    assert choice.chosen == 1 and finalists(points, choice) == (1, 2, 3)
    fresh = curve(0.3, 0.5, 0.6)
    assert confirmed(choice, (1, 2, 3), choose(fresh, anchors())) == (3, "changed")
    assert confirmed(choice, (1, 2, 3), choose(curve(0.6, 0.5, 0.4), anchors())) == (1, "confirmed")


def test_a_difference_of_bases_is_told_from_one_of_adapters() -> None:
    small, large = anchors("small", t=0.3, i=0.1), anchors("large", t=0.4, i=0.2)
    a = ComparedSide(scored(np.full(PROMPTS, 0.5) + EASY_AND_HARD, small), small)
    b = ComparedSide(scored(np.full(PROMPTS, 0.5) + EASY_AND_HARD, large, t=0.4), large)
    found = compare(a, b)
    assert abs(found.anchored["score"].mean) < 1e-9, "each LoRA does the same for its own base"
    raw = found.cosines
    assert raw["base effect"]["prompt following"].mean == pytest.approx(0.1)
    assert raw["adapter effect"]["prompt following"].mean == pytest.approx(0.0)
    for name in ("prompt following", "likeness"):
        total = raw["base effect"][name].mean + raw["adapter effect"][name].mean
        assert raw["LoRA B − LoRA A"][name].mean == pytest.approx(total)


def test_the_interval_of_a_comparison_is_paired_by_prompt() -> None:
    small, large = anchors("small"), anchors("large")
    a = ComparedSide(scored(0.5 + EASY_AND_HARD, small), small)
    b = ComparedSide(scored(0.55 + EASY_AND_HARD + WOBBLE, large), large)
    found = compare(a, b).anchored["likeness"]
    assert found.mean == pytest.approx(0.05) and found.high - found.low < 0.04 and told_apart(found)
    assert not told_apart(
        compare(a, ComparedSide(scored(0.5 + EASY_AND_HARD + WOBBLE, large), large)).anchored["likeness"]
    )


def test_sides_measured_on_other_prompts_are_refused() -> None:
    scale = anchors()
    other = replace(scale, identity={**scale.identity, "prompts": "q"})
    one = scored(EASY_AND_HARD + 0.5, scale)
    with pytest.raises(ConfigError, match="different prompts"):
        compare(ComparedSide(one, scale), ComparedSide(replace(one, anchors_key=other.key), other))


def test_the_curve_is_drawn_with_its_band_and_its_choice() -> None:
    points = curve(0.3, 0.5, 0.45)
    with_gap = [points[0], replace(points[1], score=None, reason="black"), points[2]]
    plain, gap = (np.asarray(curve_picture(row, 2, 2, (), "zed")).astype(int) for row in (points, with_gap))
    assert plain.shape == (520, 900, 3) and (plain != gap).any()
    other = np.asarray(curve_picture(points, 2, 0, (), "zed")).astype(int)
    assert (plain != other).any(), "the choice must be seen"


def test_bases_of_different_sizes_are_shown_at_the_same_size() -> None:
    def images(side: int, grey: int) -> list[SampledImage]:
        return [
            SampledImage(p.id, 0, np.full((side, side, 3), (200, 0, grey), np.uint8)) for p in SET.prompts
        ]

    sheet = np.asarray(
        contact_sheet([Column("small", images(64, 10)), Column("large", images(128, 20))], SET)
    )
    cells = [int((sheet == (200, 0, grey)).all(axis=2).sum()) for grey in (10, 20)]
    assert cells == [PROMPTS * CELL_PX**2] * 2


def test_a_prompt_with_seeds_of_its_own_is_on_the_sheet_with_its_first() -> None:
    prompts = PromptSet((SET.prompts[0], replace(SET.prompts[1], seeds=(70, 71))), (0, 1))
    blue = [
        SampledImage(p.id, seed, np.full((64, 64, 3), (0, 0, 255 if seed in (0, 70) else 99), np.uint8))
        for p, seed in prompts.jobs
    ]
    sheet = np.asarray(contact_sheet([Column("a", blue)], prompts))
    assert int((sheet == (0, 0, 255)).all(axis=2).sum()) == 2 * CELL_PX**2


def without(points: list[CheckpointPoint], causes: dict[int, tuple[str, str]]) -> list[CheckpointPoint]:
    """The curve with these points unscored: number → (cause, reason)."""
    return [
        replace(p, score=None, cause=causes[n][0], reason=causes[n][1]) if n in causes else p
        for n, p in enumerate(points)
    ]


BLACK, SAME, DAMAGED = (SPOILED, "32 images show nothing"), (UNCHANGED, "it changes nothing"), ("", "cut off")


@pytest.mark.parametrize(
    ("causes", "means", "word", "why"),
    [
        ({2: BLACK}, (0.3, 0.5, 0.1), "overtrained", "a later checkpoint is unusable: zed-000003: 32 images"),
        (
            {0: SAME, 1: SAME, 3: BLACK},
            (0.1, 0.1, 0.6, 0.1),
            "overtrained",
            "zed-000003 is the best; a later checkpoint is unusable",
        ),
        ({1: BLACK, 2: BLACK}, (0.5, 0.1, 0.1), "overtrained", "a later checkpoint is unusable: zed-000002"),
        ({2: DAMAGED}, (0.3, 0.5, 0.1), "undertrained", "the last checkpoint that can be scored, zed-000002"),
        ({0: DAMAGED}, (0.3, 0.5, 0.1), "overtrained", "the first checkpoint that can be scored, zed-000002"),
        ({0: SAME}, (0.1, 0.5, 0.3), "between", "neither the first nor the last"),
        ({0: SAME}, (0.1, 0.3, 0.5), "undertrained", "the last checkpoint, zed-000003"),
        ({0: DAMAGED, 1: DAMAGED}, (0.1, 0.3, 0.5), "single", "only zed-000003 can be scored"),
        ({3: BLACK}, (0.3, 0.5, 0.4, 0.1), "between", "neither the first nor the last"),
    ],
)
def test_what_lies_beside_the_best_without_a_score_is_not_passed_over(
    causes: dict[int, tuple[str, str]], means: tuple[float, ...], word: str, why: str
) -> None:
    points = without(curve(*means), causes)
    found = verdict(points, choose(points, anchors()))
    assert found.word == word and why in found.why, found


def test_of_checkpoints_that_all_score_zero_the_best_is_the_one_with_the_highest_objective() -> None:
    scale = anchors()
    points = [
        CheckpointPoint(f"zed-{n}", n, n, signed(scored(np.full(PROMPTS, mean), scale), scale))
        for n, mean in enumerate((-0.08, -0.02, -0.05), 1)
    ]
    choice = choose(points, scale)
    assert [p.score.value for p in points if p.score] == [0.0] * 3
    assert choice.best == choice.chosen == 1 and choice.within == (1,)
    assert verdict(points, choice).word == NO_BETTER


def signed(score: Score, scale: Anchors) -> Score:
    """The score as a study with signed values has it."""
    formula = Formula(below_zero=SIGNED)
    told = float(objective(np.array(score.prompt_following), np.array(score.likeness), formula))
    return replace(score, formula=formula, objective=told, objective_se=0.01)


@pytest.mark.parametrize(
    ("likeness", "t", "says"),
    [
        (0.15, 0.3, "no better than the untrained base within the noise: likeness 0.150 ± 0.100 (base: 0)"),
        (-0.3, 0.3, "likeness -0.300"),
        (0.8, 0.1, "prompt following 0.000 ± 0.020 (base: 1)"),  # nothing of the prompt
        (0.2, 0.3, ""),
    ],
)
def test_a_lora_no_better_than_the_base_is_said_to_be_so(likeness: float, t: float, says: str) -> None:
    point = replace(curve(0.5)[0], score=scored(np.full(PROMPTS, likeness), anchors(), t))
    said = no_better_sentence(point)
    assert (says in said) if says else said == ""


def test_the_best_of_many_has_to_be_further_from_the_base() -> None:
    point = replace(curve(0.5)[0], score=scored(np.full(PROMPTS, 0.2), anchors()))
    assert no_better_sentence(point, among=1) == "" != no_better_sentence(point, among=10)


def test_the_confirmation_decides_whether_the_chosen_one_is_better_than_the_base() -> None:
    points = curve(0.18, 0.19)
    choice = choose(points, anchors())
    outcome = Evaluated(points, choice, verdict(points, choice), (0, 1), (), None, 1, "unconfirmed")
    assert "zed-000002 is no better" in outcome.warning, (
        "the better of two, 1.9 standard errors above the base"
    )
    again = replace(outcome, retested=curve(0.3, 0.4), rechoice=choice)
    assert again.warning == ""
    assert "no better" in replace(again, retested=curve(0.3, 0.1)).warning
