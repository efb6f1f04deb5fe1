"""Gauges: metrics of the same images from other models, reported with the score but never part of it.

Owns the interface and the two cosine gauges. Does not own preference models; see ``evaluation.gauges.preference``.

Raw values are stored with the name of the model and the sha256 of its weights, because values of different
models or versions are not comparable.  Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evaluation.encoders import ImageEncoder, References, Scorer, Vectors, check_encoder
from evaluation.images import SampledImage
from evaluation.prompts import PromptSet


@dataclass(frozen=True)
class Beside:
    """One metric: the mean of its raw values over prompts, and the value of each image (None: not measured)."""

    measure: str
    value: float
    model: str
    sha: str
    per_image: tuple[float | None, ...]


class Gauge(Protocol):
    """One metric of images. ``measure`` names it, ``model`` and ``sha`` identify the model that computes it."""

    measure: str
    model: str
    sha: str

    def values(self, vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
        """Raw values (N); NaN for an image that the gauge does not measure."""
        ...


class TextGauge:
    """CLIP-T: mean cosine of images and their scored texts, with another scorer."""

    measure = "clip_t"

    def __init__(self, scorer: Scorer) -> None:
        self.model, self.sha = scorer.name, scorer.sha
        self._scorer = scorer

    def values(self, vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
        row = {p.id: n for n, p in enumerate(prompts.prompts)}
        texts_PD = self._scorer.text_features([p.scored_text for p in prompts.prompts]).double()
        texts_ND = texts_PD[[row[image.prompt_id] for image in images]]
        return (vectors.of(self._scorer).double() * texts_ND).sum(1).numpy()


class LikenessGauge:
    """CLIP-I or DINO-I: mean cosine of each image of the subject with every held-out reference."""

    def __init__(self, measure: str, encoder: ImageEncoder, references: References) -> None:
        check_encoder(references, encoder)
        self.measure, self.model, self.sha = measure, encoder.name, encoder.sha
        self._encoder, self._references = encoder, references

    def values(self, vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
        asks = {p.id: p.asks_for_subject for p in prompts.prompts}
        cosines_NR = vectors.of(self._encoder).double() @ self._references.features_RD.double().T
        return np.where([asks[image.prompt_id] for image in images], cosines_NR.mean(1).numpy(), np.nan)


def read(
    gauges: Sequence[Gauge], vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet
) -> tuple[Beside, ...]:
    """The metric of every gauge: the mean over prompts of each prompt's mean over its images, as in the score."""
    found = []
    ids_N = np.array([image.prompt_id for image in images])
    for gauge in gauges:
        values_N = gauge.values(vectors, images, prompts)
        of_prompt = [values_N[(ids_N == p.id) & ~np.isnan(values_N)] for p in prompts.prompts]
        means = [float(values.mean()) for values in of_prompt if len(values)]
        row = tuple(None if np.isnan(v) else float(v) for v in values_N)
        found.append(Beside(gauge.measure, float(np.mean(means)), gauge.model, gauge.sha, row))
    return tuple(found)
