"""Vectors of a set of images: each encoder runs once, however often its vectors are used.

Shapes: N images, D vector width; vectors have length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.encoders.embed import ImageEncoder


class Vectors:
    """Images, and their vectors from each encoder."""

    def __init__(self, pixels: Sequence[np.ndarray]) -> None:
        self.pixels = list(pixels)
        self._of: dict[str, Tensor] = {}

    def of(self, encoder: ImageEncoder) -> Tensor:
        """(N, D) unit vectors in the order of the images."""
        if encoder.sha not in self._of:
            self._of[encoder.sha] = encoder.image_features(self.pixels)
        return self._of[encoder.sha]

    def joint(self, encoders: Sequence[ImageEncoder]) -> Tensor:
        """The vectors of several encoders combined: the cosine is the mean of the encoders' cosines."""
        parts = [self.of(encoder) for encoder in encoders]
        return torch.cat(parts, dim=1) / len(parts) ** 0.5
