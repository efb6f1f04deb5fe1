"""How long a run is: steps and epochs, from images, buckets and batches.  A step is an optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.data.epoch import assign_buckets, epoch_batches


@dataclass(frozen=True)
class Plan:
    """How long a run is.  A step is an optimizer step."""

    steps_per_epoch: int
    total_steps: int
    total_epochs: int


def plan(config: TrainConfig, images: Dataset, buckets: Any = None) -> Plan:
    """Steps and epochs of a run."""
    return length_of(config, batches_per_epoch(config, images, buckets))


def batches_per_epoch(config: TrainConfig, images: Dataset, buckets: Any = None) -> int:
    """Batches of an epoch: each is of one bucket, so the last of a bucket may be smaller."""
    if buckets is None:
        buckets = assign_buckets(images.items, config)
    return len(epoch_batches(images, buckets, config, 0))


def length_of(config: TrainConfig, batches: int) -> Plan:
    """Steps and epochs of a run with so many batches an epoch: ⌈batches / accumulation⌉ steps each, or
    max_train_steps in all.  Accumulation stays within an epoch: its last group may be smaller."""
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    if config.max_train_steps is not None:
        return Plan(per_epoch, config.max_train_steps, math.ceil(config.max_train_steps / per_epoch))
    assert config.max_train_epochs is not None
    return Plan(per_epoch, per_epoch * config.max_train_epochs, config.max_train_epochs)


def total_steps(config: TrainConfig, images: Dataset) -> int:
    """Optimizer steps of a run: ⌈batches per epoch / accumulation⌉ × epochs, or max_train_steps."""
    return plan(config, images).total_steps


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps of warm-up: as given, or a share of all steps if below 1.  constant has none, nor have
    schedules and optimizers with their own."""
    return steps_of(config.lr_warmup_steps, total_steps) if config.warms_up else 0


def steps_of(given: float, total_steps: int) -> int:
    """A number of steps, or a share of all steps if below 1."""
    return int(given * total_steps) if given < 1 else int(given)
