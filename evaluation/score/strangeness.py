"""Strangeness: how far images are from everything the encoders have been shown of this base and this subject.

Owns the one value. Does not own its limit or the second condition, prompt following
(``evaluation.score.safeguards``).

    known        the untrained base's images, the training images and the references
    distance     1 − cosine to the nearest known image
    reach        the distance that FAR of the base's own images keep, each without the images of its own prompt
    strangeness  median distance of the images / reach: above 1, most of them are farther from everything known
                 than the images of one prompt are from those of the others

Noise, stripes and smears lie outside what the base can draw and above 1; what a LoRA draws of its subject lies
near the real images, and what it leaves unchanged near the base's. Measured in docs/evaluation.md.

Shapes: N images, K known images, D vector width; vectors have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FAR = 0.95  # assumed: the share of the base's own images that lies within reach


def strangeness(features_ND: Tensor, base_ND: Tensor, prompt_ids: Sequence[str], real_KD: Tensor) -> float:
    """Median distance of the images to what is known, in units of the base's own reach.

    ``prompt_ids``: the prompt of each of the base's images.
    """
    known_KD = torch.cat([base_ND, real_KD])
    own = float(np.median(nearest(features_ND, known_KD)))
    return own / max(reach(base_ND, prompt_ids, real_KD), 1e-6)


def reach(base_ND: Tensor, prompt_ids: Sequence[str], real_KD: Tensor) -> float:
    """How far the base's images are from what is known when their own prompt is left out."""
    distances_N = nearest(base_ND, real_KD)
    for row, prompt_id in enumerate(prompt_ids):
        others = [n for n, of in enumerate(prompt_ids) if of != prompt_id]
        if others:
            apart = float(nearest(base_ND[row : row + 1], base_ND[others])[0])
            distances_N[row] = min(distances_N[row], apart)
    return float(np.quantile(distances_N, FAR))


def nearest(features_ND: Tensor, known_KD: Tensor) -> np.ndarray:
    """Distance (1 − cosine) of each image to its nearest known image (N)."""
    return (1 - (features_ND.double() @ known_KD.double().T).max(dim=1).values).numpy()
