"""Tests of evaluation.images.images."""

import numpy as np
import pytest

from evaluation.images.images import (
    SampledImage,
    check_valid,
    invalid_reason,
    png_bytes,
    prove_applied,
)
from trainer.errors import InvalidImages, ModelFileError


def picture(seed: int, prompt_id: str = "p") -> SampledImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return SampledImage(prompt_id, seed, pixels)


def flat(level: int, finite: bool = True) -> SampledImage:
    return SampledImage("p", 0, np.full((16, 16, 3), level, np.uint8), finite)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (flat(0), "black"),
        (flat(9), "black"),
        (flat(128), "uniform"),
        (flat(255), "uniform"),
        (SampledImage("p", 0, picture(0).pixels_HW3, False), "not finite"),
        (picture(0), None),
    ],
)
def test_pictures_that_show_nothing_are_recognised(image: SampledImage, reason: str | None) -> None:
    assert invalid_reason(image) == reason


def test_a_dark_picture_with_something_in_it_is_valid() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:6, 4:6] = 40
    assert invalid_reason(SampledImage("p", 0, pixels)) is None


def test_one_invalid_picture_is_enough_to_refuse_all() -> None:
    check_valid([picture(0), picture(1)])
    with pytest.raises(InvalidImages, match=r"1 of 3 images are invalid \(1 black\)"):
        check_valid([picture(0), picture(1), flat(0)])


def test_pictures_equal_to_the_bases_own_prove_that_no_adapter_was_at_work() -> None:
    own = [picture(0), picture(1)]
    nearly = [
        SampledImage(i.prompt_id, i.seed, i.pixels_HW3 ^ 1) for i in own
    ]  # ±1: another batch composition
    for same in (own, nearly):
        with pytest.raises(ModelFileError, match="the LoRA has no effect"):
            prove_applied(same, own)
    prove_applied([own[0], SampledImage("p", 1, own[1].pixels_HW3 ^ 2)], own)


def test_the_same_pixels_give_the_same_png_bytes() -> None:
    assert png_bytes(picture(3).pixels_HW3) == png_bytes(picture(3).pixels_HW3.copy())
