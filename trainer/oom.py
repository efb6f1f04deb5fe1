"""Failed allocations in all their forms, a lost CUDA context, and the peak memory of a device.

Owns which error means what (``is_out_of_memory``, ``is_device_lost``), how such an error is named for the user
(``named``, ``out_of_memory_named``, ``memory_named``), and how the memory of a failed attempt is given back
(``forget``, ``release``). Does not own what is tried next: ``trainer.memory.ladder``, ``hpo.search.trial``.

Only some failed allocations are a torch.OutOfMemoryError. PyTorch's allocator raises that one; what CUDA, cuBLAS,
cuDNN, cuSOLVER, NCCL and Triton allocate themselves fails with a RuntimeError and a text of their own.

There are two peaks: the memory of this process, which can be predicted, and that of the whole GPU including
other programs, which decides whether the next allocation fails.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trainer.config import TrainConfig
from trainer.errors import RESUME, DeviceLost, OutOfMemory, ToolError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Value = TypeVar("Value")
# CUDA's own memory in a process: context and loaded kernels. Assumed 0.55 GB: nvidia-smi shows 0.5–0.6 GB for a
# PyTorch process with one small tensor on current GPUs, with lazy loading (CUDA ≥ 11.7).
CUDA_CONTEXT_BYTES = 550_000_000
# Below this a card is full for libraries that allocate outside PyTorch. Loading cuDNN's convolution kernels took about
# 500 MB in cuDNN 8.4 and failed with CUDNN_STATUS_INTERNAL_ERROR (pytorch/pytorch#81620); twice that, assumed.
FULL_BELOW_BYTES = 1_000_000_000

# Always a failed allocation. From the libraries' texts (torch 2.15, bitsandbytes 0.50, NCCL, Triton) and from issues:
# AcceleratorError and driver form (Comfy-Org/ComfyUI#12835), NCCL (NVIDIA/nccl#1235), bitsandbytes' paged memory
# (bitsandbytes#464; it usually ends the process itself), cuDNN 9's INTERNAL_ERROR_…_ALLOCATION_FAILED.
_MEMORY = re.compile(
    r"CUDA out of memory|CUDA ran out of memory|CUDA (driver )?error: out of memory|would exceed allowed memory"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|Triton Error \[CUDA\]: out of memory"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CURAND)_STATUS_\w*ALLOC(ATION)?_FAILED"
    r"|Cuda failure (\d+ )?'out of memory'|Failed to CUDA (c|m)alloc|Error out of memory at line \d+ in file"
    r"|can't allocate memory|[Cc]annot allocate memory|not enough memory: you tried to allocate|std::bad_alloc"
)
_IN_RAM = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|std::bad_alloc")
# A failed allocation where the card is full, another fault where it is not: handles of libraries are made at first use
# (CUBLAS_STATUS_NOT_INITIALIZED: EleutherAI/lm-evaluation-harness#1689; CUDNN_STATUS_NOT_INITIALIZED:
# haotian-liu/LLaVA#392, JuliaGPU/CUDA.jl#244), kernels are loaded late (CUDNN_STATUS_INTERNAL_ERROR: pytorch#81620),
# and cuDNN tries plan after plan, drops those without room for their workspace, and reports that none is left.
_MEMORY_IF_FULL = re.compile(
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)"
    r"|CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED|unable to find an engine to execute|[Uu]nable to find a valid cuDNN"
    r"|unhandled cuda error|CUDA driver error: device not ready"
)
# After these, every later CUDA call of the process fails: CUDA's documentation calls the context corrupted and asks to
# end the process. The last: PyTorch's expandable segments are broken for good after a failed mapping (pytorch#188008).
_LOST = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|illegal instruction"
    r"|invalid program counter|launch timed out|hardware stack error|uncorrectable (ECC|NVLink) error"
    r"|operation not supported on global/shared address space|CUDA (driver )?error: unknown error"
    r"|context is destroyed|driver shutting down|GPU is lost|handles_\.at\(i\) INTERNAL ASSERT"
)
_MEMORY_CODE = 2  # cudaErrorMemoryAllocation: AcceleratorError.error_code
# cudaErrorECCUncorrectable, …ContextIsDestroyed, and all that "must be terminated" in the documentation of cudaError_t
_LOST_CODES = frozenset({4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})

MORE_ROOM = "close other programs that use the GPU (nvidia-smi lists them), or use a GPU with more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, in any library's words."""
    if isinstance(error, OutOfMemory | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ToolError) or not _is_foreign(error):
        return False
    if _is_torchs(error, "OutOfMemoryError") or getattr(error, "error_code", None) == _MEMORY_CODE:
        return True
    text = str(error)
    if _MEMORY.search(text):
        return True
    return bool(_MEMORY_IF_FULL.search(text)) and not is_device_lost(error) and _is_full()


