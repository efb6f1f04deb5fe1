"""A user's own kohya configuration as a trial: --enqueue FILE.toml.

Owns the proposal that means the file, and the lines on what of the file does not apply in this study. Reading
the file is ``trainer.kohya.read``'s; queueing is ``hpo.search.session``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpo.study import ELSEWHERE, StudyConfig, settings_of
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.kohya import read_kohya
from trainer.text import clean_text

# What a file means by these together are two rates, the U-Net's and the text encoders'.
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only")


def as_proposal(
    path: Path, config: StudyConfig, steps_of: Callable[[TrainConfig], int]
) -> tuple[dict[str, Any], list[str]]:
    """The file as a proposal of the study's space, and what to tell the user.

    What the file leaves out takes kohya's defaults.  ``steps_of`` tells the optimizer steps of a run: warm-up
    in steps becomes a share of them.  Raises ConfigError for values outside the study's ranges.
    """
    file = read_kohya(path)
    name = clean_text(path.name)
    baseline = config.config(config.baseline)
    decided = {setting for p in config.space for setting in settings_of(p.name)}
    searched = {setting: getattr(file.config, setting) for setting in decided}
    searched |= _rates(file.config, decided, name)
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
    proposal = config.space.proposal(complete, config.baseline)
    if file.config.effective_text_encoder_lr == 0 and "text_encoder_lr" in decided:
        _check_text_encoder_off(proposal, config, name)
    proposal = config.space.check(proposal, f"--enqueue {name}")
    trained = config.config(proposal)
    notes += _left_out(file.given, trained, decided, name)
    for whose, wanted, found in (
        ("the U-Net's rate", file.config.effective_unet_lr, trained.effective_unet_lr),
        (
            "the text encoders' rate",
            file.config.effective_text_encoder_lr,
            trained.effective_text_encoder_lr,
        ),
    ):
        if not math.isclose(wanted, found, rel_tol=1e-9):
            notes.append(f"{name}: {whose} is {wanted:g} there and {found:g} here, it is not searched")
    for what, lines in (("translated", file.translated), ("not built in", file.refused)):
        if lines:
            notes.append(f"{name}, {what}: " + "; ".join(lines))
    return proposal, notes


def _rates(file: TrainConfig, decided: set[str], name: str) -> dict[str, Any]:
    """The two rates that the file trains at, in the settings that the study searches."""
    unet, text = file.effective_unet_lr, file.effective_text_encoder_lr
    rates: dict[str, Any] = {}
    if "unet_lr" in decided:
        rates["unet_lr"] = unet
    elif "learning_rate" in decided:
        rates = {"learning_rate": unet, "unet_lr": None}
    if rates and unet == 0:
        raise ConfigError(
            f"--enqueue {name} trains no U-Net: its rate is 0, and the study searches that rate",
            "give it learning_rate or unet_lr above 0",
        )
    if "text_encoder_lr" in decided:
        rates["text_encoder_lr"] = text
    return rates


def _check_text_encoder_off(proposal: dict[str, Any], config: StudyConfig, name: str) -> None:
    """A file without a text encoder fits only a space that holds 0."""
    for p in config.space:
        if settings_of(p.name) == ("text_encoder_lr",) and not p.domain.holds(proposal[p.name]):
            raise ConfigError(
                f"--enqueue {name} trains no text encoder; the study searches {p.name} {p.domain.describe()}",
                f"give it a text_encoder_lr, or start the range at 0: --set '{p.name}={{low=0.0, high=1.0}}'",
            )


def _left_out(given: Mapping[str, Any], trained: TrainConfig, decided: set[str], name: str) -> list[str]:
    """A line for each setting of the file that the trial does not have: the study fixes it."""
    return [
        f"{name}: {setting} = {value} stays {getattr(trained, setting)}, it is not searched"
        for setting, value in given.items()
        if setting not in (*decided, *ELSEWHERE, *RATES) and value != getattr(trained, setting)
    ]
