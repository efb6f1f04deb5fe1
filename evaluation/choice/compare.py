"""Compare: two LoRAs, perhaps on two bases, on the same prompts – and what of the difference is whose.

Owns the differences and their intervals (pure).  Does not draw or score (``evaluation.score.score``).

Two bases cannot share noise (64² and 128² latents), so pictures are paired by prompt alone: each prompt's
mean over its seeds.  A raw cosine of one base says little beside another's, since a base follows and draws in
its own way; so each side is anchored on its own untrained base, and the raw difference is taken apart:

    LoRA B − LoRA A  =  (base B − base A)  +  ((LoRA B − base B) − (LoRA A − base A))
                            base effect              adapter effect

Shapes: P prompts, K bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evaluation.gauges import Beside
from evaluation.score import Anchors, Difference, Score, anchored, composite, prompt_draws
from trainer.errors import ConfigError

COSINES = ("prompt following", "likeness")
ANCHORED = ("prompt following", "likeness", "score")
ROWS = ("base effect", "LoRA A − its base", "LoRA B − its base", "adapter effect", "LoRA B − LoRA A")


@dataclass(frozen=True)
class ComparedSide:
    """One LoRA's score on a prompt set, and its base's anchors on the same."""

    score: Score
    anchors: Anchors


@dataclass(frozen=True)
class Comparison:
    """``anchored``: figure → B minus A, each on the scale of its own base.  ``cosines``: row → figure →
    difference of raw cosines, in ROWS; base effect and adapter effect add up to the last row.  ``beside``:
    other models' raw figures, "measure model" → B minus A."""

    anchored: Mapping[str, Difference]
    cosines: Mapping[str, Mapping[str, Difference]]
    beside: Mapping[str, Difference]


def compare(a: ComparedSide, b: ComparedSide) -> Comparison:
    """B minus A with 95 % intervals from a bootstrap over prompts, the same draws on both sides."""
    _check_same(a, b)
    prompts = a.anchors.prompt_ids
    weights_KP = np.concatenate([np.ones((1, len(prompts))), prompt_draws(len(prompts))])
    parts = [_anchored(side, prompts, weights_KP) for side in (a, b)]
    own = {name: _difference(parts[1][name] - parts[0][name]) for name in ANCHORED}
    raw = {name: _raw(a, b, prompts, name, weights_KP) for name in COSINES}
    cosines = {row: {name: raw[name][row] for name in COSINES} for row in ROWS}
    return Comparison(own, cosines, _beside(a, b, prompts, weights_KP))


def _check_same(a: ComparedSide, b: ComparedSide) -> None:
    for what in ("prompts", "scorer", "likeness", "references"):
        if a.anchors.identity[what] != b.anchors.identity[what]:
            raise ConfigError(f"the two sides were measured with other {what}", "compare them on the same")
    if a.score.formula != b.score.formula:
        raise ConfigError("the two scores are of different formulas", "compare them on the same")
    for side in (a, b):
        if side.score.anchors_key != side.anchors.key:
            raise ConfigError("a score and its anchors are of different scales", "score it again")


def _means(side: ComparedSide, prompts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(t_P, i_P): raw cosines of each prompt, its seeds together."""
    rows = side.score.per_image
    return tuple(  # type: ignore[return-value]
        np.array([np.mean([getattr(r, name) for r in rows if r.prompt_id == p]) for p in prompts])
        for name in ("clip_t", "clip_i")
    )


def _anchored(side: ComparedSide, prompts: tuple[str, ...], weights_KP: np.ndarray) -> dict[str, np.ndarray]:
    t_P, i_P = _means(side, prompts)
    order = [side.anchors.prompt_ids.index(p) for p in prompts]
    assert order == sorted(order), "prompts of both sides are in one order"
    following_K, alike_K = anchored(t_P, i_P, side.anchors, weights_KP)
    return {
        "prompt following": following_K,
        "likeness": alike_K,
        "score": composite(following_K, alike_K, side.score.formula),
    }


def _raw(
    a: ComparedSide, b: ComparedSide, prompts: tuple[str, ...], name: str, weights_KP: np.ndarray
) -> dict[str, Difference]:
    """The raw difference taken apart.  Likeness leaves class-only prompts out."""
    number = COSINES.index(name)
    lora_P = [_means(side, prompts)[number] for side in (a, b)]
    base_P = [np.array((side.anchors.base_t_P, side.anchors.base_i_P)[number]) for side in (a, b)]
    used_KP = weights_KP * np.array(a.anchors.asks_for_subject) if name == "likeness" else weights_KP

    adapter_P = [lora - base for lora, base in zip(lora_P, base_P, strict=True)]
    values = (
        base_P[1] - base_P[0],
        adapter_P[0],
        adapter_P[1],
        adapter_P[1] - adapter_P[0],
        lora_P[1] - lora_P[0],
    )
    return {row: _over_prompts(value, used_KP) for row, value in zip(ROWS, values, strict=True)}


def _beside(
    a: ComparedSide, b: ComparedSide, prompts: tuple[str, ...], weights_KP: np.ndarray
) -> dict[str, Difference]:
    """Other models' figures that both sides have.  A prompt that a figure does not ask is left out of it."""
    found = {}
    theirs = {(f.measure, f.model, f.sha): f for f in b.score.beside}
    for own in a.score.beside:
        if other := theirs.get((own.measure, own.model, own.sha)):
            gain_P = _prompt_means(b.score, other, prompts) - _prompt_means(a.score, own, prompts)
            known_P = ~np.isnan(gain_P)
            found[f"{own.measure} {own.model}"] = _over_prompts(np.nan_to_num(gain_P), weights_KP * known_P)
    return found


def _prompt_means(score: Score, figure: Beside, prompts: tuple[str, ...]) -> np.ndarray:
    """(P) a figure's mean over a prompt's pictures; NaN where it asks none of them."""
    values: dict[str, list[float]] = {p: [] for p in prompts}
    for row, value in zip(score.per_image, figure.per_image, strict=True):
        if value is not None:
            values[row.prompt_id].append(value)
    return np.array([np.mean(found) if found else np.nan for found in values.values()])


def _over_prompts(values_P: np.ndarray, weights_KP: np.ndarray) -> Difference:
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without a prompt that counts: NaN
        return _difference(weights_KP @ values_P / weights_KP.sum(1))


def _difference(values_K: np.ndarray) -> Difference:
    """The first value is the point, the rest are draws."""
    low, high = np.nanpercentile(values_K[1:], [2.5, 97.5])
    return Difference(float(values_K[0]), float(low), float(high))


def told_apart(difference: Difference) -> bool:
    """Whether the interval leaves 0 out."""
    return not difference.low <= 0 <= difference.high
