"""--enqueue FILE: a user's own training file as a trial.

Owns the translation of the file to parameters of the study, and the notes about settings that are ignored.
Does not own reading the file (``trainer.kohya.trainfile``) or enqueueing (``hpo.search.session``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpo.study import ELSEWHERE, IMAGES_SEEN, StudyConfig, settings_of, steps_for
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.kohya import TrainFile, read_train_file
from trainer.text import clean_text

# Together these define two learning rates, one for the U-Net and one for the text encoders.
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only")
BATCH = ("train_batch_size", "gradient_accumulation_steps")


def read_enqueued(path: Path) -> TrainFile:
    """The file of a user. Raises ConfigError or ModelFileError if it cannot be read."""
    return read_train_file(path, needs_base=False, either_is_kohya=True)


def as_proposal(
    path: Path, config: StudyConfig, steps_of: Callable[[TrainConfig], int]
) -> tuple[dict[str, Any], list[str]]:
    """The file as a proposal in the study's space, and notes for the user.

    Settings that the file omits get kohya's defaults.  ``steps_of`` returns the optimizer steps of a run, with its
    batches counted as training makes them; it converts warmup steps to a ratio, and epochs to images seen.  Raises
    ConfigError for values outside the study's ranges.
    """
    file = read_enqueued(path)
    name = clean_text(path.name)
    baseline = config.config(config.baseline)
    decided = {setting for p in config.space for setting in settings_of(p.name)}
    searched = {setting: getattr(file.config, setting) for setting in decided}
    searched |= _rates(file.config, decided, name)
    notes = []
    images = None
    if any(p.name == IMAGES_SEEN for p in config.space):
        own = baseline.with_values({setting: searched[setting] for setting in BATCH if setting in searched})
        images, note = _images_seen(file.config, own, steps_of, name)
        notes.append(note)
        searched["max_train_steps"] = steps_for(images, own.as_dict())
    if searched.get("max_train_epochs", 0) is None:
        searched["max_train_epochs"] = baseline.max_train_epochs
        notes.append(
            f"{name} sets the length in steps, but the study searches epochs: "
            f"max_train_epochs = {baseline.max_train_epochs} is used"
        )
    complete = baseline.as_dict() | searched
    if searched.get("lr_warmup_steps", 0) >= 1:
        length = steps_of(baseline.with_values({**searched, "lr_warmup_steps": 0}))
        complete["lr_warmup_steps"] = searched["lr_warmup_steps"] / length
    proposal = config.space.proposal(complete, config.baseline)
    if images is not None:
        proposal[IMAGES_SEEN] = images  # max_train_steps is a whole number of batches
    if file.config.effective_text_encoder_lr == 0 and "text_encoder_lr" in decided:
        _check_text_encoder_off(proposal, config, name)
    proposal = config.space.check(proposal, f"--enqueue {name}")
    trained = config.config(proposal)
    given = {setting: getattr(file.config, setting) for setting in file.origins}
    translated = decided if images is None else decided | {"max_train_epochs"}
    notes += _left_out(given, trained, translated, name)
    for whose, wanted, found in (
        ("the U-Net learning rate", file.config.effective_unet_lr, trained.effective_unet_lr),
        (
            "the text encoder learning rate",
            file.config.effective_text_encoder_lr,
            trained.effective_text_encoder_lr,
        ),
    ):
        if not math.isclose(wanted, found, rel_tol=1e-9):
            notes.append(f"{name}: {whose} {wanted:g} is ignored; the study uses {found:g}")
    for what, lines in (
        ("translated", file.translated),
        ("not known to sd-scripts", file.unknown),
        ("not supported", file.refused),
    ):
        if lines:
            notes.append(f"{name}, {what}: " + "; ".join(lines))
    return proposal, notes


def _images_seen(
    file: TrainConfig, own: TrainConfig, steps_of: Callable[[TrainConfig], int], name: str
) -> tuple[int, str]:
    """The length of the file in images seen, and how it was worked out.

    Steps are those of the file's own batch.  Epochs are counted with the batch that the study trains with (``own``), so
    that the trial is as many epochs long as the file says.
    """
    if file.max_train_steps is not None:
        images = file.max_train_steps * file.effective_batch_size
        how = f"{file.max_train_steps} steps × {file.effective_batch_size} images"
        return images, f"{name}: {how} = images_seen {images}"
    steps = steps_of(own.with_values({"max_train_steps": None, "max_train_epochs": file.max_train_epochs}))
    images = steps * own.effective_batch_size
    how = f"{file.max_train_epochs} epochs of these images are {steps} steps × {own.effective_batch_size} images"
    return images, f"{name}: {how} = images_seen {images}"


def _rates(file: TrainConfig, decided: set[str], name: str) -> dict[str, Any]:
    """The two learning rates of the file, as settings that the study searches."""
    unet, text = file.effective_unet_lr, file.effective_text_encoder_lr
    rates: dict[str, Any] = {}
    if "unet_lr" in decided:
        rates["unet_lr"] = unet
    elif "learning_rate" in decided:
        rates = {"learning_rate": unet, "unet_lr": None}
    if rates and unet == 0:
        raise ConfigError(
            f"--enqueue {name} does not train the U-Net (learning rate 0), but the study searches its learning rate",
            "set learning_rate or unet_lr above 0 in the file",
        )
    if "text_encoder_lr" in decided:
        rates["text_encoder_lr"] = text
    return rates


def _check_text_encoder_off(proposal: dict[str, Any], config: StudyConfig, name: str) -> None:
    """Raise ConfigError if the file does not train the text encoders and the space does not contain 0."""
    for p in config.space:
        if settings_of(p.name) == ("text_encoder_lr",) and not p.domain.holds(proposal[p.name]):
            raise ConfigError(
                f"--enqueue {name} does not train the text encoder; the study searches {p.name} {p.domain.describe()}",
                f"set text_encoder_lr in the file, or start the range at 0: --set '{p.name}={{low=0.0, high=1.0}}'",
            )


def _left_out(given: Mapping[str, Any], trained: TrainConfig, decided: set[str], name: str) -> list[str]:
    """A line for each setting of the file that is ignored, because the study fixes it."""
    return [
        f"{name}: {setting} = {value} is ignored; the study uses {getattr(trained, setting)}"
        for setting, value in given.items()
        if setting not in (*decided, *ELSEWHERE, *RATES) and value != getattr(trained, setting)
    ]
