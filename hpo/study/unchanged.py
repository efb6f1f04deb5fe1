"""Compare the facts that a study was started with to the current ones; they must not change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaluation.score import Formula
from hpo.study.folder import another_name
from hpo.study.sections import BELOW_ZERO
from trainer.config import TrainConfig
from trainer.errors import ConfigError

STYLE_OF = "style of "  # before the name of the encoder whose patches judge a style (``StyleEncoder``)
OF_SETTINGS = ("[space]", "[train]")  # facts about settings, not about how they are scored

if TYPE_CHECKING:
    from hpo.study.config import StudyConfig


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for each fact that changed."""
    lines = []
    for name in [*before, *(n for n in now if n not in before)]:
        old, new = before.get(name), now.get(name)
        if not _same(name, old, new):
            lines.append(f"{name}: was {old or 'not set'}, is now {new or 'not set'}")
    return lines


def _same(name: str, old: str | None, new: str | None) -> bool:
    """Whether two facts are equal.  A base is compared by its hash, the last word of the fact, not by its name."""
    if name == "base" and old and new:
        return old.split()[-1] == new.split()[-1]
    return old == new


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Raise ConfigError if the definition changed: scores would not be comparable."""
    known = {key: value for key, value in before.items() if key in now or key.startswith("[")}
    usual = {f"[train] {name}": str(value) for name, value in TrainConfig().as_dict().items()}
    # Facts that an older version did not record cannot be compared.  A newer setting with its default value has no
    # effect.
    now = {
        key: value
        for key, value in now.items()
        if key in before or (key.startswith("[") and usual.get(key) != value)
    }
    changed = difference(known, now)
    if changed:
        other = f"undo the change, or start a new study {another_name()}"
        if all(line.startswith(OF_SETTINGS) for line in changed):
            other += f" --fork-from {name} (it takes over the finished trials that fit)"
        raise ConfigError(
            f"study {name} was started with a different definition: " + "; ".join(changed[:5]), other
        )


def check_forkable(before: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Raise ConfigError if scores of the two studies are not comparable: another base, images, prompts, scorer, seed
    and so on.  The settings and the space may differ; they are compared trial by trial."""

    def compared(facts: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
        # an older version recorded less
        known = {key: value for key, value in facts.items() if key in other or key.startswith("[")}
        return {key: value for key, value in known.items() if not key.startswith(OF_SETTINGS)}

    changed = difference(compared(before, now), compared(now, before))
    if changed:
        raise ConfigError(
            f"the trials of study {name} cannot be taken over, because their scores do not compare: "
            + "; ".join(changed[:5]),
            "undo the change, or leave out --fork-from",
        )


def as_begun(config: StudyConfig, facts: Mapping[str, str] | None) -> StudyConfig:
    """The definition as the study was begun with: its objective, what judges likeness, and no limit that did not
    exist then and that the file does not set.

    ``facts``: those that the study was started with; None for a study that has not begun.
    """
    if facts is None:
        return config
    known = {*json.loads(facts.get("limits", "{}")), *config.sections.get("limits", {})}
    config = _told_as_begun(_judged_as_begun(config, facts), facts)
    return dataclasses.replace(config, limits=config.limits.without_newer(known))


def _judged_as_begun(config: StudyConfig, facts: Mapping[str, str]) -> StudyConfig:
    """A study that was begun when the scorer judged likeness by default goes on with it."""
    scorer, likeness = (facts.get(name, "").rpartition(" ")[0] for name in ("scorer", "likeness"))
    if config.study.likeness or not scorer or likeness.removeprefix(STYLE_OF) != scorer:
        return config
    sections = {**config.sections, "study": {**config.sections.get("study", {}), "likeness": "clip"}}
    return dataclasses.replace(
        config, study=dataclasses.replace(config.study, likeness="clip"), sections=sections
    )


def _told_as_begun(config: StudyConfig, facts: Mapping[str, str]) -> StudyConfig:
    """The definition with the objective that a study was begun with.

    Studies of versions that told only clipped values have no fact about it, and go on with clipped values.
    """
    if not facts or BELOW_ZERO in facts or not config.score.signed:
        return config
    sections = dict(config.sections)
    sections["score"] = {k: v for k, v in sections.get("score", {}).items() if k != "below_zero"}
    return dataclasses.replace(
        config, score=dataclasses.replace(config.score, below_zero=Formula.below_zero), sections=sections
    )
