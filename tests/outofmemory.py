"""Failed allocations as the libraries report them, and a way to raise one at an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def accelerator_error(text: str, code: int | None = None) -> RuntimeError:
    """torch.AcceleratorError as the driver raises it, with its code where one is given."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


FORMS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "accelerator": lambda: accelerator_error("CUDA error: out of memory\nCUDA kernel errors might be …"),
    "accelerator code": lambda: accelerator_error("CUDA error: Speicher erschöpft", 2),
    "driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cublas at first use": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cudnn at first use": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cudnn kernels": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "cudnn plans": lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
    "cusolver": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `…`"),
    "nccl": lambda: torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "bitsandbytes": lambda: RuntimeError(
        "Error out of memory at line 351 in file /src/csrc/pythonInterface.cpp"
    ),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 70368744177664 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": lambda: RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."
    ),
    "python": MemoryError,
    "system": lambda: OSError(12, "Cannot allocate memory"),
}
LOST: dict[str, Callable[[], Exception]] = {
    "illegal access": lambda: accelerator_error("CUDA error: an illegal memory access was encountered"),
    "assert": lambda: accelerator_error("CUDA error: device-side assert triggered"),
    "launch": lambda: RuntimeError("CUDA error: unspecified launch failure"),
    "code": lambda: accelerator_error("CUDA error: something new", 719),
    "unknown": lambda: RuntimeError("CUDA error: unknown error"),
    "segments": lambda: RuntimeError(
        '!handles_.at(i) INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":487'
    ),
}


class FailingAt(TorchDispatchMode):
    """Raises an error at operations for which ``when(number, name, result)`` holds, after they have allocated."""

    def __init__(self, error: Callable[[], Exception], when: Callable[[int, str, Any], bool]) -> None:
        super().__init__()
        self.error, self.when = error, when
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.number += 1
        if self.when(self.number, func.name(), result):
            raise self.error()
        return result
