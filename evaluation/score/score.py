"""Score: raw cosines, their anchored parts, one composite, and its standard error.

Owns the anchored parts, the score's paired differences, and the one function that samples and scores an
adapter.  Does not own the composite (``evaluation.score.formula``), the evaluator and anchors
(``evaluation.score.evaluator``), sampling (``evaluation.images.sampling``), embedding
(``evaluation.encoders.embed``) or decisions about a study.

    T = mean cos(image, its scored text)          I = mean cos(image, every held-out reference)
    t = (T − T_chance) / (T_base − T_chance)        i = (I − I_base) / (I_real − I_base)
    score = sqrt(clip(t, 0, 1.1) · clip(i, 0, 1.1))

T_base, I_base: the untrained base, same noise, class word instead of the trigger. T_chance: images of the base with
the texts of the other prompts. I_real: every reference with the other references. So the untrained base has t = 1,
i = 0 and score 0, and a high CLIP score alone (which the untrained base has) cannot win. DreamBench++
(arXiv 2406.16855) also uses a product of two alignments; the anchors are specific to this project. Raw cosines are
stored and are scaled only here and in output. A study can weight t and i or use their harmonic mean (``Formula``).

The score is what is shown.  The *objective* is what decides, and what Optuna is told: it equals the score where that
is above 0 and continues below it, so ``score = max(0, objective)``.

Shapes: N images, P prompts, R references, D vector width, K bootstrap draws.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.encoders import Vectors, check_encoder
from evaluation.gauges import Beside
from evaluation.gauges import gauge as beside
from evaluation.images import Beside as GridBeside
from evaluation.images import (
    Heading,
    OnImages,
    SampledImage,
    Unchanged,
    check_valid,
    png_bytes,
    prove_applied,
    sample,
    sample_grid,
)
from evaluation.score.anchors import Anchors
from evaluation.score.evaluator import Evaluator
from evaluation.score.formula import USUAL, Formula, composite, objective
from evaluation.score.safeguards import Parts, Safety
from evaluation.score.statistics import Difference, interval
from evaluation.score.statistics import prompt_draws as prompt_draws
from trainer.errors import ConfigError, DataError, InvalidImages
from trainer.files import write_atomic

METRICS_NAME, GRID_NAME, SAMPLES_NAME = "metrics.json", "grid.png", "samples"


@dataclass(frozen=True)
class ImageScore:
    """Raw cosines of one image: with its scored text, and the mean with the references."""

    prompt_id: str
    seed: int
    clip_t: float
    clip_i: float


@dataclass(frozen=True)
class Score:
    """The score of one set of weights, and what it was measured with.

    ``clip_t`` and ``clip_i`` are mean raw cosines; ``prompt_following`` and ``likeness`` are t and i before
    clipping (no unit: 1 is the prompt following of the base, or the likeness of real images). Likeness excludes
    class-only prompts. ``*se`` are standard errors from a cluster bootstrap over prompts, which keeps the
    images of a prompt together (Efron & Tibshirani 1993, ch. 6). They cover the choice of prompts and seeds but
    not the training seed. ``safety`` and ``beside`` are reported with the score but are not part of it.
    ``objective`` is the score continued below 0 (``evaluation.score.formula``); files of older versions have none,
    and then it is the score.
    """

    value: float
    se: float
    prompt_following: float
    prompt_following_se: float
    likeness: float
    likeness_se: float
    clip_t: float
    clip_i: float
    n_images: int
    scorer: str
    scorer_sha: str
    likeness_encoder: str
    likeness_sha: str
    anchors_key: str
    per_image: tuple[ImageScore, ...]
    formula: Formula = USUAL
    safety: Safety | None = None
    beside: tuple[Beside, ...] = ()
    objective: float = math.nan
    objective_se: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.objective):
            object.__setattr__(self, "objective", self.value)
            object.__setattr__(self, "objective_se", self.se)

    def as_dict(self) -> dict[str, Any]:
        """The content of metrics.json. ``invalid`` is kept for older versions and always 0, because invalid
        images have no score."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            values[name] = value
            if name == "n_images":
                values["invalid"] = 0
        return values


