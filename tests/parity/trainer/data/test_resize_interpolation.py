"""resize_interpolation: the pixels of sd-scripts.

The values in tests/data/resize_interpolation.json were recorded from what ``resize_image`` of sd-scripts 48d368f calls:
OpenCV 4.10.0, which it requires, and Pillow for lanczos and box. OpenCV's weights are whole numbers of 1/2048, so a
pixel may be one of 255 steps off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.resampling import resampled
from trainer.settings import RESIZE_INTERPOLATIONS

RECORDED = json.loads((Path(__file__).parents[3] / "data" / "resize_interpolation.json").read_text())
EXACT = ("nearest", "lanczos", "box")


def image(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * 37 + y * y * 11) % 256, (x * x * 5 + y * 29) % 256, (x * y * 7 + 13 * x) % 256]
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['method']} {case['size']}-{case['to']}")
def test_pixels_are_those_of_sd_scripts(case: dict[str, Any]) -> None:
    width, height = case["to"]
    found = resampled(image(*case["size"]), width, height, case["method"])
    recorded = np.array(case["pixels"]).reshape(height, width, 3)
    assert found.shape == recorded.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - recorded).max() <= (0 if case["method"] in EXACT else 1)


def test_every_method_is_recorded() -> None:
    assert {case["method"] for case in RECORDED} == set(RESIZE_INTERPOLATIONS)


def test_without_a_method_it_is_area_or_lanczos() -> None:
    pixels = image(9, 7)
    assert (resampled(pixels, 4, 3) == resampled(pixels, 4, 3, "area")).all()
    assert (resampled(pixels, 4, 9) == resampled(pixels, 4, 9, "lanczos")).all()
