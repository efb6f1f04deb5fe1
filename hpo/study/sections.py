"""The sections of a study file that are not settings: what scores a study, its prompts, sampling and limits.

Owns their keys, defaults and checks, and the presets.  Does not own [train], [space] and [baseline]
(``hpo.study.config``), nor what the values do (``evaluation``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.config import suggestion
from trainer.errors import ConfigError


@dataclass(frozen=True)
class ScorePreset:
    """What a subject of this kind is scored by: its style or itself, and how many prompts of each kind."""

    style: bool
    counts: Mapping[str, int]
    confirm_counts: Mapping[str, int]


# A style is not asked for in another style; a thing has no poses, so it is asked for in more places.
PRESETS = {
    "character": ScorePreset(
        False,
        {"train-like": 6, "altered": 6, "style": 3, "class-only": 1},
        {"train-like": 9, "altered": 9, "style": 4, "class-only": 2},
    ),
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
OBJECTIVES = ((SCORE,), (FOLLOWING, LIKENESS))


@dataclass(frozen=True)
class StudySection:
    """[study]: what it is for, and what scores it.  Empty clip and likeness: the base's default.

    ``also``: other models whose figures are reported beside the score.  ``objectives``: the score, or its two
    parts, for a study that looks for a Pareto front.
    """

    title: str = ""
    preset: str = "character"
    clip: str = ""
    likeness: str = ""
    also: tuple[str, ...] = ()
    objectives: tuple[str, ...] = (SCORE,)
    seed: int = 42


@dataclass(frozen=True)
class ScoreSection:
    """[score]: the mean of prompt following and likeness, and their weights (``evaluation.score.score.Formula``)."""

    mean: str = "geometric"
    prompt_following: float = 1.0
    likeness: float = 1.0


@dataclass(frozen=True)
class LimitSection:
    """[limits]: beyond these a trial is infeasible, whatever it scores (``evaluation.score.SafeguardLimits``)."""

    copy_rate: float = 0.05
    diversity: float = 0.6
    prior: float = 1.0


@dataclass(frozen=True)
class PromptSection:
    """[prompts] and [confirmation]: whose templates, how many of each kind, the seeds of each prompt."""

    words: str = "natural"
    counts: Mapping[str, int] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingSection:
    """[sampling]: how scored images are drawn.  Unset size: the training resolution."""

    steps: int = 20
    cfg: float = 7.0
    sampler: str = "dpmpp_2m"
    negative: str = ""
    width_px: int | None = None
    height_px: int | None = None
    batch_size: int | None = None


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str, what: str) -> None:
    names = list(known)
    for key in table:
        if key not in names:
            raise ConfigError(
                f"unknown {what} {key} in {where}", suggestion(key, names) or "known: " + ", ".join(names)
            )


def read_section(kind: Any, body: Mapping[str, Any], name: str) -> Any:
    """A section's dataclass, its values checked for name and type."""
    known = {f.name: f for f in fields(kind)}
    check_keys(body, known, f"[{name}]", "key")
    values: dict[str, Any] = {}
    for key, value in body.items():
        check = _CHECKS.get(f"{name}.{key}") or _CHECKS[key]
        if not check.holds(value):
            raise ConfigError(
                f"{key} = {value!r} in [{name}] is not {check.what}", f"for example {check.example}"
            )
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


@dataclass(frozen=True)
class _Check:
    what: str
    example: str
    holds: Any


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TEXT = _Check("a text", '"…"', lambda v: isinstance(v, str))
_WEIGHT = _Check("a number from 0.01 to 100", "1.0", lambda v: _number(v) and 0.01 <= v <= 100)
_SIZE = _Check("a multiple of 8 from 8 to 4096", "512", lambda v: _whole(v) and 8 <= v <= 4096 and v % 8 == 0)
_CHECKS: dict[str, _Check] = {
    "title": _TEXT,
    "clip": _TEXT,
    "likeness": _TEXT,
    "preset": _Check(
        "one of " + ", ".join(PRESETS), '"style"', lambda v: isinstance(v, str) and v in PRESETS
    ),
    "also": _Check(
        "a list of different texts",
        '["facebook/dinov2-small"]',
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v) and len(set(v)) == len(v),
    ),
    "objectives": _Check(
        "score, or its two parts",
        '["prompt_following", "likeness"]',
        lambda v: isinstance(v, list) and tuple(v) in OBJECTIVES,
    ),
    "score.mean": _Check("geometric or harmonic", '"geometric"', lambda v: v in ("geometric", "harmonic")),
    "score.prompt_following": _WEIGHT,
    "score.likeness": _WEIGHT,
    "copy_rate": _Check("a number from 0 to 1", "0.05", lambda v: _number(v) and 0 <= v <= 1),
    "diversity": _Check("a number from 0 to 1", "0.6", lambda v: _number(v) and 0 <= v <= 1),
    "prior": _Check("a number from 0 to 100", "1.0", lambda v: _number(v) and 0 <= v <= 100),
    "seed": _Check("a whole number from 0", "42", lambda v: _whole(v) and v < 2**63),
    "words": _Check("natural or miniature", '"natural"', lambda v: v in ("natural", "miniature")),
    "counts": _Check(
        "a table of whole numbers",
        "{ train-like = 6, altered = 6, style = 3, class-only = 1 }",
        lambda v: (
            isinstance(v, Mapping)
            and set(v) <= {"train-like", "altered", "style", "class-only"}
            and all(map(_whole, v.values()))
        ),
    ),
    "seeds": _Check(
        "a list of different whole numbers",
        "[0, 1]",
        lambda v: isinstance(v, list) and bool(v) and all(map(_whole, v)) and len(set(v)) == len(v),
    ),
    "steps": _Check("a whole number from 1 to 1000", "20", lambda v: _whole(v) and 1 <= v <= 1000),
    "cfg": _Check(
        "a number from 1 to 100",
        "7.0",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 1 <= v <= 100,
    ),
    "sampler": _TEXT,
    "negative": _TEXT,
    "width_px": _SIZE,
    "height_px": _SIZE,
    "batch_size": _Check("a whole number from 1 to 1024", "8", lambda v: _whole(v) and 1 <= v <= 1024),
}
