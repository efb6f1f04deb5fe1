"""The sections of a study file that are not training settings: search, scoring, prompts, sampling and limits.

Owns their keys and the presets.  Defaults and limits are defined where a value is used: [score] is Formula and
[limits] is SafeguardLimits in ``evaluation.score``; [sampling] follows SampleConfig in ``evaluation.images``.
Does not own [train], [space] and [baseline] (``hpo.study.config``) or the checks of values (``trainer.checks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.images import SampleConfig
from evaluation.prompts import CONFIRM_COUNTS, KINDS, SEARCH_COUNTS, WORDINGS
from trainer.checks import same, setting
from trainer.config import TrainConfig


@dataclass(frozen=True)
class ScorePreset:
    """How a kind of subject is scored: by style or by subject, and the number of prompts of each kind."""

    style: bool
    counts: Mapping[str, int]
    confirm_counts: Mapping[str, int]


# Style has no prompts in other styles.  An object has no poses, so it has more prompts with other places.
PRESETS = {
    "character": ScorePreset(False, SEARCH_COUNTS, CONFIRM_COUNTS),
    "object": ScorePreset(
        False,
        {"train-like": 5, "altered": 8, "style": 2, "class-only": 1},
        {"train-like": 7, "altered": 11, "style": 4, "class-only": 2},
    ),
    "style": ScorePreset(
        True,
        {"train-like": 6, "altered": 9, "class-only": 1},
        {"train-like": 9, "altered": 13, "class-only": 2},
    ),
}
SCORE, FOLLOWING, LIKENESS = "score", "prompt_following", "likeness"
OBJECTIVE = "objective"  # a trial's user attribute: the score continued below 0, as it decides
BELOW_ZERO = "[score] below_zero"  # a fact of studies that are told signed values
OBJECTIVES = ((SCORE,), (FOLLOWING, LIKENESS))


@dataclass(frozen=True)
class StudySection:
    """[study]: title, preset and scoring models.  Empty clip and likeness: the base's default.

    ``also``: other models for extra metrics, reported with the score.  ``objectives``: the score, or its two
    parts to search for a Pareto front.
    """

    title: str = setting("")
    preset: str = setting("character", choices=tuple(PRESETS))
    clip: str = setting("")
    likeness: str = setting("")
    also: tuple[str, ...] = setting((), example='["ViT-L-14-quickgelu:openai"]')
    objectives: tuple[str, ...] = setting(
        (SCORE,), choices=OBJECTIVES, example='["prompt_following", "likeness"]'
    )
    seed: int = same(TrainConfig, "seed")


# tpe: Optuna's default, with a joint model of all parameters; tpe-independent: one model for each parameter
SAMPLERS = ("tpe", "tpe-independent", "gp", "cmaes", "qmc", "random")


# balanced: relative to what length, batch and alpha ask for (hpo.search.balance); plain: kohya's learning_rate itself
RATES = ("balanced", "plain")

# behind: a paired test against the best trial (hpo.search.looks); the others are Optuna's
PRUNERS = ("none", "behind", "median", "halving")


@dataclass(frozen=True)
class SearchSection:
    """[search]: how trials are proposed, and which are stopped early.  It may change while a study runs; each trial
    notes its sampler.

    ``rate``: how the sampler sees the learning rate (``hpo.search.balance``); ``balanced`` for studies that begin
    (``read_study``), as stored for others.
    ``looks``: after which parts of its training a trial is looked at; only with a pruner.
    """

    sampler: str = setting("tpe", choices=SAMPLERS)
    rate: str = setting("plain", choices=RATES)
    pruner: str = setting("none", choices=PRUNERS)
    looks: tuple[float, ...] = setting((0.5,), low=0.05, high=0.95, least=1, example="[0.5]")


@dataclass(frozen=True)
class PromptSection:
    """[prompts] and [confirmation]: the templates, the number of each kind, and the seeds of each prompt."""

    words: str = setting("natural", choices=WORDINGS)
    counts: Mapping[str, int] = setting(
        {}, choices=KINDS, low=0, example="{ train-like = 6, altered = 6, style = 3, class-only = 1 }"
    )
    seeds: tuple[int, ...] = setting((), low=0, least=1, example="[0, 1]")


@dataclass(frozen=True)
class SamplingSection:
    """[sampling]: how scored images are generated.  Default size: the training resolution. Default batch: per GPU."""

    steps: int = same(SampleConfig, "steps")
    cfg: float = same(SampleConfig, "cfg")
    sampler: str = same(SampleConfig, "sampler")
    negative: str = same(SampleConfig, "negative")
    width_px: int | None = same(SampleConfig, "width_px", default=None)
    height_px: int | None = same(SampleConfig, "height_px", default=None)
    batch_size: int | None = same(SampleConfig, "batch_size", default=None)
