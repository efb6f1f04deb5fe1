"""Tests of evaluation.images.grid and lettering: whole texts, what stands beside the images, failures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import evaluation.images.lettering as lettering
from evaluation.images.grid import (
    MARGIN_PX,
    SMALL_PX,
    TEXT_PX,
    TITLE_PX,
    WIDTH_PX,
    Beside,
    Heading,
    sample_grid,
)
from evaluation.images.images import SampledImage
from evaluation.images.lettering import fitted, lettered, lines_of, text_strip
from evaluation.prompts.prompts import Prompt, PromptSet

LONG = "a photo of zkw girl " + "in a very long red coat " * 9


def prompt_set(count: int = 3, seeds: tuple[int, ...] = (0, 1)) -> PromptSet:
    return PromptSet(tuple(Prompt(f"prompt {n} {LONG * n}", "", "style") for n in range(count)), seeds)


def images(prompts: PromptSet, size: tuple[int, int] = (16, 16), first: int = 0) -> list[SampledImage]:
    random = np.random.default_rng(first)
    return [
        SampledImage(prompt.id, seed, random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for prompt, seed in prompts.jobs
    ]


def holds(sheet: Image.Image, part: Image.Image) -> bool:
    """Whether a picture stands somewhere in the sheet, pixel by pixel."""
    own, wanted = np.asarray(sheet), np.asarray(part)
    height, width = wanted.shape[:2]
    top, left = np.argwhere((wanted != 255).any(-1))[0]  # white is everywhere
    for row, column in np.argwhere((own == wanted[top, left]).all(-1)) - (top, left):
        found = own[max(0, row) : row + height, max(0, column) : column + width]
        if found.shape == wanted.shape and (found == wanted).all():
            return True
    return False


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3, 4, 5)])
def test_a_grid_shows_every_image_those_of_the_base_and_the_references(seeds: tuple[int, ...]) -> None:
    prompts = prompt_set(seeds=seeds)
    own, base = images(prompts), images(prompts, first=1)
    references = [i.pixels_HW3 for i in images(prompt_set(2), (20, 30), first=2)]
    sheet = sample_grid(own, prompts, beside=Beside(base, references))
    assert sheet.width == WIDTH_PX + 2 * MARGIN_PX
    side = {1: 256, 2: 192, 3: 256, 6: 192}[len(seeds)]
    for image in (*own, *base):
        assert holds(sheet, fitted(image.pixels_HW3, side, side))
    for pixels in references:
        assert holds(sheet, fitted(pixels, 192, 192))


def test_texts_are_whole_however_long_they_are() -> None:
    prompts = prompt_set()
    sheet = sample_grid(images(prompts), prompts)
    for prompt in prompts.prompts:
        assert holds(sheet, text_strip(prompt.text, 2 * 192 + 8, 25))
    shown, font = lettered(prompts.prompts[2].text, 25)
    lines = lines_of(shown, 392, font)
    assert " ".join(lines) == prompts.prompts[2].text.strip() and len(lines) > 10
    assert max(map(font.getlength, lines)) <= 392
    assert "".join(lines_of("x" * 200, 100, font)) == "x" * 200, "a long word is broken, not cut"


def test_text_can_be_read_on_a_phone() -> None:
    """400 px wide, the smallest text still has 10 px, browsers' smallest sensible size."""
    assert SMALL_PX * 400 / (WIDTH_PX + 2 * MARGIN_PX) > 10


def test_title_score_and_settings_stand_above_the_images() -> None:
    prompts = prompt_set(2)
    heading = Heading("demo, trial 7", {"network_dim": "16", "learning_rate": "1e-4"})
    sheet = sample_grid(images(prompts), prompts, heading, "score 0.4213 ± 0.0100")
    top = sheet.crop((0, 0, sheet.width, 200))
    assert holds(top, text_strip("demo, trial 7", WIDTH_PX, TITLE_PX))
    assert holds(top, text_strip("score 0.4213 ± 0.0100", WIDTH_PX, TEXT_PX))
    settings = text_strip("network_dim\u00a016, learning_rate\u00a01e-4", WIDTH_PX, SMALL_PX, lettering.GREY)
    assert holds(top, settings)


def test_an_image_that_shows_nothing_is_framed_and_named() -> None:
    prompts = prompt_set(2)
    own = images(prompts)
    grey = SampledImage(own[1].prompt_id, own[1].seed, np.full((16, 16, 3), 128, np.uint8))
    plain, marked = (sample_grid([own[0], second, *own[2:]], prompts) for second in (own[1], grey))
    red = (np.asarray(marked) == lettering.RED).all(-1).sum()
    assert red > 2 * 192 and not (np.asarray(plain) == lettering.RED).all(-1).any()


def test_small_images_are_enlarged_without_smoothing_and_none_is_distorted() -> None:
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (np.asarray(fitted(small, 192, 192))[1::3, 1::3] == small).all()
    wide = np.full((100, 400, 3), 7, np.uint8)
    cell = np.asarray(fitted(wide, 192, 192))
    assert (cell == 7).all(-1).sum() == 48 * 192


def test_the_same_images_make_the_same_grid() -> None:
    prompts = prompt_set()
    ours, theirs = (np.asarray(sample_grid(images(prompts), prompts, Heading("t"), "v")) for _ in range(2))
    assert (ours == theirs).all()


def test_other_scripts_use_an_installed_font_or_say_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lettering.font_of

    def only_built_in(size_px: int, name: str = "") -> lettering.Font | None:
        return None if name else real(size_px)

    monkeypatch.setattr(lettering, "font_of", only_built_in)
    assert lettered("café – Über × 2…", 20)[0] == "cafe - Uber x 2…"
    assert lettered("猫 cat", 20)[0] == "? cat"
    monkeypatch.setattr(lettering, "font_of", real)
    if real(20, "DejaVuSans.ttf") is not None:
        shown, font = lettered("café кот", 20)
        assert shown == "café кот" and font == real(20, "DejaVuSans.ttf")
    assert lettered("plain text", 20)[1] == real(20, ""), "the built-in font comes first"
