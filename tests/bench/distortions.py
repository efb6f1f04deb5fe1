"""Images that show nothing, or nearly: noise, stripes, blur, few levels, one image again and again.

Owns how each is made from the images of the untrained base. The images of one distortion differ from each other,
except where that is the fault. Nothing here uses an encoder.

Shapes: H, W pixels; 3 colour channels; uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from evaluation.images.images import SampledImage

Pixels = NDArray[np.uint8]
Distort = Callable[[Pixels, np.random.Generator], Pixels]


def uniform_noise(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
    return random.integers(0, 256, pixels_HW3.shape, dtype=np.uint8)


def grey_noise(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
    return np.repeat(random.integers(0, 256, (*pixels_HW3.shape[:2], 1), dtype=np.uint8), 3, axis=2)


def coloured_noise(cells: int) -> Distort:
    """Smooth blobs of random colours, as a LoRA with far too high a rate draws them."""

    def distort(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
        blobs = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(blobs.resize(pixels_HW3.shape[1::-1], Image.Resampling.BICUBIC))

    return distort


def pink_noise(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
    """Noise with the spectrum of photographs: amplitude ∝ 1 / frequency."""
    height, width = pixels_HW3.shape[:2]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    white = random.normal(size=(3, height, width))
    noise = np.fft.ifft2(np.fft.fft2(white) / frequency).real.transpose(1, 2, 0)
    noise = (noise - noise.mean((0, 1))) / noise.std((0, 1))
    return np.clip(127 + 60 * noise, 0, 255).astype(np.uint8)


def shuffled_pixels(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
    """Exactly the image's colours, in no order."""
    return random.permutation(pixels_HW3.reshape(-1, 3)).reshape(pixels_HW3.shape)


def added_noise(sd: float) -> Distort:
    def distort(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
        return np.clip(pixels_HW3 + random.normal(0, sd, pixels_HW3.shape), 0, 255).astype(np.uint8)

    return distort


def stripes(width: float, colours: int) -> Distort:
    """Across or down, each ``width`` of the image wide; ``colours`` in turn."""

    def distort(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
        height = pixels_HW3.shape[0]
        wide_px = max(1, round(width * height))
        palette = random.integers(0, 256, (colours, 3), dtype=np.uint8)
        line = palette[(np.arange(height) + int(random.integers(2 * wide_px))) // wide_px % colours]
        image = np.repeat(line[:, None], pixels_HW3.shape[1], axis=1)
        return image if random.random() < 0.5 else np.ascontiguousarray(image.transpose(1, 0, 2))

    return distort


def blur(sigma: float) -> Distort:
    """Gaussian, ``sigma`` of the height."""

    def distort(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
        gaussian = ImageFilter.GaussianBlur(sigma * pixels_HW3.shape[0])
        return np.asarray(Image.fromarray(pixels_HW3).filter(gaussian))

    return distort


def posterised(levels: int, grey: bool = False) -> Distort:
    """``levels`` values a channel, or of grey."""

    def distort(pixels_HW3: Pixels, random: np.random.Generator) -> Pixels:
        values = pixels_HW3.astype(np.float64)
        if grey:
            values = np.repeat(values @ np.array([[0.299], [0.587], [0.114]]), 3, axis=2)
        return (np.round(values / 255 * (levels - 1)) / (levels - 1) * 255).astype(np.uint8)

    return distort


DISTORTIONS: dict[str, Distort] = {
    "uniform noise": uniform_noise,
    "grey noise": grey_noise,
    "pink noise (1/f)": pink_noise,
    **{f"coloured noise, {n} × {n} blobs": coloured_noise(n) for n in (4, 8, 16, 32)},
    "pixels shuffled": shuffled_pixels,
    "added noise, sd 20": added_noise(20),
    "added noise, sd 120": added_noise(120),
    "stripes of 2 colours, 1/16 wide": stripes(1 / 16, 2),
    "stripes of 2 colours, 1/8 wide": stripes(1 / 8, 2),
    "stripes of 9 colours, 1/16 wide": stripes(1 / 16, 9),
    **{f"blur, σ {round(100 * s)} % of the height": blur(s) for s in (0.02, 0.05, 0.1, 0.15, 0.2)},
    **{f"posterised, {n} levels": posterised(n) for n in (4, 3, 2)},
    "posterised, black and white": posterised(2, grey=True),
    "greyscale": posterised(256, grey=True),
}
# No trace of the image is left of these.
BLANK = (
    *(name for name in DISTORTIONS if "noise" in name and not name.startswith("added")),
    *(name for name in DISTORTIONS if name.startswith("stripes")),
)
REPEATED, REPEATED_NOISE = "one image repeated", "one noise image repeated"


def distorted(name: str, images: Sequence[SampledImage]) -> list[SampledImage]:
    """The images, each distorted in its own way; for REPEATED, the first of them under every prompt and seed."""
    if name in (REPEATED, REPEATED_NOISE):
        one = images[0].pixels_HW3
        if name == REPEATED_NOISE:
            one = coloured_noise(8)(one, np.random.default_rng(0))
        return [replace(image, pixels_HW3=one) for image in images]
    distort = DISTORTIONS[name]
    return [
        replace(image, pixels_HW3=distort(image.pixels_HW3, np.random.default_rng((n, 8))))
        for n, image in enumerate(images)
    ]
