"""Figures beside the score: other models' view of the same pictures, reported and never part of the score.

Owns the interface and the two gauges that are cosines.  Preference models are in ``evaluation.gauges.preference``.

Raw values are stored with the model's name and the sha256 of its weights: values of two models, or of two
versions of one, are not comparable.  Shapes: N pictures.
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
    """One figure: the mean of raw values over prompts, and the values picture by picture (None: not asked)."""

    measure: str
    value: float
    model: str
    sha: str
    per_image: tuple[float | None, ...]


class Gauge(Protocol):
    """One figure of pictures.  ``measure`` says what it is, ``model`` and ``sha`` by what it was measured."""

    measure: str
    model: str
    sha: str

    def values(self, vectors: Vectors, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
        """Raw values (N); NaN for a picture that the figure does not ask."""
        ...


class TextGauge:
    """Mean cosine of pictures and their scored texts by another scorer: CLIP-T."""

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
    """Mean cosine of pictures that ask for the subject and every held-out reference: CLIP-I, DINO-I."""

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
    """Every gauge's figure: the mean over prompts, as in the score, of each one's mean over its pictures."""
    found = []
    ids_N = np.array([image.prompt_id for image in images])
    for gauge in gauges:
        values_N = gauge.values(vectors, images, prompts)
        of_prompt = [values_N[(ids_N == p.id) & ~np.isnan(values_N)] for p in prompts.prompts]
        means = [float(values.mean()) for values in of_prompt if len(values)]
        row = tuple(None if np.isnan(v) else float(v) for v in values_N)
        found.append(Beside(gauge.measure, float(np.mean(means)), gauge.model, gauge.sha, row))
    return tuple(found)
