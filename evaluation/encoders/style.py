"""StyleEncoder: how images are painted, not what they show.

Owns one encoder that wraps another. An image becomes the mean and the standard deviation of each channel over
the patches of the wrapped encoder, so the position of an object has no influence. Matching these statistics
is matching style (Huang & Belongie, arXiv 1703.06868; Li et al., arXiv 1701.01036, show that the Gram matrix
belongs to the same family). The mean also contains some of the content. Since prompts are paired, it cancels
between trials; anchors set the scale.

Shapes: N images, L patches, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evaluation.encoders.embed import ImageEncoder


class PatchEncoder(ImageEncoder, Protocol):
    """An image encoder that also returns its patch tokens."""

    def patch_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) images of any size → (N, L, C), before pooling, fp32 on CPU."""
        ...


class StyleEncoder:
    """Mean and standard deviation of each channel over the patches, as one vector of length 1."""

    def __init__(self, scene: PatchEncoder) -> None:
        self.scene = scene
        self.name = f"style of {scene.name}"
        self.sha = hashlib.sha256(f"mean and deviation of patches: {scene.sha}".encode()).hexdigest()

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        patches_NLC = self.scene.patch_features(images)
        halves = [patches_NLC.mean(dim=1), patches_NLC.std(dim=1, correction=0)]
        joined = torch.cat([torch.nn.functional.normalize(half, dim=-1) for half in halves], dim=-1)
        return torch.nn.functional.normalize(joined, dim=-1)


def scene_of(likeness: ImageEncoder) -> ImageEncoder:
    """The encoder for image content: the wrapped one of a style encoder, otherwise the encoder itself."""
    return likeness.scene if isinstance(likeness, StyleEncoder) else likeness
