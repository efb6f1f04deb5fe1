"""Tests of evaluation.score.anchors and evaluation.score.score: the maths on fake encoders, the whole path
on a tiny base."""

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.encoders.references import References, embed_references
from evaluation.images.grid import Heading
from evaluation.images.images import SampledImage
from evaluation.images.lettering import RED
from evaluation.images.sampling import sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts.prompts import Prompt, PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.evaluator import Evaluator, make_anchors, measure_anchors
from evaluation.score.score import Score, composite, evaluate_adapter, paired_difference, read_score, score
from tests.tiny import tiny_base
from trainer.adapters.adapter import inject
from trainer.bases.base import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError, DataError, InvalidImages, ModelFileError

scoring = importlib.import_module("evaluation.score.score")  # the door's name is the function
COLOURS = {"red": (250, 40, 40), "green": (40, 250, 40), "blue": (40, 40, 250), "cat": (140, 140, 140)}
PROMPTS = PromptSet(
    (
        Prompt("zkw in red", "cat in red", "train-like"),
        Prompt("zkw in green", "cat in green", "altered"),
        Prompt("zkw in blue", "cat in blue", "style"),
        Prompt("a cat", "a cat", "class-only"),
    ),
    (0, 1),
    "zkw",
    "cat",
)
CONFIG = SampleConfig(width_px=64, height_px=64, steps=2, batch_size=4)


