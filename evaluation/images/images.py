"""Sampled images as values: the invalid-image gate, the proof that an adapter changes them, PNG and grid.

Owns what is done with finished pictures.  Does not draw them (``evaluation.images.sampling``) and does
not embed them (``evaluation.encoders.embed``).

Shapes: H, W pixels; 3 colour channels; uint8.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.prompts import PromptSet
from trainer.errors import InvalidImages, ModelFileError

BLACK_LEVEL = 10  # assumed: brightest value of a picture that counts as black (0-255)
UNIFORM_RANGE = 6  # assumed: widest spread of any channel of a picture that shows nothing (0-255)
# Two batch compositions of the same picture may differ by this much; a trained adapter must differ by more.
SAME_WITHIN = 1
GRID_CELL_PX = 192
GRID_LABEL_PX = 16


@dataclass(frozen=True)
class SampledImage:
    """One picture, and which prompt and seed it belongs to."""

    prompt_id: str
    seed: int
    pixels_HW3: np.ndarray
    finite: bool = True


def invalid_reason(image: SampledImage) -> str | None:
    """``not finite``, ``black`` or ``uniform`` – or None for a picture that shows something."""
    if not image.finite:
        return "not finite"
    if int(image.pixels_HW3.max()) <= BLACK_LEVEL:
        return "black"
    flat = image.pixels_HW3.reshape(-1, 3)
    if int((flat.max(axis=0).astype(int) - flat.min(axis=0)).max()) <= UNIFORM_RANGE:
        return "uniform"
    return None


def check_valid(images: Sequence[SampledImage]) -> None:
    """Raise InvalidImages if any picture is black, uniform or not finite."""
    reasons = [reason for reason in map(invalid_reason, images) if reason]
    if reasons:
        counts = ", ".join(f"{reasons.count(r)} {r}" for r in sorted(set(reasons)))
        raise InvalidImages(
            f"{len(reasons)} of {len(images)} images show nothing ({counts})",
            'a lower learning_rate, fewer epochs or mixed_precision = "bf16" usually helps',
        )


def largest_change(images: Sequence[SampledImage], base_images: Sequence[SampledImage]) -> int:
    """Largest difference of a pixel value (0-255) between pictures of the same prompt and seed."""
    own = {(i.prompt_id, i.seed): i.pixels_HW3 for i in base_images}
    pairs = [(i.pixels_HW3, own[i.prompt_id, i.seed]) for i in images if (i.prompt_id, i.seed) in own]
    assert pairs, "no picture of the base to compare with"
    return max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)


class Unchanged(ModelFileError):
    """An adapter whose pictures are the untrained base's own."""


def prove_applied(images: Sequence[SampledImage], base_images: Sequence[SampledImage]) -> None:
    """Raise Unchanged if the pictures are the untrained base's own: then no adapter was at work, or a weak one.

    A load that failed without a word would otherwise get the base's score (the origin pipeline's fault).
    """
    if largest_change(images, base_images) <= SAME_WITHIN:
        raise Unchanged(
            "the LoRA changes nothing: its images are the untrained base's own",
            "it was not applied to this base, or its learning rate was too low to change a single pixel",
        )


def png_bytes(pixels_HW3: np.ndarray) -> bytes:
    """The picture as a PNG file's content; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG")
    return buffer.getvalue()


def sample_grid(
    images: Sequence[SampledImage], prompts: PromptSet, columns: int | None = None
) -> Image.Image:
    """A contact sheet: the pictures of a prompt side by side, its text under them.

    ``columns``: prompts beside each other; by default the sheet comes out about square.  Of a prompt with
    seeds of its own, as many are shown as the others have.
    """
    seeds = len(prompts.seeds)
    by_key = {(i.prompt_id, i.seed): i.pixels_HW3 for i in images}
    height_px, width_px = images[0].pixels_HW3.shape[:2]
    scale = min(1.0, GRID_CELL_PX / max(height_px, width_px))
    if (
        max(height_px, width_px) < GRID_CELL_PX // 2
    ):  # the miniature's pictures: enlarged whole times, unsmoothed
        scale = float(GRID_CELL_PX // 2 // max(height_px, width_px))
    cell_w, cell_h = round(width_px * scale), round(height_px * scale)
    columns = columns or max(
        1, round(math.sqrt(len(prompts.prompts) * (cell_h + GRID_LABEL_PX) / (cell_w * seeds)))
    )
    rows = math.ceil(len(prompts.prompts) / columns)
    sheet = Image.new("RGB", (columns * seeds * cell_w, rows * (cell_h + GRID_LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, prompt in enumerate(prompts.prompts):
        left, top = index % columns * seeds * cell_w, index // columns * (cell_h + GRID_LABEL_PX)
        for place, seed in enumerate(prompts.seeds_of(prompt)[:seeds]):
            pixels = by_key.get((prompt.id, seed))
            if pixels is not None:
                method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
                sheet.paste(
                    Image.fromarray(pixels).resize((cell_w, cell_h), method), (left + place * cell_w, top)
                )
        label = _fitting(prompt.text.encode("ascii", "replace").decode(), seeds * cell_w - 4, draw, font)
        draw.text((left + 2, top + cell_h + 1), label, fill="black", font=font)
    return sheet


def _fitting(
    text: str, width_px: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """``text`` cut to a width, with dots where it was cut."""
    if draw.textlength(text, font=font) <= width_px:
        return text
    while text and draw.textlength(text + "...", font=font) > width_px:
        text = text[:-1]
    return text + "..."
