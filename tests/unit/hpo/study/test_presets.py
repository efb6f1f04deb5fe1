"""What a study file may change about the score: formula, preset, other models beside it – up to a trial's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from evaluation.encoders.embed import Dinov2Encoder, load_likeness, load_scorer
from evaluation.encoders.style import PatchEncoder, StyleEncoder, scene_of
from evaluation.gauges.gauge import LikenessGauge
from evaluation.score.formula import Formula, composite
from evaluation.score.score import Score, evaluate_adapter, read_score
from hpo.confirm.view import status_lines
from hpo.search.sampled import SearchLimits
from hpo.search.summary import summary
from hpo.search.workbench import Workbench, load
from hpo.study.config import Inputs, find_study, read_study
from hpo.study.folder import StudyFolder, read_json
from hpo.study.sections import PRESETS
from hpo.study.standing import standing
from hpo.study.storage import open_study
from hpo.study.table import study_table
from hpo.study.unchanged import check_unchanged
from tests.tiny_search import draw_images, make_search, tiny_bench
from trainer.bases.miniature import subjects, world
from trainer.errors import ConfigError, ToolError

# The formula


@pytest.mark.parametrize(
    ("formula", "following", "alike", "value"),
    [
        (Formula(), 0.64, 0.25, 0.4),  # √0.16
        (Formula(likeness=3.0), 0.5, 0.8, 0.256**0.25),  # (0.5 · 0.512)^¼
        (Formula(prompt_following=2.0), 0.5, 0.8, 0.2 ** (1 / 3)),  # (0.25 · 0.8)^⅓
        (Formula(prompt_following=2.0, likeness=2.0), 0.64, 0.25, 0.4),  # only the ratio of weights counts
        (Formula("harmonic"), 0.5, 0.8, 2 / 3.25),  # 2 / (2 + 1.25)
        (Formula("harmonic", 1.0, 3.0), 0.5, 0.8, 4 / 5.75),  # 4 / (2 + 3.75)
        (Formula("harmonic"), 5.0, 1.0, 2.2 / 2.1),  # 2 / (1 / 1.1 + 1)
        (Formula("harmonic"), 0.0, 1.0, 0.0),
        (Formula("harmonic"), 1.0, -0.3, 0.0),
        (Formula(likeness=0.01), 1.0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_a_formula_is_the_weighted_mean_that_its_file_names(
    formula: Formula, following: float, alike: float, value: float
) -> None:
    assert composite(np.array([following]), np.array([alike]), formula)[0] == pytest.approx(value)


def test_the_harmonic_mean_is_the_stricter_one() -> None:
    t, i = np.linspace(0.05, 1.0, 20), np.linspace(1.0, 0.05, 20)
    assert (composite(t, i, Formula("harmonic")) <= composite(t, i) + 1e-12).all()


@pytest.mark.parametrize("values", [("median",), ("geometric", 0.0), ("harmonic", 1.0, -1.0)])
def test_a_mean_that_is_not_known_and_a_weight_of_nothing_are_refused(values: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError):
        Formula(*values)  # type: ignore[arg-type]


# Style


@dataclass(frozen=True)
class Shuffled:
    """A real encoder whose patches come in another order."""

    of: PatchEncoder
    name: str = "shuffled"
    sha: str = "shuffled"

    def patch_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        patches_NLC = self.of.patch_features(images)
        return patches_NLC[
            :, torch.randperm(patches_NLC.shape[1], generator=torch.Generator().manual_seed(1))
        ]

    def image_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        return self.of.image_features(images)


def pictures(count: int = 6) -> list[np.ndarray]:
    rendered = [world.render(world.sample_scene(n), 64) for n in range(count)]
    return [picture.clip(0, 255).astype(np.uint8) for picture in rendered]


def test_where_a_thing_is_in_a_picture_is_not_its_style() -> None:
    clip = load_scorer("mini-clip")
    one, other = StyleEncoder(clip), StyleEncoder(Shuffled(clip))
    torch.testing.assert_close(
        one.image_features(pictures()), other.image_features(pictures()), rtol=0, atol=1e-6
    )
    assert one.image_features(pictures()).norm(dim=1) == pytest.approx(np.ones(6), abs=1e-6)
    assert scene_of(one) is clip and scene_of(clip) is clip and one.sha not in (clip.sha, other.sha)


def test_pictures_of_one_style_are_more_alike_than_pictures_of_one_scene() -> None:
    style = StyleEncoder(load_scorer("mini-clip"))
    plain_ND = style.image_features(pictures())
    painted_ND = style.image_features([subjects.stylise(picture) for picture in pictures()])
    others = ~torch.eye(6, dtype=torch.bool)
    assert (painted_ND @ painted_ND.T)[others].mean() > (plain_ND * painted_ND).sum(1).mean()


# A study


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("models") / "dino"
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def study_sets(dinov2: Path) -> tuple[str, ...]:
    return (
        'study.preset="style"', f'study.also=["mini-clip", "{dinov2}"]', 'score.mean="harmonic"',
        "score.likeness=3.0", "prompts.counts={ train-like = 1, altered = 2, class-only = 1 }",
        "sampling.steps=4",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, study_sets: tuple[str, ...]) -> Workbench:
    folder = tmp_path_factory.mktemp("presets")
    subjects.write_subject("character", folder / "data", 64)
    study = read_study(find_study(None, "mini-sd15"), sets=study_sets)
    made = load(Inputs("mini-sd15", folder / "data"), study, StudyFolder(folder / "study"), lambda text: None)
    made.measure_anchors(lambda text: None)
    return made


@pytest.fixture(scope="module")
def scored(bench: Workbench) -> Score:
    """The base made to draw other pictures, as a trial would be scored."""
    folder = bench.folder.root / "trial"
    weight = bench.base.unet.conv_out.weight.data
    before = weight.clone()
    weight.mul_(1.05)
    try:
        return evaluate_adapter(bench.evaluator, folder)
    finally:
        weight.copy_(before)


def test_a_style_is_asked_for_by_its_own_prompts() -> None:
    assert [name for name, preset in PRESETS.items() if preset.style] == ["style"]
    for preset in PRESETS.values():
        assert sum(preset.counts.values()) == 16 and sum(preset.confirm_counts.values()) == 24
    assert "style" not in PRESETS["style"].counts, "a style is not asked for in another style"
    shipped = read_study(Path("studies/sd15-style.toml").resolve())
    assert shipped.preset is PRESETS["style"] and shipped.preset.style
    assert not read_study(Path("studies/sd15-character.toml").resolve()).preset.style


def test_a_style_study_measures_the_style_of_its_references(bench: Workbench, scored: Score) -> None:
    by = bench.evaluator
    assert isinstance(by.likeness, StyleEncoder) and isinstance(by.likeness.scene, Dinov2Encoder)
    assert by.references.encoder_sha == scored.likeness_sha == by.likeness.sha
    assert scored.likeness_encoder == "style of mini-likeness"
    assert bench.facts()["likeness"].startswith("style of mini-likeness")
    assert by.safeguards is not None
    assert by.safeguards.encoders == (by.scorer, by.likeness.scene), "copies are of what is shown"


def test_a_study_is_scored_by_its_own_formula_and_by_no_other(bench: Workbench, scored: Score) -> None:
    t, i = (min(max(part, 0.0), 1.1) for part in (scored.prompt_following, scored.likeness))
    expected = 4 / (1 / t + 3 / i) if t and i else 0.0
    assert scored.value == pytest.approx(expected)
    assert bench.facts()["composite"] == "harmonic mean, prompt following 1 : likeness 3"
    kept = read_score(bench.folder.root / "trial" / "metrics.json")
    assert kept == scored and kept.formula == Formula("harmonic", 1.0, 3.0, "signed")
    with pytest.raises(ConfigError, match="composite"):
        check_unchanged(bench.facts() | {"composite": Formula().words()}, bench.facts(), "x")


def test_figures_beside_the_score_are_other_models_view_of_the_same_pictures(
    bench: Workbench, scored: Score, dinov2: Path
) -> None:
    found = [(of.measure, of.model) for of in scored.beside]
    assert found == [
        ("clip_i", "mini-clip"), ("dino_i", "mini-likeness"),  # what the style encoder looks through
        ("clip_t", "mini-clip"), ("clip_i", "mini-clip"), ("dino_i", "dino"),  # also
    ]  # fmt: skip
    clip_t, dino = scored.beside[2], scored.beside[4]
    assert clip_t.value == pytest.approx(scored.clip_t) and clip_t.sha == bench.evaluator.scorer.sha
    assert clip_t.per_image == pytest.approx([row.clip_t for row in scored.per_image])
    only_class = {p.id for p in bench.prompts.prompts if not p.asks_for_subject}
    asked = [row.prompt_id not in only_class for row in scored.per_image]
    assert [value is not None for value in dino.per_image] == asked and not all(asked)
    pixels = np.stack([p for p in _drawn(bench)])
    encoder = load_likeness(str(dinov2), bench.evaluator.scorer)
    real = [np.asarray(p) for p in _references(bench)]
    cosines_N = (encoder.image_features(list(pixels)) @ encoder.image_features(real).T).mean(1)
    expected = float(cosines_N[torch.tensor(asked)].mean())  # prompts that ask have equally many pictures
    assert dino.value == pytest.approx(expected, abs=1e-5) and -1 <= dino.value <= 1


def _drawn(bench: Workbench) -> list[np.ndarray]:
    from PIL import Image

    samples = bench.folder.root / "trial" / "samples"
    return [
        np.asarray(Image.open(samples / f"{p.id}_{seed}.png").convert("RGB"))
        for p, seed in bench.prompts.jobs
    ]


def _references(bench: Workbench) -> list[np.ndarray]:
    from trainer.data.images import read_picture

    return [read_picture(Path(path)).pixels_HW3 for path in bench.reference_items]


def test_what_is_asked_for_beside_the_score_and_missing_stops_the_study(tmp_path: Path) -> None:
    subjects.write_subject("character", tmp_path / "data", 64)
    for spec in ("ViT-L-14-quickgelu:/nowhere.safetensors", "hpsv2.1:/nowhere.pt", "imagereward", "/nowhere"):
        study = read_study(find_study(None, "mini-sd15"), sets=[f"study.also={json.dumps([spec])}"])
        inputs = Inputs("mini-sd15", tmp_path / "data")
        with pytest.raises(ToolError, match=r"nowhere|imagereward"):
            load(inputs, study, StudyFolder(tmp_path / "study"), lambda text: None)
    assert not (tmp_path / "study").exists()


def test_a_trials_figures_beside_its_score_reach_its_note_the_status_and_the_end(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "data"))
    by = bench.evaluator
    bench.evaluator = replace(by, gauges=(LikenessGauge("clip_i", by.scorer, by.references),))
    make_search(bench, SearchLimits(1)).run()
    study, trial = open_study(bench.folder), bench.folder.trial(0)
    (figure,) = read_score(trial.metrics).beside
    assert (read_json(trial.result) or {})["beside"] == [
        {"measure": "clip_i", "model": "arithmetic", "value": figure.value}
    ]
    words = f"CLIP-I {figure.value:.4f} by arithmetic"
    notes = study._storage.get_study_system_attrs(study._study_id).items()
    note = " ".join(str(value) for name, value in notes if "note_str" in name)
    assert f"extra metrics: {words}" in note
    assert f"trial 0, extra metrics: {words}" in status_lines(
        study, bench.folder, study_table(study, bench.folder)
    )
    assert f"  extra metrics: {words}" in summary(
        bench.folder, standing(study, 1), {"learning_rate": 1e-3}, "done"
    )
