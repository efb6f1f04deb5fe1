"""Strangeness: how far images are from everything the encoders have been shown of this base and this subject.

Owns the one value. Does not own its limit or the second condition, prompt following
(``evaluation.score.safeguards``).

    known        the untrained base's images, the training images and the references
    distance     1 − cosine to the nearest known image, in one encoder
    reach        the distance that FAR of the base's own images keep, each without the images of its own prompt
    strangeness  median distance of the images / reach, in the encoder where it is largest: above 1, most of the
                 images are farther from everything known than nearly all images of the base are from those of
                 its other prompts

Noise, stripes and smears lie outside what the base can draw and above 1; what a LoRA draws of its subject lies
near the real images, and what it leaves unchanged near the base's. The largest counts because an encoder may put
everything unfamiliar into one place, beside something odd that is known. Measured in docs/evaluation.md.

Shapes: N images, K known images, D vector width of all encoders together, E of one encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FAR = 0.9  # measured with 0.95, too: then stripes on the miniature's style study are not strange
SMALLEST = 1e-6  # of a reach: a base that draws one image only


def strangeness(
    features_ND: Tensor, base_ND: Tensor, prompt_ids: Sequence[str], real_KD: Tensor, widths: Sequence[int]
) -> float:
    """Median distance of the images to what is known, in units of the base's own reach.

    All vectors are joint ones (``Vectors.joint``). ``widths``: the vector width of each encoder. ``prompt_ids``: the
    prompt of each of the base's images.
    """
    found = []
    for own_NE, base_NE, real_KE in zip(
        *(_by_encoder(joint, widths) for joint in (features_ND, base_ND, real_KD)), strict=True
    ):
        distance = float(np.median(nearest(own_NE, torch.cat([base_NE, real_KE]))))
        found.append(distance / max(reach(base_NE, prompt_ids, real_KE), SMALLEST))
    return max(found)


def reach(base_NE: Tensor, prompt_ids: Sequence[str], real_KE: Tensor) -> float:
    """How far the base's images are from what is known when their own prompt is left out."""
    distances_N = nearest(base_NE, real_KE)
    for row, prompt_id in enumerate(prompt_ids):
        others = [n for n, of in enumerate(prompt_ids) if of != prompt_id]
        if others:
            apart = float(nearest(base_NE[row : row + 1], base_NE[others])[0])
            distances_N[row] = min(distances_N[row], apart)
    return float(np.quantile(distances_N, FAR))


def nearest(features_ND: Tensor, known_KD: Tensor) -> np.ndarray:
    """Distance (1 − cosine) of each image to its nearest known image (N)."""
    return (1 - (features_ND.double() @ known_KD.double().T).max(dim=1).values).numpy()


def _by_encoder(joint_ND: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The unit vectors of each encoder, from joint ones."""
    return [part * len(widths) ** 0.5 for part in joint_ND.split(list(widths), dim=1)]
