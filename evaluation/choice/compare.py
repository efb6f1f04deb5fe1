"""Compare: two LoRAs on the same prompts, and how much of the difference comes from their bases.

Owns the differences and their intervals (pure).  Does not own sampling and scoring; see ``evaluation.score.score``.

Two bases cannot share noise (64² and 128² latents), so images are paired by prompt only: the mean of each prompt
over its seeds. Raw cosines of two bases are not comparable, because each base follows prompts and draws in its
own way. So each side is anchored on its own untrained base, and the raw difference is split into two parts:

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
    """The score of one LoRA on a prompt set, and the anchors of its base on the same prompts."""

    score: Score
    anchors: Anchors


@dataclass(frozen=True)
class Comparison:
    """``anchored``: metric → B minus A, each on the scale of its own base. ``cosines``: row of ROWS → metric
    → difference of raw cosines; base effect and adapter effect add up to the last row. ``beside``: raw values
    of other models, "measure model" → B minus A."""

    anchored: Mapping[str, Difference]
    cosines: Mapping[str, Mapping[str, Difference]]
    beside: Mapping[str, Difference]


def compare(a: ComparedSide, b: ComparedSide) -> Comparison:
    """B minus A, with 95 % intervals from a bootstrap over prompts that uses the same draws on both sides."""
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
            raise ConfigError(
                f"the two sides were measured with different {what}", f"score both with the same {what}"
            )
    if a.score.formula.words() != b.score.formula.words():
        raise ConfigError("the two scores use different formulas", "score both with the same formula")
    for side in (a, b):
        if side.score.anchors_key != side.anchors.key:
            raise ConfigError("a score does not belong to its anchors", "score the LoRA again")


def _means(side: ComparedSide, prompts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(t_P, i_P): raw cosines per prompt, averaged over its seeds."""
    rows = side.score.per_image
    return tuple(  # type: ignore[return-value]
        np.array([np.mean([getattr(r, name) for r in rows if r.prompt_id == p]) for p in prompts])
        for name in ("clip_t", "clip_i")
    )


def _anchored(side: ComparedSide, prompts: tuple[str, ...], weights_KP: np.ndarray) -> dict[str, np.ndarray]:
    t_P, i_P = _means(side, prompts)
    order = [side.anchors.prompt_ids.index(p) for p in prompts]
    assert order == sorted(order), "both sides must have their prompts in the same order"
    following_K, alike_K = anchored(t_P, i_P, side.anchors, weights_KP)
    return {
        "prompt following": following_K,
        "likeness": alike_K,
        "score": composite(following_K, alike_K, side.score.formula),
    }


def _raw(
    a: ComparedSide, b: ComparedSide, prompts: tuple[str, ...], name: str, weights_KP: np.ndarray
) -> dict[str, Difference]:
    """The raw difference, split into its parts. Likeness excludes class-only prompts."""
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
    """The values of other models that both sides have. Prompts that a gauge does not measure are excluded."""
    found = {}
    theirs = {(f.measure, f.model, f.sha): f for f in b.score.beside}
    for own in a.score.beside:
        if other := theirs.get((own.measure, own.model, own.sha)):
            gain_P = _prompt_means(b.score, other, prompts) - _prompt_means(a.score, own, prompts)
            known_P = ~np.isnan(gain_P)
            found[f"{own.measure} {own.model}"] = _over_prompts(np.nan_to_num(gain_P), weights_KP * known_P)
    return found


def _prompt_means(score: Score, figure: Beside, prompts: tuple[str, ...]) -> np.ndarray:
    """(P) the mean over the images of each prompt; NaN if none of them was measured."""
    values: dict[str, list[float]] = {p: [] for p in prompts}
    for row, value in zip(score.per_image, figure.per_image, strict=True):
        if value is not None:
            values[row.prompt_id].append(value)
    return np.array([np.mean(found) if found else np.nan for found in values.values()])


def _over_prompts(values_P: np.ndarray, weights_KP: np.ndarray) -> Difference:
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for a draw in which no prompt counts
        return _difference(weights_KP @ values_P / weights_KP.sum(1))


def _difference(values_K: np.ndarray) -> Difference:
    """The first value is the estimate, the others are bootstrap draws."""
    low, high = np.nanpercentile(values_K[1:], [2.5, 97.5])
    return Difference(float(values_K[0]), float(low), float(high))


def told_apart(difference: Difference) -> bool:
    """Whether the interval excludes 0."""
    return not difference.low <= 0 <= difference.high
