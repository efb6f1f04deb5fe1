"""Values of a transfer: input figures, moves, findings and derived figures, and their arithmetic.

Owns the inputs and outputs of the rules (see ``hpo.transfer.rules``) and the figures derived
from two configurations.  Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hpo.transfer.profile import Profile
from trainer.config import TrainConfig
from trainer.data import Plan, length_of

GRID = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # at most a quarter below the exact value
REFERENCE_ALPHA = 16.0  # for normalised rates
CHECKPOINTING_COST = 1.25  # factor on the time of a step; assumed, see docs/settings.md
PLANNER = "planner"  # rule name of moves made by the memory planner
BYTES = {"float": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class DatasetFigures:
    """Figures of the training images that the rules need.

    ``samples``: images × repeats of one epoch.  ``small_share``: share of images whose shorter side is below
    the family's ``small_image_px``.  ``seconds_per_sample``: measured time on the source base, if known.
    ``batches``: batches an epoch with given settings, as training makes them; None: as if all images were in one
    bucket.
    """

    images: int
    samples: int
    small_share: float = 0.0
    seconds_per_sample: float | None = None
    batches: Callable[[TrainConfig], int] | None = field(default=None, compare=False, repr=False)

    def length(self, config: TrainConfig) -> Plan:
        """Optimizer steps and epochs of a run."""
        if self.batches is not None:
            return length_of(config, self.batches(config))
        return _in_one_bucket(config, self.samples)


@dataclass(frozen=True)
class SettingMove:
    """One change of one setting."""

    key: str
    old: Any
    new: Any
    rule: str
    reason: str
    evidence: str = ""


@dataclass(frozen=True)
class TransferFinding:
    """A remark on the plan.  ``level``: note, warn or refuse.  ``about``: a setting or ``vram``."""

    level: str
    about: str
    text: str


@dataclass(frozen=True)
class Derived:
    """Figures derived from source and result.  Pairs are (source, result).

    ``integrated_rate``: rate × updates of the result divided by that of the source.  None means unknown.
    """

    effective_batch: tuple[int, int]
    updates: tuple[int, int]
    integrated_rate: float | None
    normalised_rate: float
    file_bytes: int | None
    seconds: float | None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class TransferPlan:
    """The result: settings, all changes, findings and derived figures."""

    source: TrainConfig
    figures: DatasetFigures
    config: TrainConfig
    moves: tuple[SettingMove, ...]
    findings: tuple[TransferFinding, ...]
    derived: Derived

    def of_level(self, level: str) -> tuple[TransferFinding, ...]:
        return tuple(f for f in self.findings if f.level == level)


def snap_down(value: float) -> float:
    """The largest of {1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8} × 10ⁿ that does not exceed ``value``."""
    if value <= 0:
        return value
    power = math.floor(math.log10(value))
    for exponent in (power + 1, power, power - 1):
        for step in reversed(GRID):
            candidate = float(f"{step:g}e{exponent}")
            if candidate <= value * (1 + 1e-9):
                return candidate
    raise AssertionError(value)


def two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def updates_of(config: TrainConfig, samples: int) -> int:
    """Optimizer steps, as if all images were in one bucket.  More buckets can add a few."""
    return _in_one_bucket(config, samples).total_steps


def _in_one_bucket(config: TrainConfig, samples: int) -> Plan:
    return length_of(config, math.ceil(samples / config.train_batch_size))


def normalised(rate: float, alpha: float) -> float:
    """learning_rate × √(alpha / 16), which makes rates at different alphas comparable."""
    return rate * math.sqrt(alpha / REFERENCE_ALPHA)


def derive(config: TrainConfig, result: TrainConfig, figures: DatasetFigures, profile: Profile) -> Derived:
    """The figures derived from a mapping, or from any two configurations."""
    updates = figures.length(config).total_steps, figures.length(result).total_steps
    batches = config.effective_batch_size, result.effective_batch_size
    before, now = config.effective_unet_lr, result.effective_unet_lr
    seconds = None
    if figures.seconds_per_sample is not None:
        slower = CHECKPOINTING_COST if result.gradient_checkpointing > config.gradient_checkpointing else 1.0
        seen = updates[1] * batches[1]
        seconds = seen * figures.seconds_per_sample * profile.family.cost_of_a_sample * slower
    return Derived(
        effective_batch=(batches[0], batches[1]),
        updates=updates,
        integrated_rate=now * updates[1] / (before * updates[0]) if before > 0 else None,
        normalised_rate=normalised(now, result.network_alpha),
        file_bytes=_file_bytes(result, profile),
        seconds=seconds,
    )


def _file_bytes(config: TrainConfig, profile: Profile) -> int | None:
    ranks = profile.family.values_per_rank
    if config.network_type != "LoRA" or config.conv_dim is not None or "unet" not in ranks:
        return None
    values = ranks["unet"] if config.trains_unet else 0
    values += ranks.get("text_encoders", 0) if config.trains_text_encoder else 0
    return values * config.network_dim * BYTES[config.save_precision]