def score(images: Sequence[SampledImage], evaluator: Evaluator) -> Score:
    """The score of finished images (one per prompt and seed). Raises InvalidImages for invalid images."""
    check_valid(images)
    anchors, prompts, formula = evaluator.scale, evaluator.prompts, evaluator.formula
    scorer, likeness = evaluator.scorer, evaluator.likeness
    check_encoder(evaluator.references, likeness)
    anchors.check(evaluator.identity)
    text_of = {p.id: row for row, p in enumerate(prompts.prompts)}
    vectors = Vectors([image.pixels_HW3 for image in images])
    t_NP, i_N = evaluator.cosines(vectors)
    rows = tuple(
        ImageScore(image.prompt_id, image.seed, float(t_NP[n, text_of[image.prompt_id]]), float(i_N[n]))
        for n, image in enumerate(images)
    )
    t_P, i_P = _prompt_means(rows, anchors)
    following, alike = anchored(t_P, i_P, anchors, np.ones((1, len(t_P))))
    following_K, alike_K = anchored(t_P, i_P, anchors, prompt_draws(len(t_P)))
    asks_P = np.array(anchors.asks_for_subject)
    safety = None
    if evaluator.safeguards:
        prior_i = None if asks_P.all() else float(i_P[~asks_P].mean())
        safety = evaluator.safeguards.measure(
            vectors, images, prompts, Parts(float(following[0]), prior_i), anchors
        )
    return Score(
        value=float(composite(following, alike, formula)[0]),
        se=_spread(composite(following_K, alike_K, formula)),
        prompt_following=float(following[0]),
        prompt_following_se=_spread(following_K),
        likeness=float(alike[0]),
        likeness_se=_spread(alike_K),
        clip_t=float(t_P.mean()),
        clip_i=float(i_P[asks_P].mean()),
        n_images=len(images),
        scorer=scorer.name,
        scorer_sha=scorer.sha,
        likeness_encoder=likeness.name,
        likeness_sha=likeness.sha,
        anchors_key=anchors.key,
        per_image=rows,
        formula=formula,
        safety=safety,
        beside=beside.read(evaluator.gauges, vectors, images, prompts),
        objective=float(objective(following, alike, formula)[0]),
        objective_se=_spread(objective(following_K, alike_K, formula)),
    )


