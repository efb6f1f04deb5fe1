"""A failed allocation as an error with what to change, and the peak of a device's memory.  For everything
that runs with a trial's settings.

Two figures of a peak: what this process takes, which can be predicted, and what the whole card holds, other
programs included, which decides whether the next allocation fails.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from trainer.config import TrainConfig
from trainer.errors import OutOfMemory

# CUDA's own memory in a process: context and loaded kernels.  Assumed 0.55 GB: nvidia-smi shows 0.5–0.6 GB
# for a PyTorch process that holds one small tensor on current cards; lazy loading (CUDA ≥ 11.7) included.
CUDA_CONTEXT_BYTES = 550_000_000


@contextlib.contextmanager
def out_of_memory_named(config: TrainConfig) -> Iterator[None]:
    """A failed allocation becomes OutOfMemory with what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory at train_batch_size {config.train_batch_size}, resolution {config.resolution}",
            "lower train_batch_size (gradient_accumulation_steps up), or set gradient_checkpointing = true",
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def forget_peak(device: torch.device) -> None:
    """Measure ``peak_bytes`` from now on.  What is cached counts as held: ``release`` it before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process held since ``forget_peak``: its tensors and cache, and CUDA's own memory,
    which is assumed.  None on a CPU, where nothing like it is known."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT_BYTES


def card_peak_bytes(device: torch.device) -> int | None:
    """The most that was in use on the whole card since ``forget_peak``, if other programs held what they hold
    now.  None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    beside = (total - free) - torch.cuda.memory_reserved(device)
    return int(torch.cuda.max_memory_reserved(device) + beside)


def device_bytes(device: torch.device) -> int | None:
    """The memory of a card; None on a CPU."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give memory back that only waits to be used again."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