def is_device_lost(error: BaseException) -> bool:
    """Whether the process can no longer use its GPU: a kernel failed, and CUDA's context with it."""
    if isinstance(error, DeviceLost):
        return True
    if isinstance(error, ToolError) or not _is_foreign(error) or _is_torchs(error, "OutOfMemoryError"):
        return False
    text = str(error)
    if getattr(error, "error_code", None) in _LOST_CODES or _LOST.search(text):
        return True
    # libraries report a lost context as a failure of their own; CUDA itself still says what it was
    return bool(_MEMORY_IF_FULL.search(text)) and _free_bytes() == _UNREADABLE


def named(error: BaseException, message: str, hint: str) -> ToolError | None:
    """The error for the user: OutOfMemory with this message and hint, DeviceLost, or None for any other error."""
    if isinstance(error, ToolError):
        return None
    if is_out_of_memory(error):
        found = OutOfMemory(message, hint)
        found.in_ram = isinstance(error, MemoryError | OSError) or bool(_IN_RAM.search(str(error)))
        return found
    if is_device_lost(error):
        return DeviceLost(
            f"the driver has dropped this process from the GPU, and its CUDA context is lost: {_cause(error)}",
            f"go on in a new process: {RESUME}; if it happens again: hpo doctor, a newer driver, no overclocking",
        )
    return None


@contextlib.contextmanager
def memory_named(message: str, hint: str = MORE_ROOM) -> Iterator[None]:
    """Convert a failed allocation to OutOfMemory, and a lost CUDA context to DeviceLost. The tensors of the failed work
    are free as soon as the error is: neither holds its frames."""
    try:
        yield
    except Exception as error:
        found = named(error, message, hint)
        if found is None:
            raise
        forget(error)
    else:
        return
    raise found


def out_of_memory_named(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """The same for a step of training."""
    return memory_named(
        f"out of memory at train_batch_size {config.train_batch_size}, resolution {config.resolution}",
        "lower train_batch_size and raise gradient_accumulation_steps, or set gradient_checkpointing = true",
    )


def forget(error: BaseException) -> None:
    """Let go of the frames that an error and those before it hold, and so of the tensors in their variables. Frames
    that are still running keep theirs."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = one.__cause__ = one.__context__ = None


@dataclass
class Fitting:
    """Work in parts of at most ``size`` values; of half as many from where memory runs out, down to one."""

    size: int

    def each(self, values: Sequence[Value], work: Callable[[Sequence[Value]], T]) -> Iterator[T]:
        """``work`` of each part, in order. Raises what ``work`` raises at one value."""
        start = 0
        while start < len(values):
            part = values[start : start + self.size]
            try:
                found = work(part)
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                forget(error)
                self.size = len(part) // 2
            else:
                yield found
                del found
                start += len(part)
                continue
            release()


def _is_foreign(error: BaseException) -> bool:
    """Whether a library may have raised it for want of memory: RuntimeError and what safetensors raises."""
    return isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"


def _is_torchs(error: BaseException, name: str) -> bool:
    """Whether torch's exception of this name; without importing torch, which nothing has raised from then."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, getattr(torch, name, ()))


_UNREADABLE = -1  # free bytes of a card that no longer answers


def _free_bytes() -> int | None:
    """Free bytes of the GPU in use; None if none is in use, ``_UNREADABLE`` if it no longer answers."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        return int(torch.cuda.mem_get_info()[0])
    except RuntimeError:
        return _UNREADABLE


def _is_full() -> bool:
    """Whether the GPU has no room for what a library allocates. Unknown counts as full: trying again with less
    memory costs little, and a library's handle fails for hardly any other reason."""
    free = _free_bytes()
    return free is None or 0 <= free < FULL_BELOW_BYTES


def _cause(error: BaseException) -> str:
    """What CUDA said, without its name."""
    return re.sub(r"^(CUDA (driver )?error|RuntimeError): ", "", first_line(error))[:160]


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


def release(device: torch.device | None = None) -> None:
    """Release memory that is not in use: objects in reference cycles, and PyTorch's cache of the GPU. Without a
    ``device``, of the GPU in use, if there is one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or (device is not None and device.type != "cuda"):
        return
    if device is not None or torch.cuda.is_initialized():
        torch.cuda.empty_cache()
