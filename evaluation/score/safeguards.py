"""Safeguards: what a score does not see – copies of training images, images all alike, a lost class word.

Owns the three figures, their limits and by how much a limit is broken.  Does not decide what becomes of such
a trial (``hpo.search.trial``), nor judge black or uniform pictures (``evaluation.images.images``).

    copy rate   share of pictures nearer to a training image than half the usual (median) distance of a
                held-out reference to its nearest training image; distance = 1 − cosine
    diversity   mean over prompts of Vendi = exp(−Σ λ log λ), λ eigenvalues of K / n, K the cosines of a prompt's
                n pictures (Friedman & Dieng, arXiv 2210.02410): 1 if all are alike, n if nothing is shared
    prior       likeness of class-only pictures to the subject, on a scale from the untrained base's (0) to real
                images of the subject (1): DreamBooth's PRES (arXiv 2208.12242), anchored

Copies and diversity use the scorer's image tower and the likeness encoder together: one that was trained to
know an individual anywhere does not see the scene.  Vendi depends on n, so it is compared with the untrained
base's over the same prompts and seeds only – those with the most seeds.

Shapes: N pictures, T training images, R references, D vector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.encoders import ImageEncoder, Vectors, scene_of
from evaluation.images import SampledImage
from evaluation.prompts import PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.limits import SafeguardLimits
from trainer.data import read_picture

NEAR = 0.5  # assumed: a copy is nearer than this part of a held-out reference's usual distance


@dataclass(frozen=True)
class Safety:
    """The figures of one set of pictures; None where a prompt set cannot show it.

    ``amounts``: by how much each limit is broken (> 0) or kept (≤ 0), in the figure's own unit.
    """

    copy_rate: float
    diversity: float | None
    base_diversity: float | None
    prior: float | None
    prior_i: float | None
    base_prior_i: float | None
    amounts: dict[str, float]

    @property
    def broken(self) -> tuple[str, ...]:
        """The limits that are broken, the furthest first."""
        over = [name for name, amount in self.amounts.items() if amount > 0]
        return tuple(sorted(over, key=lambda name: -self.amounts[name]))

    def says(self, name: str) -> str:
        """A broken limit in words."""
        return {
            COPIED: f"{self.copy_rate:.0%} of the images repeat a training image",
            COLLAPSED: f"the images of one prompt are all alike: diversity {self.diversity or 0:.2f}, the "
            f"untrained base's is {self.base_diversity or 0:.2f}",
            PRIOR_LOST: f"the class word alone draws the subject: likeness {self.prior or 0:.2f} without the "
            "trigger, where the untrained base has 0 and real images 1",
        }[name]


COPIED, COLLAPSED, PRIOR_LOST = "copied", "collapsed", "prior_lost"


@dataclass(frozen=True)
class Copies:
    """Training images as joint vectors, and how near is too near (1 − cosine)."""

    features_TD: Tensor
    near: float

    def rate(self, vectors: Vectors, encoders: Sequence[ImageEncoder]) -> float:
        """Share of the pictures that are copies."""
        return float((nearest(vectors.joint(encoders), self.features_TD) < self.near).mean())


@dataclass(frozen=True)
class Safeguards:
    """What the three figures need, and their limits."""

    encoders: tuple[ImageEncoder, ...]
    copies: Copies
    limits: SafeguardLimits = field(default_factory=SafeguardLimits)

    def measure(
        self,
        vectors: Vectors,
        images: Sequence[SampledImage],
        prompts: PromptSet,
        prior_i: float | None,
        anchors: Anchors,
    ) -> Safety:
        """The figures of pictures.  ``prior_i``: mean raw likeness of the class-only ones, None without any."""
        base_prior_i, base_diversity = anchors.base_prior_i, anchors.base_diversity
        copy_rate = self.copies.rate(vectors, self.encoders)
        own = diversity(vectors.joint(self.encoders), images, prompts)
        prior = None
        if prior_i is not None and base_prior_i is not None and anchors.real_i > base_prior_i:
            prior = (prior_i - base_prior_i) / (anchors.real_i - base_prior_i)
        amounts = {COPIED: copy_rate - self.limits.copy_rate}
        if own is not None and base_diversity is not None:
            amounts[COLLAPSED] = self.limits.diversity - own / base_diversity
        if prior is not None:
            amounts[PRIOR_LOST] = prior - self.limits.prior
        return Safety(copy_rate, own, base_diversity, prior, prior_i, base_prior_i, amounts)


def scene_encoders(scorer: ImageEncoder, likeness: ImageEncoder) -> tuple[ImageEncoder, ...]:
    """The encoders that copies and diversity are seen with: both, or the one there is."""
    scene = scene_of(likeness)
    return (scorer,) if scene.sha == scorer.sha else (scorer, scene)


def embed_copies(
    training: Sequence[Path], references: Sequence[Path], encoders: Sequence[ImageEncoder]
) -> Copies:
    """What a copy is nearer to than held-out pictures are."""
    training_TD, references_RD = (
        Vectors([read_picture(path).pixels_HW3 for path in paths]).joint(encoders)
        for paths in (training, references)
    )
    return Copies(training_TD, NEAR * float(np.median(nearest(references_RD, training_TD))))


def nearest(features_ND: Tensor, training_TD: Tensor) -> np.ndarray:
    """Distance (1 − cosine) of each picture to the training image most like it (N)."""
    return (1 - (features_ND.double() @ training_TD.double().T).max(dim=1).values).numpy()


def vendi(features_ND: Tensor) -> float:
    """The effective number of different pictures: 1 to N."""
    kernel_NN = (features_ND.double() @ features_ND.double().T).numpy() / len(features_ND)
    share_N = np.linalg.eigvalsh(kernel_NN).clip(min=0)
    share_N = share_N[share_N > 0]
    return float(np.exp(-np.sum(share_N * np.log(share_N))))


def diversity(features_ND: Tensor, images: Sequence[SampledImage], prompts: PromptSet) -> float | None:
    """Mean Vendi over the prompts with the most seeds; None if each prompt has one picture."""
    most = max(len(prompts.seeds_of(prompt)) for prompt in prompts.prompts)
    if most < 2:
        return None
    rows = {p.id: [n for n, image in enumerate(images) if image.prompt_id == p.id] for p in prompts.prompts}
    chosen = [rows[p.id] for p in prompts.prompts if len(prompts.seeds_of(p)) == most]
    return float(np.mean([vendi(features_ND[of]) for of in chosen]))
