"""Anchors: what 0 and 1 of a score mean, and what they were measured with.

Owns the value, its file, and the check that the anchors can be told apart. Does not own their measurement
(``evaluation.score.evaluator``) or the scoring of adapters (``evaluation.score.score``).

    T_base, I_base   the untrained base, same noise, class word instead of the trigger
    T_chance         images of the base with the texts of the other prompts
    I_real           every held-out reference with the other references

Shapes: P prompts, N images of the base, D vector width.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.images import SampledImage
from trainer.errors import ConfigError, DataError
from trainer.files import write_atomic

ANCHORS_NAME, VECTORS_NAME = "anchors.json", "vectors.npy"
ELSEWHERE = ("untouched", "base_ND", "base_images")  # fields that are not in anchors.json


@dataclass(frozen=True)
class Anchors:
    """What 0 and 1 mean for one base, prompt set, sampling config, scorer, likeness encoder and reference set.

    ``*_P`` are raw cosines in the order of ``prompt_ids``. For class-only prompts, ``base_i_P`` anchors prior
    preservation, not likeness. ``base_diversity`` is the mean Vendi score of the base
    (``evaluation.score.safeguards``). ``untouched``: first images of the untrained base with the trigger;
    images of an adapter must differ from them. ``base_ND``: the base's images, in the order of the prompt set's
    jobs, as joint vectors (``evaluation.score.safeguards``); None if no limit needs them. ``base_images``: thumbnails
    of these images, for grids; without those that are no longer stored.
    """

    identity: dict[str, str]
    prompt_ids: tuple[str, ...]
    asks_for_subject: tuple[bool, ...]
    base_t_P: tuple[float, ...]
    chance_t_P: tuple[float, ...]
    base_i_P: tuple[float, ...]
    real_i: float
    real_i_se: float
    t_unit_se: float
    i_unit_se: float
    untouched: tuple[SampledImage, ...] = ()
    base_diversity: float | None = None
    base_ND: Tensor | None = field(default=None, compare=False, repr=False)
    base_images: tuple[SampledImage, ...] = field(default=(), compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The content of anchors.json."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ELSEWHERE}

    @property
    def key(self) -> str:
        """sha256 of the identity. Only scores with the same key are comparable."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def t_unit(self) -> float:
        """T_base − T_chance as a cosine: one unit of prompt following."""
        return float(np.mean(self.base_t_P) - np.mean(self.chance_t_P))

    @property
    def i_unit(self) -> float:
        """I_real − I_base as a cosine: one unit of likeness."""
        return float(self.real_i - np.array(self.base_i_P)[np.array(self.asks_for_subject)].mean())

    @property
    def base_prior_i(self) -> float | None:
        """Mean raw likeness of the base's class-only images; None if there is no such prompt."""
        only = np.array(self.base_i_P)[~np.array(self.asks_for_subject)]
        return float(only.mean()) if len(only) else None

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each pair of anchors closer than 2 standard errors; empty if the scale is sound."""
        found = []
        if self.t_unit < 2 * self.t_unit_se or self.t_unit <= 0:
            found.append(
                f"the scorer cannot tell the base's images of different prompts apart: {self.t_unit:.4f} ± "
                f"{self.t_unit_se:.4f}; use more prompts, and more different ones"
            )
        if self.i_unit < 2 * self.i_unit_se or self.i_unit <= 0:
            found.append(
                f"the references are hardly more similar to each other than to the base's images: {self.i_unit:.4f} "
                f"± {self.i_unit_se:.4f}; use more references, another likeness encoder, or more sampling steps"
            )
        return tuple(found)

    def check(self, identity: Mapping[str, str]) -> None:
        """Raise ConfigError unless the anchors were measured with this identity."""
        for what, value in identity.items():
            if self.identity[what] != value:
                raise ConfigError(
                    f"the anchors were measured with a different {what}", "measure them again in a new study"
                )

    def require_separable(self) -> None:
        """Raise DataError with the numbers if a score on this scale would be meaningless."""
        if self.problems:
            problem, hint = self.problems[0].split("; ", 1)
            raise DataError(f"scores would be meaningless: {problem}", hint)


def read_anchors(path: Path, identity: Mapping[str, str]) -> Anchors | None:
    """Stored anchors of this identity; None if the file is missing or incomplete. Raises ConfigError if they
    have a different identity."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored = values["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    changed = sorted(k for k in identity if stored.get(k) != identity[k])
    if changed:
        raise ConfigError(
            f"{path} was measured with a different {', '.join(changed)}: scores would not be comparable",
            "restore the original settings, or start a new study under another name: hpo search NAME …",
        )
    tuples = {f.name for f in fields(Anchors) if str(f.type).startswith("tuple")} - set(ELSEWHERE)
    found: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in values.items()}
    return Anchors(**found)


def write_anchors(path: Path, anchors: Anchors) -> None:
    """Write everything except images and vectors, which are stored separately."""
    write_atomic(path, json.dumps(anchors.as_dict(), indent=1))


def read_vectors(path: Path, count: int) -> Tensor | None:
    """The stored vectors of ``count`` images; None if the file is missing, damaged or of other images."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = vectors.ndim == 2 and len(vectors) == count and vectors.dtype == np.float32
    return torch.from_numpy(vectors) if sound and np.isfinite(vectors).all() else None


def write_vectors(path: Path, vectors_ND: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors_ND.numpy())
    write_atomic(path, buffer.getvalue())
