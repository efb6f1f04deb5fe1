"""Tests of evaluation.score.safeguards: copies, diversity, the class word, and how they reach the sampler."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.encoders.embed import load_likeness, load_scorer
from evaluation.encoders.vectors import Vectors
from evaluation.images.images import SampledImage
from evaluation.prompts.prompts import Prompt, PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.limits import SafeguardLimits
from evaluation.score.safeguards import (
    Copies,
    Parts,
    Safeguards,
    diversity,
    embed_copies,
    scene_encoders,
    vendi,
)
from tests.tiny_search import tiny_study
from trainer.bases.miniature.subjects import write_subject
from trainer.data.images import read_picture

PROMPTS = PromptSet(
    (Prompt("a", "a", "altered"), Prompt("b", "b", "altered"), Prompt("c", "c", "class-only", (0, 1, 2, 3))),
    (0,),
)
IMAGES = [SampledImage(p.id, seed, np.zeros((8, 8, 3), np.uint8)) for p, seed in PROMPTS.jobs]


def unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_vendi_counts_the_pictures_that_differ() -> None:
    assert vendi(torch.eye(5)) == pytest.approx(5)
    assert vendi(torch.ones(5, 1)) == pytest.approx(1)
    assert vendi(unit([[1, 0], [1, 0], [0, 1], [0, 1]])) == pytest.approx(2)
    a = unit([[1, 0.2], [0.3, 1], [0.5, 0.5]])
    share = torch.linalg.eigvalsh((a @ a.T).double() / 3).clamp(min=1e-12)
    assert vendi(a) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), abs=1e-6)


def test_diversity_is_seen_where_a_prompt_has_most_pictures() -> None:
    features = torch.cat([torch.eye(6)[:2], torch.eye(6)[2:6]])
    assert diversity(features, IMAGES, PROMPTS) == pytest.approx(4)
    single = PromptSet(PROMPTS.prompts[:2], (0,))
    assert diversity(features[:2], IMAGES[:2], single) is None


def anchors(base_prior_i: float | None, base_diversity: float | None) -> Anchors:
    """Anchors of a prompt with the trigger and optionally one without; real images have a likeness of 0.9."""
    prior = () if base_prior_i is None else (base_prior_i,)
    ids, asks, raw_P = ("a", "c")[: 1 + len(prior)], (True, False)[: 1 + len(prior)], (0.0, *prior)
    errors = {"real_i_se": 0.0, "t_unit_se": 0.0, "i_unit_se": 0.0}
    return Anchors({}, ids, asks, raw_P, raw_P, raw_P, real_i=0.9, **errors, base_diversity=base_diversity)


class Same:
    """An encoder that returns given vectors."""

    name, sha = "same", "sha"

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def image_features(self, images: object) -> torch.Tensor:
        return self.features


def test_each_limit_is_broken_by_its_own_fault_only() -> None:
    own, other = torch.eye(7)[:6], torch.eye(7)[6:]
    faults = {
        (): (own, other, 0.3),
        ("copied",): (own, own[:1], 0.3),
        ("collapsed",): (torch.cat([own[:2], own[2:3].repeat(4, 1)]), other, 0.3),
        ("prior_lost",): (own, other, 0.95),
    }
    for broken, (features, training, prior_i) in faults.items():
        guards = Safeguards((Same(features),), Copies(training, 0.1), SafeguardLimits())
        vectors = Vectors([i.pixels_HW3 for i in IMAGES])
        found = guards.measure(vectors, IMAGES, PROMPTS, Parts(0.9, prior_i), anchors(0.2, 4.0))
        assert found.broken == broken, found
        assert all(found.says(name) for name in broken)
        assert found.amounts.keys() == {"copied", "collapsed", "prior_lost"}


def test_prompts_without_class_only_ones_set_no_prior_limit() -> None:
    guards = Safeguards((Same(torch.eye(6)),), Copies(torch.eye(6)[:1], 0.0), SafeguardLimits())
    found = guards.measure(Vectors([]), IMAGES, PROMPTS, Parts(0.9, None), anchors(None, None))
    assert found.prior is None and found.amounts.keys() == {"copied"}


def test_a_copy_of_a_training_image_trips_the_copy_rate_and_a_held_out_one_does_not(tmp_path: Path) -> None:
    """With the encoders of the miniature; the copies have the size of the base and are saved as JPEG."""
    write_subject("character", tmp_path)
    training, held_out = (
        sorted(p for p in tmp_path.rglob("*.png") if ("held_out" in p.parts) == held)
        for held in (False, True)
    )
    scorer = load_scorer("mini-clip")
    encoders = scene_encoders(scorer, load_likeness("mini-likeness", scorer))
    assert len(encoders) == 2
    copies = embed_copies(training, held_out, encoders)
    small = [Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX) for path in training]
    assert copies.rate(Vectors([np.asarray(image) for image in small]), encoders) == 1.0
    packed = []
    for image in small:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=95)
        packed.append(np.asarray(Image.open(content).convert("RGB")))
    assert copies.rate(Vectors(packed), encoders) >= 0.9
    fresh = [read_picture(path).pixels_HW3 for path in held_out]
    assert copies.rate(Vectors(fresh), encoders) <= 0.5
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    assert copies.rate(Vectors(list(noise)), encoders) == 0.0


def test_the_limits_of_the_study_file_are_facts_of_the_study() -> None:
    assert tiny_study({"limits": {"copy_rate": 0.2}}).limits.copy_rate == 0.2
    assert tiny_study().limits.diversity == 0.6
