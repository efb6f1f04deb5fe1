"""Evaluator: everything that the adapters of a study or a run are sampled and scored with, as one value.

Owns the value and the measurement of its anchors, once, on the untrained base. Does not own the scoring of
adapters (``evaluation.score.score``) or the meaning of the anchors (``evaluation.score.anchors``).

Shapes: N images, P prompts, R references, D vector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.encoders import ImageEncoder, References, Scorer, Vectors, check_encoder
from evaluation.gauges import Gauge
from evaluation.images import (
    OnImages,
    SampleConfig,
    SampledImage,
    invalid_reason,
    invalid_words,
    read_images,
    sample,
    thumbnail,
)
from evaluation.prompts import PromptSet
from evaluation.score.anchors import (
    ANCHORS_NAME,
    VECTORS_NAME,
    Anchors,
    read_anchors,
    read_vectors,
    write_anchors,
    write_vectors,
)
from evaluation.score.formula import USUAL, Formula
from evaluation.score.safeguards import Safeguards, diversity, scene_encoders
from trainer.bases import Base
from trainer.errors import ConfigError, ModelFileError
from trainer.files import write_atomic
from trainer.text import clean_text

OVERFLOW_NAME = "vae-overflows.txt"


@dataclass(frozen=True)
class Evaluator:
    """What is sampled, how it is scored and, once measured, the anchors.

    ``safeguards`` and ``gauges`` are reported with the score but are not part of it. ``reference_pictures`` are
    thumbnails (H, W, 3) for grids. The caller injects the
    adapter into ``base`` before scoring and removes it afterwards.
    """

    base: Base
    prompts: PromptSet
    sampling: SampleConfig
    references: References
    scorer: Scorer
    likeness: ImageEncoder
    formula: Formula = USUAL
    safeguards: Safeguards | None = None
    gauges: tuple[Gauge, ...] = ()
    anchors: Anchors | None = None
    reference_pictures: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @property
    def identity(self) -> dict[str, str]:
        """What the anchors are measured with. The order matters: ``hpo.judge`` derives a folder name from it."""
        return {
            "base": self.base.identity,
            "prompts": self.prompts.hash,
            "sampling": self.sampling.hash,
            "scorer": self.scorer.sha,
            "likeness": self.likeness.sha,
            "references": self.references.hash,
        }

    @property
    def scale(self) -> Anchors:
        """The anchors; they must be measured before anything is scored."""
        assert self.anchors is not None, "make_anchors first"
        return self.anchors

    @property
    def needs_base_vectors(self) -> bool:
        """Whether a limit compares images with those of the untrained base."""
        return self.safeguards is not None and self.safeguards.limits.shown is not None

    def with_anchors(self, anchors: Anchors) -> Evaluator:
        return replace(self, anchors=anchors)

    def on(self, prompts: PromptSet) -> Evaluator:
        """The same evaluator for other prompts, whose anchors are not measured yet."""
        return replace(self, prompts=prompts, anchors=None)

    def cosines(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        """Cosines of every image with every scored text (N, P), and the mean with the references (N)."""
        texts_PD = self.scorer.text_features([p.scored_text for p in self.prompts.prompts])
        alike_NR = _cosines(vectors.of(self.likeness), self.references.features_RD)
        return _cosines(vectors.of(self.scorer), texts_PD), alike_NR.mean(1)


def make_anchors(evaluator: Evaluator, folder: Path, on_image: OnImages | None = None) -> Anchors:
    """The anchors of a study: read from ``folder``, or measured on the untrained base and stored.

    Call it before an adapter is injected. Raises ConfigError if the stored anchors have a different identity,
    because scores would not be comparable. An earlier version stored no vectors of the base's images: where a limit
    needs them, they are computed from its images, and the stored anchors stay. ``on_image``
    (done, total) is called before the first image, too.
    """
    base, prompts, sampling = evaluator.base, evaluator.prompts, evaluator.sampling
    injected = [name for name, network in base.components().items() if hasattr(network, "peft_config")]
    assert not injected, f"anchors must be measured on the untrained base; {injected} hold an adapter"
    check_encoder(evaluator.references, evaluator.likeness)
    stored = read_anchors(folder / ANCHORS_NAME, evaluator.identity)
    _remember_overflow(base, folder / OVERFLOW_NAME)
    untouched = tuple(
        sample(base, prompts, sampling, folder / "untouched", identity=base.identity, only_first_chunk=True)
    )
    base_ND = read_vectors(folder / VECTORS_NAME, prompts.image_count) if stored else None
    if stored and (base_ND is not None or not evaluator.needs_base_vectors):
        shown = _thumbnails(read_images(folder / "samples", prompts))
        return replace(stored, untouched=untouched, base_ND=base_ND, base_images=shown)
    if all(map(invalid_reason, untouched)):  # no need to draw the others, which can take minutes
        raise _draws_nothing(untouched)
    if on_image and not stored:
        on_image(0, prompts.image_count)
    images = sample(
        base,
        prompts,
        sampling,
        folder / "samples",
        identity=base.identity,
        as_class=True,
        on_image=None if stored else on_image,  # usually only read then
    )
    if any(map(invalid_reason, images)):
        raise _draws_nothing(images)
    anchors = replace(measure_anchors(evaluator, images, untouched), base_images=_thumbnails(images))
    assert anchors.base_ND is not None, "measured just now"
    write_vectors(folder / VECTORS_NAME, anchors.base_ND)
    if stored:
        return replace(stored, untouched=untouched, base_ND=anchors.base_ND, base_images=anchors.base_images)
    write_anchors(folder / ANCHORS_NAME, anchors)
    return anchors


def _thumbnails(images: Sequence[SampledImage]) -> tuple[SampledImage, ...]:
    return tuple(replace(image, pixels_HW3=thumbnail(image.pixels_HW3)) for image in images)


def _draws_nothing(images: Sequence[SampledImage]) -> ModelFileError:
    return ModelFileError(
        f"the untrained base draws images that show nothing: {invalid_words(images)}",
        'try --set no_half_vae=true or mixed_precision = "no"; if that does not help, the base file is damaged',
    )


def _remember_overflow(base: Base, note: Path) -> None:
    """Keep beside the anchors that the base's VAE overflows in fp16. A later process then decodes in fp32 from the
    start, so that its images equal those of a process that was not interrupted."""

    def write() -> None:
        write_atomic(
            note, f"The VAE of {clean_text(base.name)} overflows in fp16; images are decoded in fp32.\n"
        )

    if note.is_file():
        base.vae_overflows = True
    elif base.vae_overflows:
        write()
    else:
        base.on_overflow.append(write)


def measure_anchors(
    evaluator: Evaluator, images: Sequence[SampledImage], untouched: Sequence[SampledImage] = ()
) -> Anchors:
    """Anchors from the untrained base's images of the scored texts."""
    prompts, vectors = evaluator.prompts, Vectors([image.pixels_HW3 for image in images])
    t_NP, i_N = evaluator.cosines(vectors)
    t_PP, own_i_P = _by_prompt(t_NP, images, prompts), _by_prompt(i_N, images, prompts)
    texts = [p.scored_text for p in prompts.prompts]
    other_PP = np.array([[a != b for b in texts] for a in texts])
    if not other_PP.any(axis=1).all():
        raise ConfigError(
            "all prompts are the same once the class word replaces the trigger",
            "give prompts that differ in content",
        )
    base_t_P, chance_t_P = np.diag(t_PP), (t_PP * other_PP).sum(1) / other_PP.sum(1)
    asks_P = np.array([p.asks_for_subject for p in prompts.prompts])
    real_i, real_i_se = _leave_one_out(evaluator.references.features_RD)
    base_i_se = _mean_se(own_i_P[asks_P])
    seen_ND = vectors.joint(scene_encoders(evaluator.scorer, evaluator.likeness))
    return Anchors(
        identity=evaluator.identity,
        prompt_ids=tuple(p.id for p in prompts.prompts),
        asks_for_subject=tuple(bool(a) for a in asks_P),
        base_t_P=tuple(map(float, base_t_P)),
        chance_t_P=tuple(map(float, chance_t_P)),
        base_i_P=tuple(map(float, own_i_P)),
        real_i=real_i,
        real_i_se=real_i_se,
        t_unit_se=_mean_se(base_t_P - chance_t_P),
        i_unit_se=float(np.hypot(real_i_se, base_i_se)),
        untouched=tuple(untouched),
        base_diversity=diversity(seen_ND, images, prompts),
        base_ND=seen_ND,
    )


def _cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Cosines of unit vectors, in float64."""
    return (a.double() @ b.double().T).numpy()


def _by_prompt(values_N: np.ndarray, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
    """Mean over the images of each prompt, in prompt order."""
    ids = np.array([image.prompt_id for image in images])
    return np.stack([values_N[ids == p.id].mean(axis=0) for p in prompts.prompts])


def _mean_se(values: np.ndarray) -> float:
    """Standard error of a mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _leave_one_out(features_RD: Tensor) -> tuple[float, float]:
    """Mean cosine between pairs of references, and its jackknife standard error over references."""
    cosines_RR = _cosines(features_RD, features_RD)
    count = len(cosines_RR)
    total = cosines_RR.sum() - np.trace(cosines_RR)
    mean = float(total / (count * (count - 1)))
    if count == 2:  # one pair has no spread
        return mean, 0.0
    without_R = total - 2 * (cosines_RR.sum(1) - np.diag(cosines_RR))
    means_R = without_R / ((count - 1) * (count - 2))
    return mean, float(np.sqrt((count - 1) * np.mean((means_R - means_R.mean()) ** 2)))
