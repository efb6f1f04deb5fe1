"""grid.png: the images of one LoRA with those of the untrained base, the references, score and settings.

Owns the layout, which is narrow and tall, so that it can be read on a phone: at 400 px width the text is still
12 px high. What stands in the heading comes from the caller.

Shapes: H, W pixels; 3 colour channels; uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from evaluation.images.images import SampledImage, invalid_reason
from evaluation.images.lettering import (
    GREY,
    RED,
    TIED,
    fitted,
    framed,
    in_a_row,
    lettered,
    stacked,
    text_strip,
)
from evaluation.prompts import Prompt, PromptSet

WIDTH_PX = 792  # four cells of 192 px with gaps; with the margin 816 px
MARGIN_PX, GAP_PX, BETWEEN_PX = 12, 8, 20
TITLE_PX, TEXT_PX, SMALL_PX = 32, 25, 22
MAX_COLUMNS = 4
SHOWN_REFERENCES = 4
PROMPTS_A_ROW = {1: 3, 2: 2}  # by the number of images of a prompt; else 1
CELL_STEP_PX = 64  # cells are a multiple of this: images of the miniature are enlarged by whole factors
THUMBNAIL_PX = 256, 512  # pictures for grids are kept at this width and height at most


@dataclass(frozen=True)
class Heading:
    """What a grid says above its images. ``settings``: name → value as text."""

    title: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """What the images are compared with: the base's images of the same prompts, and real ones."""

    base: Sequence[SampledImage] = ()
    references_HW3: Sequence[np.ndarray] = ()


def thumbnail(pixels_HW3: np.ndarray) -> np.ndarray:
    """A picture as small as a grid needs it."""
    picture = Image.fromarray(pixels_HW3)
    picture.thumbnail(THUMBNAIL_PX, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def sample_grid(
    images: Sequence[SampledImage],
    prompts: PromptSet,
    heading: Heading | None = None,
    verdict: str = "",
    beside: Beside | None = None,
    *,
    failed: bool = False,
) -> Image.Image:
    """Every prompt with its whole text, its images, and below them those of the untrained base.

    ``verdict``: the score in words, or, if it ``failed``, why there is none. A prompt with seeds of its own shows
    only as many images as the others (docs/study.md).
    """
    heading, beside = heading or Heading(), beside or Beside()
    seeds = len(prompts.seeds)
    together = PROMPTS_A_ROW.get(seeds, 1)
    columns = together * min(seeds, MAX_COLUMNS)
    cell_w = (WIDTH_PX - GAP_PX * (columns - 1)) // columns // CELL_STEP_PX * CELL_STEP_PX
    height_px, width_px = images[0].pixels_HW3.shape[:2]
    cell = cell_w, min(2 * cell_w, max(1, round(cell_w * height_px / width_px)))
    drawn = _by_key(images), _by_key(beside.base)
    parts = _heading(heading, verdict, failed, beside)
    for start in range(0, len(prompts.prompts), together):
        blocks = [
            _prompt(prompt, prompts.seeds_of(prompt)[:seeds], drawn, cell)
            for prompt in prompts.prompts[start : start + together]
        ]
        parts.append(in_a_row(blocks, GAP_PX))
    return framed(stacked(parts, BETWEEN_PX), MARGIN_PX)


def _heading(heading: Heading, verdict: str, failed: bool, beside: Beside) -> list[Image.Image]:
    lines = [text_strip(heading.title, WIDTH_PX, TITLE_PX)] if heading.title else []
    if verdict:
        lines.append(text_strip(verdict, WIDTH_PX, TEXT_PX, *([RED] if failed else [])))
    if heading.settings:
        words = ", ".join(f"{name}{TIED}{value}" for name, value in heading.settings.items())
        lines.append(text_strip(words, WIDTH_PX, SMALL_PX, GREY))
    parts = [stacked(lines, GAP_PX)] if lines else [Image.new("RGB", (WIDTH_PX, 1), "white")]
    if beside.references_HW3:
        side = (WIDTH_PX - GAP_PX * (MAX_COLUMNS - 1)) // MAX_COLUMNS
        row = in_a_row([fitted(p, side, side) for p in beside.references_HW3[:SHOWN_REFERENCES]], GAP_PX)
        parts.append(stacked([text_strip("references:", WIDTH_PX, SMALL_PX, GREY), row]))
    return parts


Drawn = Mapping[tuple[str, int], SampledImage]


def _by_key(images: Sequence[SampledImage]) -> Drawn:
    return {(image.prompt_id, image.seed): image for image in images}


def _prompt(
    prompt: Prompt, seeds: Sequence[int], drawn: tuple[Drawn, Drawn], cell: tuple[int, int]
) -> Image.Image:
    """The text of a prompt, its images, and those of the untrained base; four images side by side at most."""
    columns = min(len(seeds), MAX_COLUMNS)
    wide = columns * cell[0] + GAP_PX * (columns - 1)
    own, base = drawn
    parts = [text_strip(prompt.text, wide, TEXT_PX)]
    for start in range(0, len(seeds), columns):
        keys = [(prompt.id, seed) for seed in seeds[start : start + columns]]
        parts.append(in_a_row([_cell(own.get(key), cell) for key in keys], GAP_PX))
        if any(key in base for key in keys):
            parts.append(text_strip("untrained base:", wide, SMALL_PX, GREY))
            parts.append(in_a_row([_cell(base.get(key), cell) for key in keys], GAP_PX))
    return stacked(parts)


def _cell(image: SampledImage | None, cell: tuple[int, int]) -> Image.Image:
    """An image at display size; one that shows nothing is framed in red and named."""
    if image is None:
        return Image.new("RGB", cell, "white")
    picture = fitted(image.pixels_HW3, *cell)
    reason = invalid_reason(image)
    if reason:
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, cell[0] - 1, cell[1] - 1), outline=RED, width=4)
        text, font = lettered(reason, SMALL_PX)
        place = (cell[0] / 2, cell[1] / 2)
        draw.text(place, text, RED, font, anchor="mm", stroke_width=3, stroke_fill="white")
    return picture