class Colours:
    """A scorer that sees the mean colour, and reads the last word of a text."""

    name, sha = "colours", "sha-colours"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def text_features(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        return torch.nn.functional.normalize(
            torch.tensor([COLOURS[t.split()[-1]] for t in texts]).float(), dim=1
        )

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        means = np.stack([image.reshape(-1, 3).mean(0) for image in images])
        return torch.nn.functional.normalize(torch.from_numpy(means).float(), dim=1)


class Texture:
    """A likeness encoder that sees which half of an image is brighter, not its colour."""

    name, sha = "texture", "sha-texture"

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        halves = [[i[:8].mean(), i[8:].mean()] for i in (image.astype(float) for image in images)]
        return torch.nn.functional.normalize(torch.tensor(halves).float(), dim=1)


def picture(colour: str, subject: float, noise: int) -> np.ndarray:
    """An image of a colour; ``subject`` 0..1 darkens the lower half, as in the references."""
    rng = np.random.default_rng(noise)
    pixels = (
        np.broadcast_to(np.float64(COLOURS[colour]), (16, 16, 3)) * np.linspace(0.9, 1, 16)[None, :, None]
    )
    pixels = pixels + rng.normal(0, 4, (16, 16, 3))
    pixels[8:] *= 1 - 0.8 * subject
    return pixels.clip(0, 255).astype(np.uint8)


def images(
    subject: float, follow: float = 1.0, noise: int = 0, prompts: PromptSet = PROMPTS
) -> list[SampledImage]:
    """One image per prompt and seed: the right colour, mixed with grey by ``follow``."""
    found = []
    for number, prompt in enumerate(prompts.prompts):
        for seed in prompts.seeds:
            right, grey = (
                picture(c, subject, noise + 97 * number + seed) for c in (prompt.text.split()[-1], "cat")
            )
            mixed = (follow * right + (1 - follow) * grey).astype(np.uint8)
            found.append(SampledImage(prompt.id, seed, mixed))
    return found


@pytest.fixture(scope="module")
def references() -> References:
    pixels = [picture("red", 0.9 + n / 50, 1000 + n) for n in range(5)]
    return References(Texture().image_features(pixels), "refs", Texture.sha)


def judged_by(references: References, prompts: PromptSet = PROMPTS, **changes: Any) -> Evaluator:
    """An evaluator with a base that is never sampled."""
    parts = {"scorer": Colours(), "likeness": Texture(), **changes}
    return Evaluator(cast(Base, SimpleNamespace(identity="b")), prompts, CONFIG, references, **parts)


@pytest.fixture(scope="module")
def anchors(references: References) -> Anchors:
    return measure_anchors(judged_by(references), images(0.1))


def scored(found: list[SampledImage], anchors: Anchors, references: References) -> Score:
    return score(found, judged_by(references, anchors=anchors))


def test_the_untrained_base_follows_as_itself_has_no_likeness_and_scores_0(
    anchors: Anchors, references: References
) -> None:
    own = scored(images(0.1), anchors, references)
    assert own.prompt_following == pytest.approx(1) and own.likeness == pytest.approx(0, abs=1e-9)
    assert own.value == pytest.approx(0, abs=1e-4)
    again = scored(images(0.1, noise=5000), anchors, references)
    assert again.prompt_following == pytest.approx(1, abs=0.02) and again.value < 0.15


def test_clip_score_alone_cannot_win(anchors: Anchors, references: References) -> None:
    base, good = scored(images(0.1), anchors, references), scored(images(0.9, 0.9), anchors, references)
    shuffled = images(0.95)  # a perfect subject, but the content of other prompts
    shuffled = [dataclasses.replace(shuffled[k - 2], prompt_id=i.prompt_id) for k, i in enumerate(shuffled)]
    collapsed = scored(shuffled, anchors, references)
    assert base.clip_t > good.clip_t > collapsed.clip_t
    assert good.value > 0.8 and base.value < 0.01
    assert collapsed.likeness > 0.9 and collapsed.prompt_following < 0.2 and collapsed.value < 0.4


def test_the_text_that_is_scored_is_the_rendered_prompt_with_the_class_word(
    anchors: Anchors, references: References
) -> None:
    scorer = Colours()
    score(images(0.5), judged_by(references, scorer=scorer, anchors=anchors))
    assert scorer.texts == ["cat in red", "cat in green", "cat in blue", "a cat"]
    assert [p.text.replace("zkw", "cat") for p in PROMPTS.prompts] == scorer.texts


def test_class_only_prompts_do_not_count_as_likeness(anchors: Anchors, references: References) -> None:
    leaked = images(0.5)
    only_class = [PROMPTS.prompts[3].id]
    leaked = [
        dataclasses.replace(i, pixels_HW3=picture("cat", 0.9, i.seed)) if i.prompt_id in only_class else i
        for i in leaked
    ]
    plain, leaking = scored(images(0.5), anchors, references), scored(leaked, anchors, references)
    assert leaking.likeness == plain.likeness and leaking.clip_i == plain.clip_i
    assert leaking.prompt_following == pytest.approx(plain.prompt_following, abs=0.02)


def test_raw_cosines_and_scorers_are_kept_for_every_image(anchors: Anchors, references: References) -> None:
    result = scored(images(0.5), anchors, references)
    assert [(r.prompt_id, r.seed) for r in result.per_image] == [(i.prompt_id, i.seed) for i in images(0.5)]
    assert result.clip_t == pytest.approx(np.mean([r.clip_t for r in result.per_image]))
    assert (result.scorer, result.scorer_sha, result.likeness_sha) == (
        "colours",
        "sha-colours",
        "sha-texture",
    )
    assert result.anchors_key == anchors.key and result.n_images == 8


def test_chance_is_the_same_images_against_the_other_prompts_texts(anchors: Anchors) -> None:
    colours = Colours()
    red = colours.image_features([picture("red", 0.1, seed) for seed in (0, 1)])
    others = colours.text_features(["green", "blue", "cat"])
    assert anchors.chance_t_P[0] == pytest.approx(float((red @ others.T).mean()), abs=1e-6)
    assert anchors.base_t_P[0] == pytest.approx(
        float((red @ colours.text_features(["red"]).T).mean()), abs=1e-6
    )


def test_real_likeness_leaves_each_reference_itself_out(anchors: Anchors, references: References) -> None:
    features = references.features_RD.double()
    pairs = [float(features[a] @ features[b]) for a in range(5) for b in range(5) if a != b]
    assert anchors.real_i == pytest.approx(np.mean(pairs))
    leave_out = [
        np.mean([p for k, p in enumerate(pairs) if r not in (divmod(k, 4)[0], _other(k))]) for r in range(5)
    ]
    jackknife = np.sqrt(4 / 5 * np.sum((np.array(leave_out) - np.mean(leave_out)) ** 2))
    assert anchors.real_i_se == pytest.approx(jackknife)


def _other(k: int) -> int:
    first, second = divmod(k, 4)
    return second if second < first else second + 1


def test_anchors_that_cannot_be_told_apart_are_reported_and_cannot_blow_up_a_score(
    references: References,
) -> None:
    blind = measure_anchors(
        judged_by(references), images(0.95, 0.0)
    )  # all grey, and as similar to the references as they are to each other
    assert len(blind.problems) == 2 and "prompts" in blind.problems[0] and "references" in blind.problems[1]
    with pytest.raises(DataError, match=r"cannot tell .* ± 0\.\d{4} – use more"):
        blind.require_separable()
    assert 0 <= scored(images(0.9), blind, references).value <= 1.1


def test_sound_anchors_have_no_problems(anchors: Anchors) -> None:
    assert anchors.problems == ()
    anchors.require_separable()


def test_the_composite_is_a_clipped_geometric_mean() -> None:
    values = composite(np.array([1, 0.64, 5, -1, 0.5]), np.array([1, 0.25, 5, 1, 0]))
    np.testing.assert_allclose(values, [1, 0.4, 1.1, 0, 0])


# Statistics


def test_scoring_twice_gives_the_same_number_and_error(anchors: Anchors, references: References) -> None:
    assert scored(images(0.5), anchors, references) == scored(images(0.5), anchors, references)


def test_the_error_is_that_of_prompts_not_of_images(references: References) -> None:
    """Prompts are clusters: copies of the same images under more seeds do not reduce the error."""
    more = PromptSet(PROMPTS.prompts, tuple(range(8)), "zkw", "cat")
    uneven = [0.2, 0.6, 0.9, 0.5]

    def found(prompts: PromptSet) -> list[SampledImage]:
        of = dict(zip([p.id for p in prompts.prompts], uneven, strict=True))
        return [
            SampledImage(p.id, s, picture(p.text.split()[-1], of[p.id], 0))
            for p in prompts.prompts
            for s in prompts.seeds
        ]

    errors = []
    for prompts in (PROMPTS, more):
        evaluator = judged_by(references, prompts)
        base = measure_anchors(evaluator, images(0.1, prompts=prompts))
        errors.append(score(found(prompts), evaluator.with_anchors(base)).se)
    assert errors[0] > 0.02 and errors[1] == pytest.approx(errors[0], rel=0.1)


def test_the_bootstrap_error_agrees_with_the_formula_for_a_mean(
    anchors: Anchors, references: References
) -> None:
    """With a constant scale, t is a mean over prompts: SE = standard deviation / √prompts."""
    flat = dataclasses.replace(
        anchors, base_t_P=(0.9,) * 4, chance_t_P=(0.1,) * 4, base_i_P=(0.1,) * 4, t_unit_se=0.0, i_unit_se=0.0
    )
    result = scored(images(0.5), flat, references)
    t_P = np.array(
        [np.mean([r.clip_t for r in result.per_image if r.prompt_id == p.id]) for p in PROMPTS.prompts]
    )
    assert result.prompt_following_se == pytest.approx(t_P.std() / 0.8 / np.sqrt(4), rel=0.1)


def test_a_paired_difference_is_surer_than_two_errors_side_by_side(
    anchors: Anchors, references: References
) -> None:
    one, two = scored(images(0.5), anchors, references), scored(images(0.6), anchors, references)
    same = paired_difference(one, one, anchors)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    found = paired_difference(two, one, anchors)
    assert found.mean == pytest.approx(two.value - one.value) and 0 < found.low <= found.mean <= found.high
    assert found.high - found.low < 2 * 1.96 * np.hypot(one.se, two.se)
    other_way = paired_difference(one, two, anchors)
    assert other_way.mean == pytest.approx(-found.mean) and other_way.low == pytest.approx(-found.high)


def test_several_training_seeds_on_a_side_are_averaged(anchors: Anchors, references: References) -> None:
    a, b, base = (scored(images(s), anchors, references) for s in (0.5, 0.7, 0.1))
    assert paired_difference([a, b], base, anchors).mean == pytest.approx(
        (a.value + b.value) / 2 - base.value
    )


def test_scores_of_different_scales_are_not_compared(anchors: Anchors, references: References) -> None:
    one = scored(images(0.5), anchors, references)
    other = dataclasses.replace(one, anchors_key="other")
    with pytest.raises(ConfigError, match="different scales"):
        paired_difference(one, other, anchors)


# Refusals


def test_invalid_images_are_never_scored(anchors: Anchors, references: References) -> None:
    bad = images(0.5)
    bad[3] = dataclasses.replace(bad[3], pixels_HW3=np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InvalidImages, match="1 of 8 images are invalid"):
        scored(bad, anchors, references)


def test_anchors_of_another_scorer_prompt_set_or_encoder_are_refused(
    anchors: Anchors, references: References
) -> None:
    other, texture = Colours(), Texture()
    other.sha = "other"
    for match, evaluator in (
        ("a different scorer", judged_by(references, scorer=other)),
        ("a different prompts", judged_by(references, dataclasses.replace(PROMPTS, seeds=(0, 2)))),
        ("a different references", judged_by(dataclasses.replace(references, hash="x"))),
    ):
        with pytest.raises(ConfigError, match=match):
            score(images(0.5), evaluator.with_anchors(anchors))
    texture.sha = "other"
    with pytest.raises(ConfigError, match="a different encoder"):
        score(images(0.5), judged_by(references, likeness=texture, anchors=anchors))


def test_other_prompts_are_not_scored_on_these_ones_anchors(anchors: Anchors, references: References) -> None:
    other = judged_by(references, anchors=anchors).on(dataclasses.replace(PROMPTS, seeds=(0, 2)))
    with pytest.raises(AssertionError, match="make_anchors first"):
        score(images(0.5), other)


def test_a_single_reference_is_refused(tmp_path: Path) -> None:
    paths = []
    for n in range(2):
        Image.fromarray(picture("red", 0.9, n)).save(tmp_path / f"{n}.png")
        paths.append(tmp_path / f"{n}.png")
    with pytest.raises(DataError, match=r"at least 2 images that are not trained on, and there is 1"):
        embed_references(paths[:1], Texture())
    both = embed_references(paths, Texture())
    assert both.features_RD.shape == (2, 2) and both.hash == embed_references(paths[::-1], Texture()).hash


def test_prompts_that_differ_in_the_trigger_only_are_refused(references: References) -> None:
    alike = PromptSet(
        (Prompt("zkw red", "cat red", "altered"), Prompt("cat red", "cat red", "altered")), (0,)
    )
    with pytest.raises(ConfigError, match="all prompts are the same"):
        measure_anchors(judged_by(references, alike), images(0.1, prompts=alike))


# The whole path, on a tiny base


class Anything:
    """A scorer for images and texts of any content: fixed random projections."""

    name, sha = "anything", Colours.sha

    def text_features(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        project = torch.randn(64 * 64 * 3, 8, generator=torch.Generator().manual_seed(0))
        rows = [torch.from_numpy(i.astype(np.float32).reshape(-1) / 255 - 0.5) @ project for i in images]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


@pytest.fixture
def base() -> Base:
    return tiny_base("sd15")


@pytest.fixture
def measured(base: Base, tmp_path: Path) -> Evaluator:
    """An evaluator with anchors of the untrained base."""
    real = References(
        torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(5))),
        "r",
        Anything.sha,
    )
    evaluator = Evaluator(base, PROMPTS, CONFIG, real, Anything(), Anything())
    return evaluator.with_anchors(make_anchors(evaluator, tmp_path / "anchors"))


