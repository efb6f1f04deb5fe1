"""Anchors: what 0 and 1 of a score mean, measured once on the untrained base and stored with their hashes.

Owns the references' vectors, the anchors' measurement, their file, and the guard against anchors that cannot
be told apart.  Does not score adapters (``evaluation.score.score``, which has the formula).

    T_base, I_base   the untrained base, same noise, the class word instead of the trigger
    T_chance         the base's pictures against the other prompts' texts
    I_real           every held-out reference against the other references

Shapes: N pictures, P prompts, R references, D vector width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.encoders import ImageEncoder, References, Scorer, Vectors, check_encoder
from evaluation.images import OnImages, SampleConfig, SampledImage, invalid_reason, sample
from evaluation.prompts import PromptSet
from evaluation.score.safeguards import diversity, scene_encoders
from trainer.bases import Base
from trainer.errors import ConfigError, DataError, ModelFileError
from trainer.files import write_atomic

ANCHORS_NAME = "anchors.json"


@dataclass(frozen=True)
class Anchors:
    """What 0 and 1 mean for one base, prompt set, way of sampling, scorer, likeness encoder, reference set.

    ``*_P`` follow the order of ``prompt_ids``: raw cosines.  ``base_i_P`` of class-only prompts is the
    prior's anchor, not likeness's; ``base_diversity`` is the base's mean Vendi
    (``evaluation.score.safeguards``). ``untouched``: first pictures of the untrained base with the trigger;
    an adapter's must differ from these.
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

    @property
    def key(self) -> str:
        """sha256 of the identity: scores are comparable within one key only."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def t_unit(self) -> float:
        """T_base − T_chance as a cosine: what one unit of prompt following is."""
        return float(np.mean(self.base_t_P) - np.mean(self.chance_t_P))

    @property
    def i_unit(self) -> float:
        """I_real − I_base as a cosine: what one unit of likeness is."""
        return float(self.real_i - np.array(self.base_i_P)[np.array(self.asks_for_subject)].mean())

    @property
    def base_prior_i(self) -> float | None:
        """Mean raw likeness of the base's class-only pictures; None without such a prompt."""
        only = np.array(self.base_i_P)[~np.array(self.asks_for_subject)]
        return float(only.mean()) if len(only) else None

    @property
    def problems(self) -> tuple[str, ...]:
        """Lines to show where two anchors are nearer than 2 standard errors; empty if the scale is sound."""
        found = []
        if self.t_unit < 2 * self.t_unit_se or self.t_unit <= 0:
            found.append(
                f"the scorer cannot tell the base's images of one prompt from another's: {self.t_unit:.4f} ± "
                f"{self.t_unit_se:.4f}; use more and more different prompts"
            )
        if self.i_unit < 2 * self.i_unit_se or self.i_unit <= 0:
            found.append(
                f"the references are hardly more alike than the base's images are to them: {self.i_unit:.4f} "
                f"± {self.i_unit_se:.4f}; use more references, another likeness encoder, or more sampling steps"
            )
        return tuple(found)

    def check(self, **identity: str) -> None:
        """Raise ConfigError unless the anchors were measured with these."""
        for what, value in identity.items():
            if self.identity[what] != value:
                raise ConfigError(
                    f"the anchors were measured with another {what}", "measure them again in a new study"
                )

    def require_separable(self) -> None:
        """Raise DataError with figures if a score on this scale would mean nothing."""
        if self.problems:
            problem, hint = self.problems[0].split("; ", 1)
            raise DataError(f"a score would mean nothing here: {problem}", hint)


def anchors_identity(
    base: Base,
    prompts: PromptSet,
    config: SampleConfig,
    references: References,
    scorer: Scorer,
    likeness: ImageEncoder,
) -> dict[str, str]:
    """What anchors are measured with, and belong to."""
    return {
        "base": base.identity,
        "prompts": prompts.hash,
        "sampling": config.hash,
        "scorer": scorer.sha,
        "likeness": likeness.sha,
        "references": references.hash,
    }


