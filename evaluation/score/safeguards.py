"""Safeguards: faults that a score does not measure: copies of training images, identical images, a lost class word,
images that show nothing.

Owns the four values and how far each is from its limit. Does not own what happens to such a trial
(``hpo.search.trial``) or the check for black and uniform images (``evaluation.images.images``).

    copy rate   share of images closer to a training image than half the median distance of a
                held-out reference to its nearest training image; distance = 1 − cosine
    diversity   mean over prompts of Vendi = exp(−Σ λ log λ), λ the eigenvalues of K / n, K the cosines of
                the n images of a prompt (Friedman & Dieng, arXiv 2210.02410): 1 if all are equal, n if all differ
    prior       likeness of class-only images to the subject, on a scale from the untrained base (0) to real
                images of the subject (1): DreamBooth's PRES (arXiv 2208.12242), anchored
    shown       prompt following (0: images of the other prompts) and strangeness (``evaluation.score.strangeness``).
                Images show nothing if prompt following is below its limit *and* strangeness above 1: an
                overfitted LoRA ignores prompts and draws its subject; a new subject is strange and follows prompts

Copies and diversity use the scorer's image tower and the likeness encoder together: an encoder that is
trained to recognise an individual anywhere ignores the scene. Vendi depends on n, so it is compared with that
of the untrained base over the same prompts and seeds: those with the most seeds.

Shapes: N images, T training images, R references, D vector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.encoders import ImageEncoder, Vectors, scene_of
from evaluation.images import SampledImage
from evaluation.prompts import PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.limits import SafeguardLimits
from evaluation.score.strangeness import nearest, strangeness
from trainer.data import read_picture

COPIED, COLLAPSED, PRIOR_LOST, SHOWS_NOTHING = "copied", "collapsed", "prior_lost", "shows_nothing"
NEAR = 0.5  # assumed: fraction of the median distance of a held-out reference below which an image is a copy


@dataclass(frozen=True)
class Safety:
    """The measured values of one set of images; None if the prompt set cannot measure a value.

    ``amounts``: how far each value is above (> 0, broken) or below (≤ 0) its limit, in its own unit.
    """

    copy_rate: float
    diversity: float | None
    base_diversity: float | None
    prior: float | None
    prior_i: float | None
    base_prior_i: float | None
    amounts: dict[str, float]
    prompt_following: float | None = None
    strangeness: float | None = None

    @property
    def broken(self) -> tuple[str, ...]:
        """The broken limits, the worst first. Images that show nothing are often alike, too; that is secondary."""
        over = [name for name, amount in self.amounts.items() if amount > 0]
        return tuple(sorted(over, key=lambda name: (name != SHOWS_NOTHING, -self.amounts[name])))

    def says(self, name: str) -> str:
        """A broken limit in words."""
        return {
            COPIED: f"{self.copy_rate:.0%} of the images are copies of a training image",
            COLLAPSED: f"the images of a prompt all look alike: diversity {self.diversity or 0:.2f}, the "
            f"untrained base's is {self.base_diversity or 0:.2f}",
            PRIOR_LOST: f"the class word alone produces the subject: likeness {self.prior or 0:.2f} without the "
            "trigger (untrained base: 0, real images: 1)",
            SHOWS_NOTHING: f"the images show nothing: prompt following {self.prompt_following or 0:.2f} (images of "
            f"other prompts: 0), strangeness {self.strangeness or 0:.2f} (above 1: unlike everything known)",
        }[name]

    @property
    def advice(self) -> str:
        """What to do about the worst broken limit."""
        if self.broken[:1] == (SHOWS_NOTHING,):
            return (
                "the training destroyed the model: try a learning_rate of a third or less, then fewer epochs"
            )
        return "try fewer epochs, a lower learning_rate or more images; [limits] of the study file sets the limits"


@dataclass(frozen=True)
class Copies:
    """Training images as joint vectors, and the distance (1 − cosine) below which an image is a copy.

    ``references_RD``: the held-out images, which it was measured with.
    """

    features_TD: Tensor
    near: float
    references_RD: Tensor | None = None

    @property
    def real_KD(self) -> Tensor:
        """All real images of the subject: training images and references."""
        parts = (self.features_TD, self.references_RD)
        return torch.cat([part for part in parts if part is not None])

    def rate(self, vectors: Vectors, encoders: Sequence[ImageEncoder]) -> float:
        """Share of the images that are copies."""
        return float((nearest(vectors.joint(encoders), self.features_TD) < self.near).mean())


@dataclass(frozen=True)
class Parts:
    """What the score has measured already. ``prior_i``: mean raw likeness of the class-only images, None
    if there are none."""

    prompt_following: float
    prior_i: float | None


@dataclass(frozen=True)
class Safeguards:
    """The inputs of the four values, and their limits."""

    encoders: tuple[ImageEncoder, ...]
    copies: Copies
    limits: SafeguardLimits = field(default_factory=SafeguardLimits)

    def measure(
        self,
        vectors: Vectors,
        images: Sequence[SampledImage],
        prompts: PromptSet,
        parts: Parts,
        anchors: Anchors,
    ) -> Safety:
        """The values of a set of images."""
        own_ND, prior_i = vectors.joint(self.encoders), parts.prior_i
        base_prior_i, base_diversity = anchors.base_prior_i, anchors.base_diversity
        copy_rate = self.copies.rate(vectors, self.encoders)
        own = diversity(own_ND, images, prompts)
        prior = None
        if prior_i is not None and base_prior_i is not None and anchors.real_i > base_prior_i:
            prior = (prior_i - base_prior_i) / (anchors.real_i - base_prior_i)
        amounts = {COPIED: copy_rate - self.limits.copy_rate}
        if own is not None and base_diversity is not None:
            amounts[COLLAPSED] = self.limits.diversity - own / base_diversity
        if prior is not None:
            amounts[PRIOR_LOST] = prior - self.limits.prior
        following, strange = parts.prompt_following, None
        if self.limits.shown is not None and anchors.base_ND is not None:
            of_base = [prompt.id for prompt, _ in prompts.jobs]
            widths = [vectors.of(encoder).shape[1] for encoder in self.encoders]
            strange = strangeness(own_ND, anchors.base_ND, of_base, self.copies.real_KD, widths)
            amounts[SHOWS_NOTHING] = min(
                self.limits.shown - following, strange - 1
            )  # both conditions must hold
        return Safety(
            copy_rate, own, base_diversity, prior, prior_i, base_prior_i, amounts, following, strange
        )


def scene_encoders(scorer: ImageEncoder, likeness: ImageEncoder) -> tuple[ImageEncoder, ...]:
    """The encoders for copies and diversity: both, or one if they are the same."""
    scene = scene_of(likeness)
    return (scorer,) if scene.sha == scorer.sha else (scorer, scene)


def embed_copies(
    training: Sequence[Path], references: Sequence[Path], encoders: Sequence[ImageEncoder]
) -> Copies:
    """The training images as vectors, and the distance below which an image is a copy."""
    training_TD, references_RD = (
        Vectors([read_picture(path).pixels_HW3 for path in paths]).joint(encoders)
        for paths in (training, references)
    )
    near = NEAR * float(np.median(nearest(references_RD, training_TD)))
    return Copies(training_TD, near, references_RD)


def vendi(features_ND: Tensor) -> float:
    """The effective number of different images: 1 to N."""
    kernel_NN = (features_ND.double() @ features_ND.double().T).numpy() / len(features_ND)
    share_N = np.linalg.eigvalsh(kernel_NN).clip(min=0)
    share_N = share_N[share_N > 0]
    return float(np.exp(-np.sum(share_N * np.log(share_N))))


def diversity(features_ND: Tensor, images: Sequence[SampledImage], prompts: PromptSet) -> float | None:
    """Mean Vendi score over the prompts with the most seeds; None if every prompt has one image."""
    most = max(len(prompts.seeds_of(prompt)) for prompt in prompts.prompts)
    if most < 2:
        return None
    rows = {p.id: [n for n, image in enumerate(images) if image.prompt_id == p.id] for p in prompts.prompts}
    chosen = [rows[p.id] for p in prompts.prompts if len(prompts.seeds_of(p)) == most]
    return float(np.mean([vendi(features_ND[of]) for of in chosen]))
