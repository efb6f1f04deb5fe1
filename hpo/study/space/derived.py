"""Derived parameters: parameters that are converted to a setting, usually relative to another setting.

Owns the conversion in both directions and the limits.  Does not own which of them a study searches; see
``hpo.study.space.space``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpo.study.space.domain import Values
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Derivation:
    """Conversion of a derived parameter to a setting and back.  ``limits`` apply to its range.

    ``forward`` takes the value of the parameter and the settings so far.  ``backward``
    takes a complete configuration.  ``unsets``: settings that would count instead of the one that is set.
    ``own_baseline``: [baseline] of a study file names the parameter, not the setting, which would mean something else
    with other values of ``needs``.
    """

    sets: str
    needs: tuple[str, ...]
    limits: tuple[float, float]
    forward: Callable[[Any, Values], Any]
    backward: Callable[[Values], Any]
    unsets: tuple[str, ...] = ()
    own_baseline: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.limits[0], int)


def _rate(settings: Values) -> float:
    """The U-Net learning rate, which text_encoder_lr_ratio refers to."""
    return settings["learning_rate"] if settings.get("unet_lr") is None else settings["unet_lr"]


def _text_rate(settings: Values) -> float:
    return _rate(settings) if settings["text_encoder_lr"] is None else settings["text_encoder_lr"]


def _text_ratio(settings: Values) -> float:
    if _rate(settings) == 0:
        raise ConfigError(
            "text_encoder_lr_ratio is relative to the U-Net learning rate, which is 0",
            "set a U-Net learning rate above 0, or fix text_encoder_lr: --set text_encoder_lr=5e-5",
        )
    return _text_rate(settings) / _rate(settings)


def _log2(settings: Values) -> float:
    power = math.log2(settings["network_dim"])
    return int(power) if power == int(power) else power


IMAGES_SEEN = "images_seen"


def steps_for(images: int, settings: Values) -> int:
    """Optimizer steps in which so many images are seen: images / (train_batch_size × gradient_accumulation_steps),
    rounded to the nearest whole step (half a step up), and at least one step."""
    return max(1, math.floor(images / _per_step(settings) + 0.5))


def _images_seen(settings: Values) -> int | None:
    """The inverse of ``steps_for``.  None for a length in epochs: how many steps those are depends on the images."""
    steps = settings["max_train_steps"]
    return None if steps is None else steps * _per_step(settings)


def _per_step(settings: Values) -> int:
    return int(settings["train_batch_size"]) * int(settings["gradient_accumulation_steps"])


DERIVED: dict[str, Derivation] = {
    "network_dim_log2": Derivation("network_dim", (), (0, 10), lambda value, _: 2 ** int(value), _log2),
    "text_encoder_lr_ratio": Derivation(
        "text_encoder_lr",
        ("learning_rate", "unet_lr"),
        (0.0, 1000.0),
        lambda value, settings: value * _rate(settings),
        _text_ratio,
    ),
    "network_alpha_ratio": Derivation(
        "network_alpha",
        ("network_dim",),
        (0.0, 4096.0),
        lambda value, settings: value * settings["network_dim"],
        lambda settings: settings["network_alpha"] / settings["network_dim"],
    ),
    # TrainConfig treats lr_warmup_steps below 1 as a ratio of all steps, as sd-scripts does.
    "warmup_ratio": Derivation(
        "lr_warmup_steps",
        (),
        (0.0, 0.99),
        lambda value, _: value,
        lambda settings: settings["lr_warmup_steps"],
    ),
    IMAGES_SEEN: Derivation(
        "max_train_steps",
        ("train_batch_size", "gradient_accumulation_steps"),
        (1, 10_000_000),
        steps_for,
        _images_seen,
        unsets=("max_train_epochs",),
        own_baseline=True,
    ),
}
