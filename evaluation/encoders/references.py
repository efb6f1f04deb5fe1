"""The reference images, which are held out of training, as vectors of the likeness encoder.

Shapes: R references, D vector width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evaluation.encoders.embed import ImageEncoder
from trainer.data import read_picture
from trainer.errors import ConfigError, DataError


@dataclass(frozen=True)
class References:
    """Held-out real images as vectors of the likeness encoder."""

    features_RD: Tensor
    hash: str
    encoder_sha: str


def require_references(count: int) -> None:
    """Raise DataError for fewer than two references: likeness is measured between them."""
    if count < 2:
        raise DataError(
            f"likeness needs at least 2 images that are not trained on, and there {'is' if count == 1 else 'are'} "
            f"{count}",
            "add images (with 10 or more, 2 are held out), put 2 into held_out/ (hpo dataset prepare --held-out 2), "
            "or give other images with --references DIR",
        )


def embed_references(paths: Sequence[Path], likeness: ImageEncoder) -> References:
    """Vectors of the held-out real images."""
    require_references(len(paths))
    pictures = [read_picture(path) for path in paths]
    content = hashlib.sha256("".join(sorted(p.sha256 for p in pictures)).encode()).hexdigest()
    return References(likeness.image_features([p.pixels_HW3 for p in pictures]), content, likeness.sha)


def check_encoder(references: References, likeness: ImageEncoder) -> None:
    """Raise ConfigError if the references were embedded by a different encoder."""
    if references.encoder_sha != likeness.sha:
        raise ConfigError("the references were embedded by a different encoder", "embed them again")
