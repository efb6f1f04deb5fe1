"""Events of a training run. The log, the progress bar, health checks and the pruner all read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Rehearsed:
    """The dry step before training: the largest bucket (width, height), images at once, and peak memory, of
    this process and of the whole GPU including other programs. None if it cannot be measured."""

    bucket_px: tuple[int, int]
    images: int
    seconds: float
    peak_bytes: int | None
    card_peak_bytes: int | None = None
    card_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step is done. ``step`` counts from 1. ``others`` are further rates under sd-scripts' names:
    those of LoRA+ groups, and d × lr of optimizers that find their rate."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: int
    loss: float
    learning_rate: float
    text_encoder_lr: float
    grad_norm: float
    seconds: float
    others: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Skipped:
    """The loss or gradient of the step was not finite: its data is consumed, the weights are unchanged."""

    step: int
    reason: str


@dataclass(frozen=True)
class Validated:
    """The validation loss after ``epoch`` (``trainer.loop.validation``): comparable between runs on one base."""

    step: int
    epoch: int
    loss: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint from which training can resume after ``step``."""

    path: Path
    step: int


@dataclass(frozen=True)
class Finished:
    """Training is done.  ``steps`` includes the skipped ones."""

    steps: int
    skipped: int


Event = Rehearsed | Step | Skipped | Validated | Saved | Finished
