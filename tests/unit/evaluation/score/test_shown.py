"""Images that show nothing: real images and encoders of the miniature, and what was recorded of trained LoRAs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.images.images import SampledImage
from evaluation.score.anchors import VECTORS_NAME, read_vectors
from evaluation.score.evaluator import make_anchors
from evaluation.score.limits import SafeguardLimits
from evaluation.score.safeguards import Safety
from evaluation.score.strangeness import FAR, reach, strangeness
from hpo.search.workbench import Workbench
from tests import ranking
from tests.bench import bench_shown
from tests.bench.bench_shown import (
    BASE,
    DISTORTED,
    FRESH,
    HEEDLESS,
    HOT,
    MAIN,
    SETS,
    SHUFFLED,
    TRAINED,
    TRIALS,
    Row,
)
from tests.bench.distortions import BLANK, DISTORTIONS, REPEATED, REPEATED_NOISE, distorted
from tests.places import ROOT

NOTHING = (
    "uniform noise",
    "grey noise",
    "pink noise (1/f)",
    "coloured noise, 4 × 4 blobs",
    "coloured noise, 8 × 8 blobs",
    "coloured noise, 16 × 16 blobs",
    "coloured noise, 32 × 32 blobs",
    "pixels shuffled",
    "added noise, sd 120",
    "stripes of 2 colours, 1/16 wide",
    "stripes of 2 colours, 1/8 wide",
    "stripes of 9 colours, 1/16 wide",
    "blur, σ 15 % of the height",
    "blur, σ 20 % of the height",
    "posterised, 2 levels",
    "posterised, black and white",
    REPEATED_NOISE,
)
SOMETHING = (
    "added noise, sd 20",
    "blur, σ 2 % of the height",
    "blur, σ 5 % of the height",
    "posterised, 4 levels",
    "posterised, 3 levels",
    "greyscale",
)


@pytest.fixture(scope="module")
def recorded() -> list[Row]:
    return bench_shown.read()


def of(rows: list[Row], base: str, subject: str, source: str) -> list[Row]:
    return [row for row in rows if (row.base, row.subject, row.source) == (base, subject, source)]


# Recorded


def test_the_recording_is_whole(recorded: list[Row]) -> None:
    for base, subject in SETS:
        names = {row.name for row in of(recorded, base, subject, DISTORTED)}
        assert names == {*(DISTORTIONS if (base, subject) == MAIN else BLANK), REPEATED, REPEATED_NOISE}
        assert {row.name for row in of(recorded, base, subject, HEEDLESS)} == {FRESH, SHUFFLED}
    assert len(of(recorded, *MAIN, TRAINED)) == 1 + len(TRIALS) + len(HOT)


def test_no_recorded_lora_that_draws_anything_is_beyond_the_limit(recorded: list[Row]) -> None:
    """The truth is read from pixels: the subject's parts, background and place.

    Of most configurations of the ranking study only the cosines were recorded: prompt following alone decides.
    """
    known = ranking.read()
    runs = [m for on in known.on.values() for m in on.values() if m.name != "base"]
    low = [m for m in runs if m.parts()[0][0] < 0.2]
    assert len(runs) == 41 and len(low) == 3 and all(m.graded <= 0.02 for m in low)
    truth = known.on[ranking.SEARCH]
    for row in of(recorded, *MAIN, TRAINED):
        if row.name in truth:
            assert (row.amount > 0) == (truth[row.name].graded < 0.03), row
    for row in recorded:
        if row.source == BASE:
            assert row.amount < -0.5 and not row.reason, row


def test_sound_images_that_ignore_every_prompt_do_show_something(recorded: list[Row]) -> None:
    """An overfitted LoRA draws its subject whatever it is asked for: not strange, so this limit is silent."""
    for row in recorded:
        if row.source == HEEDLESS:
            assert row.prompt_following < 0.15 and row.strangeness < 0.2 and row.amount < -0.8, row


def test_what_a_far_too_high_rate_leaves_is_beyond_the_limit(recorded: list[Row]) -> None:
    hot = [row for row in recorded if "rates ×" in row.name]
    assert len(hot) == 3 and {row.reason for row in hot} == {"shows_nothing"}
    assert max(row.likeness for row in hot) > 0.2, "likeness alone does not notice"


@pytest.mark.parametrize(("base", "subject"), SETS)
def test_what_shows_nothing_is_beyond_the_limit_on_every_subject_and_base(
    recorded: list[Row], base: str, subject: str
) -> None:
    for row in of(recorded, base, subject, DISTORTED):
        if row.name in (NOTHING if (base, subject) == MAIN else (*BLANK, REPEATED_NOISE)):
            assert row.reason == "shows_nothing" and row.amount > 0, row
        elif row.name == REPEATED:
            assert row.reason == ("collapsed" if row.diversity < 0.25 else "") and row.amount <= 0, row
        elif row.name in SOMETHING:
            assert row.amount <= 0, row


def test_the_page_shows_this_recording(recorded: list[Row]) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for line in bench_shown.table(recorded).splitlines():
        assert line in page, line


# With real images and encoders


@dataclass(frozen=True)
class Live:
    bench: Workbench
    images: list[SampledImage]

    def row(self, name: str) -> Row:
        images = self.images if name == BASE else distorted(name, self.images)
        return bench_shown.measured(self.bench, images, name, DISTORTED, "character")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    bench = bench_shown.bench_of("mini-sd15", "character", tmp_path_factory.mktemp("shown"))
    yield Live(bench, bench_shown.base_images(bench))


@pytest.mark.parametrize("name", NOTHING)
def test_images_that_show_nothing_are_refused_by_a_reason_of_their_own(live: Live, name: str) -> None:
    row = live.row(name)
    assert row.reason == "shows_nothing", row
    assert row.amount == pytest.approx(min(0.1 - row.prompt_following, row.strangeness - 1), abs=2e-4)


@pytest.mark.parametrize("name", [BASE, *SOMETHING])
def test_images_that_can_be_recognised_are_not(live: Live, name: str) -> None:
    row = live.row(name)
    assert row.reason == "" and row.amount < 0, row


def test_one_image_again_and_again_is_collapsed(live: Live) -> None:
    row = live.row(REPEATED)
    assert row.reason == "collapsed" and row.amount < 0, "the image itself is one of the base's"


def test_a_stronger_blur_is_farther_beyond_the_limit(live: Live) -> None:
    """The amount is a distance that a sampler can follow, not a verdict."""
    rows = [live.row(f"blur, σ {percent} % of the height") for percent in (2, 5, 10, 15)]
    following = [row.prompt_following for row in rows]
    assert following == sorted(following, reverse=True)
    assert [row.amount for row in rows] == sorted(row.amount for row in rows)


def test_the_recording_is_what_is_measured_now(live: Live, recorded: list[Row]) -> None:
    known = {row.name: row for row in of(recorded, "mini-sd15", "character", DISTORTED)}
    for name in ("coloured noise, 8 × 8 blobs", "blur, σ 15 % of the height", "greyscale"):
        now = live.row(name)
        for value in ("prompt_following", "strangeness", "likeness", "diversity"):
            assert getattr(now, value) == pytest.approx(getattr(known[name], value), abs=0.02), name


def test_a_limit_of_the_study_file_is_used(live: Live) -> None:
    """Blurred to blobs that still have their colours: the limit decides."""
    guards = live.bench.evaluator.safeguards
    assert guards is not None
    for shown, reason in ((0.1, ""), (0.3, "shows_nothing"), (None, "")):
        limits = replace(guards.limits, shown=shown)
        evaluator = replace(live.bench.evaluator, safeguards=replace(guards, limits=limits))
        found = bench_shown.score(distorted("blur, σ 10 % of the height", live.images), evaluator).safety
        assert found is not None and (found.broken or ("",))[0] == reason
        assert ("shows_nothing" in found.amounts) == (shown is not None)


# The vectors of the base's images


def test_anchors_of_an_earlier_version_get_the_vectors_from_their_images(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(live.bench.folder.base_images, folder)
    (folder / VECTORS_NAME).unlink()
    before = (folder / "anchors.json").read_bytes()
    monkeypatch.setattr(live.bench.base, "predict", None)
    again = make_anchors(live.bench.evaluator, folder)
    own = live.bench.anchors
    assert again.base_ND is not None and own.base_ND is not None and again.base_ND.equal(own.base_ND)
    assert (
        again == replace(own, untouched=again.untouched) and (folder / "anchors.json").read_bytes() == before
    )
    assert read_vectors(folder / VECTORS_NAME, len(live.images)) is not None, "once"


def test_without_the_limit_nothing_is_drawn_or_embedded_for_it(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(live.bench.folder.base_images, folder)
    (folder / VECTORS_NAME).unlink()
    shutil.rmtree(folder / "samples")
    monkeypatch.setattr(live.bench.base, "predict", None)
    guards = live.bench.evaluator.safeguards
    assert guards is not None
    off = replace(guards, limits=guards.limits.without_newer(("copy_rate", "diversity", "prior")))
    again = make_anchors(replace(live.bench.evaluator, safeguards=off), folder)
    assert again.base_ND is None and not (folder / "samples").exists()


def test_damaged_vectors_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / VECTORS_NAME
    assert read_vectors(path, 3) is None
    for content in (b"", b"\x93NUMPY torn", b"no array"):
        path.write_bytes(content)
        assert read_vectors(path, 3) is None
    for array in (np.zeros((2, 4), np.float32), np.zeros((3, 4)), np.full((3, 4), np.nan, np.float32)):
        np.save(path, array)
        assert read_vectors(path, 3) is None
    np.save(path, np.ones((3, 4), np.float32))
    found = read_vectors(path, 3)
    assert found is not None and found.shape == (3, 4)


# By hand


def test_strangeness_is_the_median_distance_in_units_of_the_bases_own_reach() -> None:
    eye = torch.eye(6)
    half = torch.nn.functional.normalize(eye[0] + eye[1], dim=0)
    base_ND = torch.stack([eye[0], half, eye[2]])
    real_KD = eye[3:4]
    # each without its own prompt: eye 0 to half, half to eye 0, eye 2 to nothing
    near = 1 - 0.5**0.5
    assert reach(base_ND, ("a", "b", "c"), real_KD) == pytest.approx(np.quantile([near, near, 1], FAR))
    assert reach(base_ND, ("a", "a", "c"), real_KD) == pytest.approx(1.0)
    known, odd = torch.stack([eye[3], eye[0], half]), torch.stack([eye[4], -eye[2], eye[0]])
    of = ("a", "a", "c")
    assert strangeness(known, base_ND, of, real_KD, [6]) == pytest.approx(0, abs=1e-6)
    assert strangeness(odd, base_ND, of, real_KD, [6]) == pytest.approx(1.0)
    assert np.isfinite(strangeness(eye[4:5], eye[:1], ("a",), eye[:1], [6])), "a base without reach"
    # a second encoder that sees nothing but what is known hides nothing
    joint = [torch.cat([v, base_ND[:1].expand(len(v), -1)], dim=1) / 2**0.5 for v in (odd, base_ND, real_KD)]
    assert strangeness(joint[0], joint[1], of, joint[2], [6, 6]) == pytest.approx(1.0)


def test_images_that_show_nothing_are_called_that_even_if_they_are_also_alike() -> None:
    amounts = {"copied": -0.05, "collapsed": 0.5, "shows_nothing": 0.2}
    found = Safety(0.0, 1.0, 5.0, None, None, None, amounts, -0.7, 1.2)
    assert found.broken == ("shows_nothing", "collapsed") and "learning_rate" in found.advice
    assert "prompt following -0.70" in found.says("shows_nothing")
    alike = replace(found, amounts={**amounts, "shows_nothing": -0.1})
    assert alike.broken == ("collapsed",) and alike.advice != found.advice


def test_limits_that_a_study_began_without_stay_off() -> None:
    limits = SafeguardLimits()
    old = limits.without_newer(("copy_rate", "diversity", "prior"))
    assert limits.as_dict() == {"copy_rate": 0.05, "diversity": 0.6, "prior": 1.0, "shown": 0.1}
    assert old.as_dict() == {"copy_rate": 0.05, "diversity": 0.6, "prior": 1.0}
    assert limits.without_newer(limits.as_dict()) == limits