def anchored(
    t_P: np.ndarray, i_P: np.ndarray, anchors: Anchors, weights_KP: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """t and i (K) for K weightings of the prompts.

    The anchors are weighted like the images, so that hard and easy prompts cancel. If two anchors cannot be
    told apart, the unit is two standard errors, so that t and i stay bounded.
    """
    base_t_P, chance_t_P, base_i_P = map(np.asarray, (anchors.base_t_P, anchors.chance_t_P, anchors.base_i_P))
    total_K = weights_KP.sum(1)
    t_unit_K = np.maximum(weights_KP @ (base_t_P - chance_t_P) / total_K, max(2 * anchors.t_unit_se, 1e-6))
    following_K = weights_KP @ (t_P - chance_t_P) / total_K / t_unit_K
    asks_KP = weights_KP * np.array(anchors.asks_for_subject)
    asked_K = asks_KP.sum(1)
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # NaN for a draw without a subject prompt; excluded later
        i_unit_K = np.maximum(anchors.real_i - asks_KP @ base_i_P / asked_K, max(2 * anchors.i_unit_se, 1e-6))
        alike_K = asks_KP @ (i_P - base_i_P) / asked_K / i_unit_K
    return following_K, alike_K


def by_draw(one: Score, anchors: Anchors) -> np.ndarray:
    """(K) the objective of each bootstrap draw of the prompts (``evaluation.score.statistics.prompt_draws``)."""
    return _objectives(one, anchors, prompt_draws(len(anchors.prompt_ids)))


def paired_difference(a: Score | Sequence[Score], b: Score | Sequence[Score], anchors: Anchors) -> Difference:
    """Objective of ``a`` minus objective of ``b``, prompt by prompt, with a 95 % interval.

    For scores above 0 this is the difference of the scores. Several scores on a side (training seeds) are averaged.
    The interval covers prompts, not training seeds.
    """
    sides = [[s] if isinstance(s, Score) else list(s) for s in (a, b)]
    formulas = {s.formula for side in sides for s in side}
    if len(formulas) > 1 or any(s.anchors_key != anchors.key for side in sides for s in side):
        raise ConfigError("the scores were measured on different scales", "compare scores of one study only")
    point_K = np.ones((1, len(anchors.prompt_ids)))
    draws_KP = prompt_draws(len(anchors.prompt_ids))
    point, draws_K = (
        np.subtract(*(np.mean([_objectives(s, anchors, w) for s in side], axis=0) for side in sides))
        for w in (point_K, draws_KP)
    )
    return Difference(float(point[0]), *interval(draws_K))


def read_score(path: Path) -> Score:
    """The score in the metrics.json of a trial."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["invalid"]
        rows = tuple(ImageScore(**row) for row in values.pop("per_image"))
        formula = Formula(**values.pop("formula", {}))
        safety = values.pop("safety", None)
        others = [Beside(**{**row, "per_image": tuple(row["per_image"])}) for row in values.pop("beside", ())]
        return Score(
            **values,
            per_image=rows,
            formula=formula,
            safety=Safety(**safety) if safety else None,
            beside=tuple(others),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a score: {error}", "score the trial again") from None


def evaluate_adapter(
    evaluator: Evaluator,
    folder: Path,
    *,
    identity: str = "",
    heading: Heading | None = None,
    on_image: OnImages | None = None,
) -> Score:
    """Sample the base with its injected adapter and score the images; writes folder/samples, grid.png, metrics.json.

    ``identity`` names the weights (base and adapter); with it, an interrupted call resumes where it stopped.
    ``heading`` stands on the grid, with the score or the reason why there is none. metrics.json is written last.
    Raises InvalidImages for invalid images and Unchanged if they equal those of the base. A broken safeguard
    limit raises nothing; see ``Score.safety``.
    """
    evaluator.scale.check(evaluator.identity)
    base, prompts, sampling = evaluator.base, evaluator.prompts, evaluator.sampling
    images = sample(base, prompts, sampling, folder / SAMPLES_NAME, identity=identity, on_image=on_image)
    grid = _Grid(evaluator, images, heading)
    try:
        prove_applied(images, evaluator.scale.untouched)
        result = score(images, evaluator)
    except (InvalidImages, Unchanged) as error:
        grid.write(folder, f"no score: {error.message}", failed=True)
        raise
    grid.write(folder, _verdict(result), failed=bool(result.safety and result.safety.broken))
    write_atomic(folder / METRICS_NAME, json.dumps(result.as_dict(), indent=1))
    return result


@dataclass(frozen=True)
class _Grid:
    """grid.png of some images, once it is known what to say of them."""

    evaluator: Evaluator
    images: Sequence[SampledImage]
    heading: Heading | None

    def write(self, folder: Path, verdict: str, *, failed: bool) -> None:
        beside = GridBeside(self.evaluator.scale.base_images, self.evaluator.reference_pictures)
        grid = sample_grid(self.images, self.evaluator.prompts, self.heading, verdict, beside, failed=failed)
        write_atomic(folder / GRID_NAME, png_bytes(np.asarray(grid)))


def _verdict(result: Score) -> str:
    """The score in words, and the limits that are broken."""
    words = (
        f"score {result.value:.4f} ± {result.se:.4f}: prompt following {result.prompt_following:.2f}, "
        f"likeness {result.likeness:.2f}"
    )
    safety = result.safety
    return "; ".join([words, *map(safety.says, safety.broken)] if safety else [words])


# Small helpers


def _prompt_means(rows: Sequence[ImageScore], anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """(t_P, i_P) raw cosines per prompt, in the order of the anchors."""
    of = {p: [r for r in rows if r.prompt_id == p] for p in anchors.prompt_ids}
    if any(not found for found in of.values()) or len(rows) != sum(map(len, of.values())):
        raise ConfigError(
            "the images were not made from the prompts of the anchors", "score images of the study's prompts"
        )
    t_P = np.array([np.mean([r.clip_t for r in of[p]]) for p in anchors.prompt_ids])
    i_P = np.array([np.mean([r.clip_i for r in of[p]]) for p in anchors.prompt_ids])
    return t_P, i_P


def _values(one: Score, anchors: Anchors, weights_KP: np.ndarray) -> np.ndarray:
    parts = anchored(*_prompt_means(one.per_image, anchors), anchors, weights_KP)
    return composite(*parts, one.formula)


def _objectives(one: Score, anchors: Anchors, weights_KP: np.ndarray) -> np.ndarray:
    parts = anchored(*_prompt_means(one.per_image, anchors), anchors, weights_KP)
    return objective(*parts, one.formula)


def _spread(draws_K: np.ndarray) -> float:
    """Standard deviation over the bootstrap draws that are not NaN."""
    return float(np.nanstd(draws_K, ddof=1)) if np.isfinite(draws_K).sum() > 1 else 0.0