def sampled_otherwise(evaluator: Evaluator, **changes: int) -> Evaluator:
    return dataclasses.replace(evaluator, sampling=dataclasses.replace(CONFIG, **changes))


def evaluate(measured: Evaluator, folder: Path, **changes: int) -> Score:
    return evaluate_adapter(sampled_otherwise(measured, **changes), folder, identity="w")


def train(base: Base) -> None:
    """Change the weights, as an adapter does."""
    base.unet.conv_out.weight.data.mul_(1.5)


def test_an_adapters_score_its_grid_and_its_images_are_left_in_the_folder(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    train(base)
    result = evaluate(measured, tmp_path / "trial")
    assert read_score(tmp_path / "trial" / "metrics.json") == result
    assert (tmp_path / "trial" / "grid.png").is_file()
    assert len(list((tmp_path / "trial" / "samples").glob("*.png"))) == PROMPTS.image_count
    raw = json.loads((tmp_path / "trial" / "metrics.json").read_text())
    assert raw["per_image"][0].keys() == {"prompt_id", "seed", "clip_t", "clip_i"}


def test_a_grid_tells_the_score_beside_the_bases_images_and_is_whole_before_the_metrics(
    base: Base, measured: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []
    real = scoring.sample_grid

    def watched(*given: Any, **options: Any) -> Any:
        told.append((*given, options["failed"]))
        assert not (tmp_path / "trial" / "metrics.json").exists()
        return real(*given, **options)

    monkeypatch.setattr(scoring, "sample_grid", watched)
    train(base)
    heading = Heading("demo, trial 7", {"network_dim": "16"})
    result = evaluate_adapter(measured, tmp_path / "trial", identity="w", heading=heading)
    ((_, _, given, verdict, beside, failed),) = told
    assert given == heading and verdict.startswith(f"score {result.value:.4f} ± {result.se:.4f}")
    assert [(i.prompt_id, i.seed) for i in beside.base] == [(p.id, s) for p, s in PROMPTS.jobs] and not failed
    first = (tmp_path / "trial" / "grid.png").read_bytes()
    (tmp_path / "trial" / "metrics.json").unlink()
    again = make_anchors(measured, tmp_path / "anchors")  # as a later process reads them
    evaluate_adapter(measured.with_anchors(again), tmp_path / "trial", identity="w", heading=heading)
    assert (tmp_path / "trial" / "grid.png").read_bytes() == first


def test_metrics_are_written_as_older_versions_read_them(anchors: Anchors, references: References) -> None:
    """They expect the number of invalid images, which is always 0."""
    written = scored(images(0.5), anchors, references).as_dict()
    assert list(written)[8:11] == ["n_images", "invalid", "scorer"] and written["invalid"] == 0


def test_a_lora_that_was_not_applied_is_an_error_never_the_bases_score(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    for batch_size in (4, 1):
        with pytest.raises(ModelFileError, match="the LoRA has no effect"):
            evaluate(measured, tmp_path / "trial", batch_size=batch_size)
    assert not (tmp_path / "trial" / "metrics.json").exists()


def test_a_live_adapter_is_scored_in_place_once_it_was_trained(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    adapter = inject(base, TrainConfig(network_dim=2, network_alpha=2))
    with pytest.raises(ModelFileError, match="the LoRA has no effect"):
        evaluate(measured, tmp_path / "untrained")
    with pytest.raises(AssertionError, match="hold an adapter"):
        make_anchors(measured, tmp_path / "anchors")
    torch.manual_seed(0)
    for weight in adapter.trainable():
        weight.data.normal_(std=0.3)
    trained = evaluate(measured, tmp_path / "trained")
    assert trained.n_images == PROMPTS.image_count
    adapter.remove()
    with pytest.raises(ModelFileError, match="the LoRA has no effect"):
        evaluate(measured, tmp_path / "removed")


def test_black_images_leave_a_grid_to_look_at_and_no_score(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    base.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidImages, match="8 not finite"):
        evaluate(measured, tmp_path / "trial")
    assert (tmp_path / "trial" / "grid.png").is_file() and not (tmp_path / "trial" / "metrics.json").exists()
    pixels = np.asarray(Image.open(tmp_path / "trial" / "grid.png"))
    assert (pixels[:100] == RED).all(-1).any(), "the heading says that there is no score"


def test_anchors_are_measured_once(
    base: Base, measured: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors = measured.scale
    monkeypatch.setattr(base, "predict", None)
    again = make_anchors(measured, tmp_path / "anchors")
    assert again.as_dict() == anchors.as_dict()
    assert again.base_ND is not None and anchors.base_ND is not None and again.base_ND.equal(anchors.base_ND)
    assert [i.pixels_HW3.tobytes() for i in again.untouched] == [
        i.pixels_HW3.tobytes() for i in anchors.untouched
    ]
    assert len(again.untouched) == CONFIG.batch_size


def test_anchors_in_the_folder_that_were_measured_otherwise_are_refused(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    other = sampled_otherwise(measured, steps=3)
    with pytest.raises(ConfigError, match="measured with a different sampling"):
        make_anchors(other, tmp_path / "anchors")
    with pytest.raises(ConfigError, match="different sampling"):
        evaluate(measured, tmp_path / "trial", steps=3)


def test_a_damaged_anchors_file_is_measured_again(base: Base, measured: Evaluator, tmp_path: Path) -> None:
    anchors = measured.scale
    file = tmp_path / "anchors" / "anchors.json"
    file.write_text(file.read_text()[:-30])
    assert make_anchors(measured, tmp_path / "anchors").key == anchors.key
    json.loads(file.read_text())


def test_the_base_is_anchored_with_the_class_word_and_the_prompts_noise(
    base: Base, measured: Evaluator
) -> None:
    anchors = measured.scale
    drawn = sample(base, PROMPTS, CONFIG, as_class=True)
    features = Anything().image_features(
        [i.pixels_HW3 for i in drawn if i.prompt_id == PROMPTS.prompts[0].id]
    )
    text = Anything().text_features(["cat in red"])
    assert anchors.base_t_P[0] == pytest.approx(float((features @ text.T).mean()), abs=1e-6)


def test_a_base_that_draws_nothing_itself_is_named_as_the_cause(
    base: Base, measured: Evaluator, tmp_path: Path
) -> None:
    base.vae.decoder.conv_out.weight.data.zero_()
    with pytest.raises(ModelFileError, match="untrained base draws images that show nothing: 4 of 4 images"):
        make_anchors(measured, tmp_path / "black")


def test_a_file_that_is_no_score_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match="is not a score"):
        read_score(tmp_path / "metrics.json")
