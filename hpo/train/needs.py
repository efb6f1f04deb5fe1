"""How much disk a run of ``hpo train`` still needs: its files, by the settings that decide when they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.health import Needs
from hpo.train.plan import Steps
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.bases import Base

STATE_COPIES = 3  # weights and the two moments of Adam, in fp32
FP32_BYTES = 4
SAMPLE_BYTES = 2.0  # a pixel of a PNG (estimate; photos need less)


@dataclass(frozen=True)
class FileSizes:
    """``weights_bytes``: the weights in a LoRA file, by rank and shapes.  ``state_bytes``: of a checkpoint to resume
    from.  ``samples_bytes``: of the images that are drawn at once."""

    weights_bytes: int
    state_bytes: int
    samples_bytes: int


def file_sizes(base: Base, config: TrainConfig, prompts: int = 0) -> FileSizes:
    from trainer.adapters import count_weights

    weights = count_weights(base, config)
    each = FP32_BYTES if config.save_precision == "float" else 2
    pixels = config.resolution * (config.resolution_height or config.resolution)
    return FileSizes(
        weights * each, STATE_COPIES * FP32_BYTES * weights, round(prompts * pixels * SAMPLE_BYTES)
    )


def needs(config: TrainConfig, run: Steps, sizes: FileSizes, done: int) -> Needs:
    """What is still written after ``done`` steps.  A new checkpoint is complete before the one before it goes."""
    saves = _left(config.save_every_n_steps, done, run.total_steps - 1, config.save_last_n_steps, 1)
    epochs = done // run.steps_per_epoch
    saves += _left(
        config.save_every_n_epochs,
        epochs,
        run.epochs - 1,
        config.save_last_n_epochs,
        config.save_every_n_epochs or 1,
    )
    drawn = _left(config.sample_every_n_steps, done, run.total_steps)
    drawn += _left(config.sample_every_n_epochs, epochs, run.epochs)
    next_bytes = sizes.state_bytes + sizes.weights_bytes + sizes.samples_bytes * (drawn > 0)
    rest = sizes.state_bytes + (saves + 1) * sizes.weights_bytes + drawn * sizes.samples_bytes
    return Needs(next_bytes, rest)


def _left(every: int | None, done: int, last: int, kept: int | None = None, unit: int = 1) -> int:
    """How many multiples of ``every`` come after ``done``, up to ``last``; at most as many as are kept."""
    if not every:
        return 0
    count = max(0, last // every - done // every)
    return count if kept is None else min(count, kept * unit // every + 1)
