"""Out-of-memory errors with a hint, and the peak memory of a device. For all code that runs with the
settings of a trial.

There are two peaks: the memory of this process, which can be predicted, and that of the whole GPU including
other programs, which decides whether the next allocation fails.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.errors import OutOfMemory

if TYPE_CHECKING:
    import torch

# CUDA's own memory in a process: context and loaded kernels. Assumed 0.55 GB: nvidia-smi shows 0.5–0.6 GB for a
# PyTorch process with one small tensor on current GPUs, with lazy loading (CUDA ≥ 11.7).
CUDA_CONTEXT_BYTES = 550_000_000


@contextlib.contextmanager
def out_of_memory_named(config: TrainConfig) -> Iterator[None]:
    """Convert a failed allocation to OutOfMemory with a hint."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory at train_batch_size {config.train_batch_size}, resolution {config.resolution}",
            "lower train_batch_size and raise gradient_accumulation_steps, or set gradient_checkpointing = true",
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def forget_peak(device: torch.device) -> None:
    """Start a new measurement of ``peak_bytes``. Cached memory counts as used: call ``release`` before."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory of this process since ``forget_peak``: tensors, cache and CUDA's own memory (assumed).
    None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT_BYTES


def card_peak_bytes(device: torch.device) -> int | None:
    """Peak memory of the whole GPU since ``forget_peak``, if other programs used the same memory as now.
    None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    beside = (total - free) - torch.cuda.memory_reserved(device)
    return int(torch.cuda.max_memory_reserved(device) + beside)


def device_bytes(device: torch.device) -> int | None:
    """Total memory of a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[1])


def release(device: torch.device) -> None:
    """Release cached memory that is not in use."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
