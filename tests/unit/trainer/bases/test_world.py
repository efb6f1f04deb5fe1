"""The world: the same scene from the same seed, recognised from its pixels, with captions from its vocabulary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainer.bases.miniature import captions, checker, subjects, world
from trainer.errors import DataError, MachineError

SCENES = 120


def test_a_scene_is_the_same_from_the_same_seed() -> None:
    for seed in (0, 7, 123_456_789):
        assert world.sample_scene(seed) == world.sample_scene(seed)
        np.testing.assert_array_equal(
            world.render(world.sample_scene(seed)), world.render(world.sample_scene(seed))
        )
        assert captions.caption(world.sample_scene(seed), 3) == captions.caption(world.sample_scene(seed), 3)
    assert world.sample_scene(1) != world.sample_scene(2)


def test_the_world_has_the_promised_mix_of_kinds() -> None:
    kinds = Counter(world.sample_scene(i).kind for i in range(2000))
    assert 0.55 < kinds["single"] / 2000 < 0.65
    assert 0.16 < kinds["pair"] / 2000 < 0.24
    assert 0.16 < kinds["figure"] / 2000 < 0.24


def test_no_object_colour_is_near_a_ground() -> None:
    for colour in world.COLOURS.values():
        for ground in world.BACKGROUNDS.values():
            assert np.linalg.norm(np.subtract(colour, ground)) > 75


@pytest.mark.parametrize("size_px", [64, 128])
def test_the_checker_reads_clean_renders_with_at_least_99_percent_right(size_px: int) -> None:
    verdicts = []
    for i in range(SCENES):
        scene = world.sample_scene(77_000_000 + i)
        verdicts += checker.check(world.render(scene, size_px), scene).values()
    assert np.mean(verdicts) >= 0.99


def test_the_checker_reads_blurred_renders() -> None:
    verdicts = []
    for i in range(SCENES // 2):
        scene = world.sample_scene(78_000_000 + i, "single")
        blurred = Image.fromarray(world.render(scene)).filter(ImageFilter.GaussianBlur(0.9))
        verdicts += [ok for key, ok in checker.check(blurred, scene).items() if key != "pattern"]
    assert np.mean(verdicts) >= 0.97


def test_the_checker_notices_one_changed_attribute() -> None:
    rng = np.random.default_rng(5)
    for i in range(40):
        scene = world.sample_scene(79_000_000 + i)
        other = world.neighbours(scene, rng)
        if checker.expected(other) != checker.expected(scene):
            assert not all(checker.check(world.render(other), scene).values()), (scene, other)


def test_captions_say_only_words_of_the_world_and_the_full_wording_names_everything() -> None:
    known = set(captions.corpus_words())
    unknown = 0
    for i in range(400):
        scene = world.sample_scene(i)
        words = captions.caption(scene, i).replace(",", " ").split()
        unknown += sum(word not in known for word in words)
        full = captions.caption(scene)
        assert set(full.replace(",", " ").split()) <= known
        assert scene.background in full
        for thing in scene.things:
            assert thing.colour in full and thing.shape in full
    assert 0 < unknown < 80  # a few invented names, so that an unknown name has no effect


def test_wording_varies() -> None:
    scene = world.sample_scene(12)
    assert len({captions.caption(scene, i) for i in range(40)}) > 20


def test_no_subject_is_in_the_world_and_every_picture_of_it_shows_it() -> None:
    for kind in subjects.SUBJECTS:
        assert all(subjects.is_subject(subjects.picture(kind, i, 0, 64)[0], kind) >= 0.9 for i in range(32))
        shown = [subjects.is_subject(world.render(world.sample_scene(i)), kind) for i in range(100)]
        assert max(shown) <= 0.5 and np.mean(shown) < 0.1  # a world figure may share a part
    assert not {s.trigger for s in subjects.SUBJECTS.values()} & set(captions.corpus_words())


def test_a_subject_is_written_as_a_kohya_folder(tmp_path: Path) -> None:
    training = subjects.write_subject("character", tmp_path)
    assert training.name == "10_luca figure"
    assert len(list(training.glob("*.png"))) == len(list(training.glob("*.txt"))) == 24
    assert len(list((tmp_path / "held_out").glob("*.png"))) == 8
    with pytest.raises(DataError, match="is not empty, so nothing was written"):
        subjects.write_subject("object", tmp_path)
    assert not list(tmp_path.glob("*zorb*"))
    with pytest.raises(MachineError, match="/dev/null/x"):
        subjects.write_subject("object", Path("/dev/null/x"))
    captions = {p.read_text().strip() for p in training.glob("*.txt")}
    assert "a luca figure on grass, on the left" in captions
    assert len(captions) > 10
