"""A failed allocation as an error with what to change.  For everything that runs with a trial's settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trainer.config import TrainConfig
from trainer.errors import OutOfMemory


@contextlib.contextmanager
def out_of_memory_named(config: TrainConfig) -> Iterator[None]:
    """A failed allocation becomes OutOfMemory with what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory at train_batch_size {config.train_batch_size}, resolution {config.resolution}",
            "lower train_batch_size (gradient_accumulation_steps up), or set gradient_checkpointing = true",
        ) from None