def make_anchors(
    base: Base,
    prompts: PromptSet,
    config: SampleConfig,
    references: References,
    scorer: Scorer,
    likeness: ImageEncoder,
    folder: Path,
    *,
    on_image: OnImages | None = None,
) -> Anchors:
    """A study's anchors: from ``folder`` if they are there, else measured on the untrained base and stored.

    Call it before an adapter is injected.  Anchors in the folder that were measured with anything else are
    refused: scores before and after could not be compared.
    """
    injected = [name for name, network in base.components().items() if hasattr(network, "peft_config")]
    assert not injected, f"anchors are the untrained base's; {injected} hold an adapter"
    check_encoder(references, likeness)
    identity = anchors_identity(base, prompts, config, references, scorer, likeness)
    stored = _read_anchors(folder / ANCHORS_NAME, identity)
    untouched = tuple(
        sample(base, prompts, config, folder / "untouched", identity=base.identity, only_first_chunk=True)
    )
    if stored:
        return Anchors(**stored, untouched=untouched)
    images = sample(
        base, prompts, config, folder / "samples", identity=base.identity, as_class=True, on_image=on_image
    )
    bad = [reason for reason in map(invalid_reason, images) if reason]
    if bad:
        raise ModelFileError(
            f"the untrained base itself draws {len(bad)} of {len(images)} images as nothing ({bad[0]})",
            'try --set no_half_vae=true or mixed_precision = "no"; else the base\'s file is damaged',
        )
    anchors = measure_anchors(identity, images, prompts, references, scorer, likeness, untouched)
    values = {f.name: getattr(anchors, f.name) for f in fields(anchors) if f.name != "untouched"}
    write_atomic(folder / ANCHORS_NAME, json.dumps(values, indent=1))
    return anchors


def measure_anchors(
    identity: dict[str, str],
    images: Sequence[SampledImage],
    prompts: PromptSet,
    references: References,
    scorer: Scorer,
    likeness: ImageEncoder,
    untouched: Sequence[SampledImage] = (),
) -> Anchors:
    """Anchors from the untrained base's pictures of the scored texts."""
    vectors = Vectors([image.pixels_HW3 for image in images])
    t_NP, i_N = raw_cosines(vectors, prompts, references, scorer, likeness)
    t_PP, own_i_P = _by_prompt(t_NP, images, prompts), _by_prompt(i_N, images, prompts)
    texts = [p.scored_text for p in prompts.prompts]
    other_PP = np.array([[a != b for b in texts] for a in texts])
    if not other_PP.any(axis=1).all():
        raise ConfigError(
            "all prompts are the same once the trigger is replaced", "give prompts that differ in content"
        )
    base_t_P, chance_t_P = np.diag(t_PP), (t_PP * other_PP).sum(1) / other_PP.sum(1)
    asks_P = np.array([p.asks_for_subject for p in prompts.prompts])
    real_i, real_i_se = _leave_one_out(references.features_RD)
    base_i_se = _mean_se(own_i_P[asks_P])
    return Anchors(
        identity=identity,
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
        base_diversity=diversity(vectors.joint(scene_encoders(scorer, likeness)), images, prompts),
    )


def _read_anchors(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """Stored values of this identity; None if there is no whole file; ConfigError if of another identity."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored = values["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    changed = sorted(k for k in identity if stored.get(k) != identity[k])
    if changed:
        raise ConfigError(
            f"{path} was measured with another {', '.join(changed)}: scores would not be comparable",
            "start a new study with --name, or go back to what it began with",
        )
    tuples = {f.name for f in fields(Anchors) if str(f.type).startswith("tuple")} - {"untouched"}
    return {k: tuple(v) if k in tuples else v for k, v in values.items()}


def raw_cosines(
    vectors: Vectors, prompts: PromptSet, references: References, scorer: Scorer, likeness: ImageEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Every picture with every scored text (N, P), and with the references on average (N)."""
    texts_PD = scorer.text_features([p.scored_text for p in prompts.prompts])
    alike_NR = _cosines(vectors.of(likeness), references.features_RD)
    return _cosines(vectors.of(scorer), texts_PD), alike_NR.mean(1)


def _cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Cosines of unit vectors, in float64."""
    return (a.double() @ b.double().T).numpy()


def _by_prompt(values_N: np.ndarray, images: Sequence[SampledImage], prompts: PromptSet) -> np.ndarray:
    """Means over the pictures of each prompt, in the prompts' order."""
    ids = np.array([image.prompt_id for image in images])
    return np.stack([values_N[ids == p.id].mean(axis=0) for p in prompts.prompts])


def _mean_se(values: np.ndarray) -> float:
    """Standard error of a mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _leave_one_out(features_RD: Tensor) -> tuple[float, float]:
    """Mean cosine between different references, and its jackknife standard error over references."""
    cosines_RR = _cosines(features_RD, features_RD)
    count = len(cosines_RR)
    total = cosines_RR.sum() - np.trace(cosines_RR)
    mean = float(total / (count * (count - 1)))
    if count == 2:  # one pair: no spread to see
        return mean, 0.0
    without_R = total - 2 * (cosines_RR.sum(1) - np.diag(cosines_RR))
    means_R = without_R / ((count - 1) * (count - 2))
    return mean, float(np.sqrt((count - 1) * np.mean((means_R - means_R.mean()) ** 2)))
