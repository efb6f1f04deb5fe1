"""A user's own kohya configuration as a trial: --enqueue FILE.toml.

Owns the proposal that means the file, and the lines on what of the file does not apply in this study.  Reading the
file is ``trainer.kohya``'s; queueing is ``hpo.session``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.space import settings_of
from hpo.study import ELSEWHERE, StudyConfig
from trainer.config import TrainConfig
from trainer.files import clean_text
from trainer.kohya import read_kohya


def as_proposal(
    path: Path, config: StudyConfig, steps_of: Callable[[TrainConfig], int]
) -> tuple[dict[str, Any], list[str]]:
    """The file as a proposal of the study's space, and what to tell the user.

    What the file leaves out takes kohya's defaults.  ``steps_of`` tells the optimizer steps of a run: warm-up in
    steps becomes a share of them.  Raises ConfigError for values outside the study's ranges.
    """
    file = read_kohya(path)
    name = clean_text(path.name)
    baseline = config.config(config.baseline)
    decided = {setting for p in config.space for setting in settings_of(p.name)}
    searched = {setting: getattr(file.config, setting) for setting in decided}
    notes = []
    if searched.get("max_train_epochs", 0) is None:
        searched["max_train_epochs"] = baseline.max_train_epochs
        notes.append(
            f"{name} counts steps, the study searches epochs: it is tried with {baseline.max_train_epochs}"
        )
    complete = baseline.as_dict() | searched
    if searched.get("lr_warmup_steps", 0) >= 1:
        length = steps_of(baseline.with_values({**searched, "lr_warmup_steps": 0}))
        complete["lr_warmup_steps"] = searched["lr_warmup_steps"] / length
    proposal = config.space.check(config.space.proposal(complete, config.baseline), f"--enqueue {name}")
    fixed = {
        setting: value
        for setting, value in file.given.items()
        if setting not in decided and setting not in ELSEWHERE and value != getattr(config.train, setting)
    }
    notes += [
        f"{name}: {s} = {v} stays {getattr(config.train, s)}, it is not searched" for s, v in fixed.items()
    ]
    for what, lines in (("translated", file.translated), ("not built in", file.refused)):
        if lines:
            notes.append(f"{name}, {what}: " + "; ".join(lines))
    return proposal, notes
