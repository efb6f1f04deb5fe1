"""Resizing an image as sd-scripts does (library/utils.py: resize_image): by area means, by Lanczos, or by a method that
a file chooses.

Lanczos and box are Pillow's, as there; for the others sd-scripts calls OpenCV, whose positions and weights are computed
here. Nothing is averaged when nearest, linear and cubic make an image smaller.

Shapes: H W pixels; 3 colour channels or none; uint8.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_CUBIC = -0.75  # OpenCV's free parameter of the cubic kernel


def resampled(pixels: np.ndarray, width_px: int, height_px: int, method: str | None = None) -> np.ndarray:
    """``pixels`` at another size. Without a method: means of areas if no side grows, else Lanczos."""
    height, width = pixels.shape[:2]
    is_smaller = width_px <= width and height_px <= height
    method = method or ("area" if is_smaller else "lanczos")
    if method in _PILLOW:
        return np.asarray(Image.fromarray(pixels).resize((width_px, height_px), _PILLOW[method]))
    if method == "area" and is_smaller:
        return shrink(pixels, width_px, height_px)
    values = pixels.astype(np.float32)
    for axis, count in ((0, height_px), (1, width_px)):
        values = _weighed(values, count, axis, method)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def shrink(pixels_HW3: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """Every new pixel is the mean of the area it covers, edge pixels by their share (what cv2 calls INTER_AREA)."""
    rows = _area_means(pixels_HW3, height_px, axis=0)
    return np.rint(_area_means(rows, width_px, axis=1)).astype(np.uint8)


def _area_means(values: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Means of ``values`` over ``count`` equal stretches of an axis, float32.  ``count`` ≤ the axis' length."""
    length = values.shape[axis]
    if count == length:
        return values
    along = np.moveaxis(values, axis, 0)
    edges = np.arange(count + 1) * (length / count)
    whole = np.minimum(edges.astype(int), length - 1)
    share = (edges - whole).astype(np.float32).reshape(-1, *[1] * (along.ndim - 1))
    cut = along[whole] * share  # of the pixel that an edge runs through, the part that lies before the edge
    inner = np.add.reduceat(along[:-1], whole[:-1], axis=0, dtype=np.float32)
    # The last stretch ends within the last pixel, which ``inner`` leaves to ``cut``.
    return np.moveaxis((inner - cut[:-1] + cut[1:]) * np.float32(count / length), 0, axis)


def _weighed(values: np.ndarray, count: int, axis: int, method: str) -> np.ndarray:
    """``values`` at ``count`` places along an axis, each a weighed sum of its neighbours; edges are repeated."""
    length = values.shape[axis]
    first, weights = _KERNELS[method](length, count)
    along = np.moveaxis(values, axis, 0)
    total = np.zeros((count, *along.shape[1:]), dtype=np.float32)
    for tap in range(weights.shape[1]):
        weight = weights[:, tap].astype(np.float32).reshape(-1, *[1] * (along.ndim - 1))
        total += along[(first + tap).clip(0, length - 1)] * weight
    return np.moveaxis(total, 0, axis)


def _nearest(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(first neighbour, weights of the neighbours) of each place: INTER_NEAREST_EXACT, with its whole numbers."""
    step = ((length << 16) + count // 2) // count
    places = (step * np.arange(count, dtype=np.int64) + step // 2 - length % 2) >> 16
    return places.clip(0, length - 1), np.ones((count, 1))


def _linear(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """INTER_LINEAR."""
    centres = (np.arange(count) + 0.5) * (length / count) - 0.5
    first = np.floor(centres).astype(int)
    share = centres - first
    return first, np.stack([1 - share, share], axis=1)


def _enlarged_area(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """INTER_AREA where a side grows: between neighbours only where a new pixel covers both."""
    places = np.arange(count)
    first = np.floor(places * (1 / (count / length))).astype(int)  # rounded as OpenCV does
    share = ((places + 1) - (first + 1) * (count / length)).astype(
        np.float32
    )  # rounded as there, before the next line
    share = np.where(share <= 0, 0, share - np.floor(share))
    return first, np.stack([1 - share, share], axis=1)


def _cubic(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """INTER_CUBIC."""
    centres = (np.arange(count) + 0.5) * (length / count) - 0.5
    base = np.floor(centres).astype(int)
    share = centres - base
    far, near = share + 1, 1 - share
    first = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
    second = ((_CUBIC + 2) * share - (_CUBIC + 3)) * share * share + 1
    third = ((_CUBIC + 2) * near - (_CUBIC + 3)) * near * near + 1
    return base - 1, np.stack([first, second, third, 1 - first - second - third], axis=1)


_KERNELS = {
    "nearest": _nearest,
    "bilinear": _linear,
    "linear": _linear,
    "bicubic": _cubic,
    "cubic": _cubic,
    "area": _enlarged_area,
}
