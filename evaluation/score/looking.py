"""A look at an adapter in the middle of its training: one image of each prompt that asks for the subject.

Owns which images a look has, its figures, and the paired difference of two looks.  Does not own when trials are looked
at or stopped (``hpo.search.looks``).  A look is no score: the weights are not those of a file, and safeguards are not
measured.

Shapes: P prompts of a look, K bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evaluation.encoders import Vectors
from evaluation.images import OnImages, invalid_reason, sample
from evaluation.prompts import PromptSet
from evaluation.score.anchors import Anchors
from evaluation.score.evaluator import Evaluator
from evaluation.score.formula import Formula, objective
from evaluation.score.score import anchored
from evaluation.score.statistics import prompt_draws

INVALID = -1.0  # of images that show nothing: below every objective of a signed study


@dataclass(frozen=True)
class Look:
    """``value``: the objective of these images.  ``t_P``, ``i_P``: raw cosines in the order of the prompts; empty if
    an image shows nothing."""

    value: float
    t_P: tuple[float, ...] = ()
    i_P: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "t": list(self.t_P), "i": list(self.i_P)}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Look:
        """What ``as_dict`` returned."""
        return cls(float(stored["value"]), tuple(map(float, stored["t"])), tuple(map(float, stored["i"])))


def looked_at(prompts: PromptSet) -> PromptSet:
    """The prompts of a look, each with its first seed.  Its images are among those of a score."""
    asked = [p for p in prompts.prompts if p.asks_for_subject]
    if len(asked) < 2:
        asked = list(prompts.prompts)
    return replace(prompts, prompts=tuple(replace(p, seeds=prompts.seeds_of(p)[:1]) for p in asked))


def look(evaluator: Evaluator, on_image: OnImages | None = None) -> Look:
    """Draw and score the images of a look with the adapter in the base as it is."""
    prompts = looked_at(evaluator.prompts)
    images = sample(evaluator.base, prompts, evaluator.sampling, on_image=on_image)
    if any(map(invalid_reason, images)):
        return Look(INVALID)
    t_NP, i_N = evaluator.on(prompts).cosines(Vectors([image.pixels_HW3 for image in images]))
    t_P, i_P = np.diag(t_NP), i_N  # one image of each prompt
    ids = [p.id for p in prompts.prompts]
    value = float(_objectives(t_P, i_P, _part(evaluator.scale, ids), evaluator.formula, _whole(len(ids)))[0])
    return Look(value, tuple(map(float, t_P)), tuple(map(float, i_P)))


def look_difference(a: Look, b: Look, evaluator: Evaluator) -> tuple[float, float]:
    """Objective of ``a`` minus objective of ``b``, prompt by prompt, and its standard error (bootstrap over prompts).

    If one of them shows nothing there are no pairs: the difference of the values, with a standard error of 0.
    """
    if not a.t_P or not b.t_P:
        return a.value - b.value, 0.0
    ids = [p.id for p in looked_at(evaluator.prompts).prompts]
    anchors, formula = _part(evaluator.scale, ids), evaluator.formula
    draws_KP = prompt_draws(len(ids))

    def values(of: Look, weights_KP: np.ndarray) -> np.ndarray:
        return _objectives(np.array(of.t_P), np.array(of.i_P), anchors, formula, weights_KP)

    mean = float((values(a, _whole(len(ids))) - values(b, _whole(len(ids))))[0])
    return mean, float(np.nanstd(values(a, draws_KP) - values(b, draws_KP), ddof=1))


def _whole(prompts: int) -> np.ndarray:
    return np.ones((1, prompts))


def _objectives(
    t_P: np.ndarray, i_P: np.ndarray, anchors: Anchors, formula: Formula, weights_KP: np.ndarray
) -> np.ndarray:
    return objective(*anchored(t_P, i_P, anchors, weights_KP), formula)


def _part(anchors: Anchors, ids: list[str]) -> Anchors:
    """The anchors of some of the prompts."""
    at = [anchors.prompt_ids.index(one) for one in ids]

    def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[n] for n in at)

    return replace(
        anchors,
        prompt_ids=tuple(ids),
        asks_for_subject=of(anchors.asks_for_subject),
        base_t_P=of(anchors.base_t_P),
        chance_t_P=of(anchors.chance_t_P),
        base_i_P=of(anchors.base_i_P),
    )
