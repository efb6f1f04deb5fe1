"""Sampled images as values: the check for invalid images, the check that an adapter has an effect, PNG.

Owns everything that is done with finished images. Does not own sampling
(``evaluation.images.sampling``), grids (``evaluation.images.grid``) or embedding (``evaluation.encoders.embed``).

Shapes: H, W pixels; 3 colour channels; uint8.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.errors import InvalidImages, ModelFileError

BLACK_LEVEL = 10  # assumed: largest pixel value of an image that counts as black (0-255)
UNIFORM_RANGE = 6  # assumed: largest range of any channel of an image that counts as uniform (0-255)
INVALID_HINT = 'try a lower learning_rate, fewer epochs or mixed_precision = "bf16"'
# The same image may differ by this much between batch compositions; a trained adapter must change it by more.
SAME_WITHIN = 1


@dataclass(frozen=True)
class SampledImage:
    """One image with its prompt and seed."""

    prompt_id: str
    seed: int
    pixels_HW3: np.ndarray
    finite: bool = True


def invalid_reason(image: SampledImage) -> str | None:
    """``not finite``, ``black`` or ``uniform``; None for a valid image."""
    if not image.finite:
        return "not finite"
    if int(image.pixels_HW3.max()) <= BLACK_LEVEL:
        return "black"
    flat = image.pixels_HW3.reshape(-1, 3)
    if int((flat.max(axis=0).astype(int) - flat.min(axis=0)).max()) <= UNIFORM_RANGE:
        return "uniform"
    return None


def invalid_words(images: Sequence[SampledImage]) -> str:
    """``3 of 8 images are invalid (1 black, 2 uniform)``; empty if all images are valid."""
    reasons = [reason for reason in map(invalid_reason, images) if reason]
    counts = ", ".join(f"{reasons.count(r)} {r}" for r in sorted(set(reasons)))
    return f"{len(reasons)} of {len(images)} images are invalid ({counts})" if reasons else ""


def check_valid(images: Sequence[SampledImage]) -> None:
    """Raise InvalidImages if any image is black, uniform or not finite."""
    if words := invalid_words(images):
        raise InvalidImages(words, INVALID_HINT)


def largest_change(images: Sequence[SampledImage], base_images: Sequence[SampledImage]) -> int:
    """Largest difference of a pixel value (0-255) between images of the same prompt and seed."""
    own = {(i.prompt_id, i.seed): i.pixels_HW3 for i in base_images}
    pairs = [(i.pixels_HW3, own[i.prompt_id, i.seed]) for i in images if (i.prompt_id, i.seed) in own]
    assert pairs, "no image of the base to compare with"
    return max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)


class Unchanged(ModelFileError):
    """The images with the adapter equal those of the untrained base."""


def prove_applied(images: Sequence[SampledImage], base_images: Sequence[SampledImage]) -> None:
    """Raise Unchanged if the images equal those of the untrained base: the adapter was not applied or is too weak.

    Otherwise a LoRA that failed to load silently would get the score of the base.
    """
    if largest_change(images, base_images) <= SAME_WITHIN:
        raise Unchanged(
            "the LoRA has no effect: its images equal those of the untrained base",
            "check that it was trained for this base and that its learning rate was not too low",
        )


def png_bytes(pixels_HW3: np.ndarray) -> bytes:
    """The image as PNG bytes; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG")
    return buffer.getvalue()
