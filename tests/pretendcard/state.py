"""What the pretend card knows: its memory, what was counted on it, and when it runs out.

Owns no tensors: ``tensors`` tells it what was allocated, launched, copied and waited for.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) + "/" for name in ("trainer", "hpo", "evaluation"))
TESTS = str(ROOT / "tests") + "/"
SELF = str(Path(__file__).resolve().parent) + "/"
BLOCK = 512  # bytes: the caching allocator rounds to it
CONTEXT_BYTES = 0  # what CUDA itself would take; a test that wants it makes the card smaller

# The texts that PyTorch 2.15 (CUDA 13) has for memory that ran out; AFTER_CUDA ends every CUDA error.
AFTER_CUDA = (
    "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/"
    "group__CUDART__TYPES.html for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
# form → (what raises it: any allocation, a matrix product or a convolution, its type, its text)
FORMS: dict[str, tuple[str, type[Exception], str]] = {
    "allocator": ("any", torch.OutOfMemoryError, ""),  # its text has the sizes
    "cublas": (
        "matmul",
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    "cudnn": ("conv", RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-init": ("conv", RuntimeError, "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cudnn-run": ("conv", RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cudnn-internal": ("conv", RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "driver": ("any", torch.AcceleratorError, "CUDA error: out of memory" + AFTER_CUDA),
}


class WouldSynchronize(RuntimeError):
    """A call that waits for the card, where ``forbid_syncs`` allows none."""


@dataclass(frozen=True)
class Sync:
    """A call that made the CPU wait for the card: what it was and the line of our code that made it."""

    what: str
    place: str

    def __str__(self) -> str:
        return f"{self.what} at {self.place}"


@dataclass
class Counts:
    """What happened on the card while it was counted.

    ``launches`` are kernels by the model in ``kernels``; ``ops`` the same by operator.  Bytes are those of copies
    between the computer's memory and the card; ``uploads`` and ``downloads`` how many copies.
    """

    launches: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    syncs: list[Sync] = field(default_factory=list)
    to_card_bytes: int = 0
    to_host_bytes: int = 0
    uploads: int = 0
    downloads: int = 0
    allocations: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0

    @property
    def sync_places(self) -> Counter[str]:
        """How often each place of our code waited."""
        return Counter(str(sync) for sync in self.syncs)

    def summary(self) -> dict[str, int]:
        """The figures of a benchmark's row."""
        return {
            "launches": self.launches,
            "syncs": len(self.syncs),
            "to_card_bytes": self.to_card_bytes,
            "to_host_bytes": self.to_host_bytes,
            "copies": self.uploads + self.downloads,
            "allocations": self.allocations,
            "allocated_bytes": self.allocated_bytes,
            "peak_bytes": self.peak_bytes,
        }


@dataclass
class Memory:
    """The memory of one card: live storages, and the peak of what the allocator would have reserved."""

    total: int
    live: dict[int, int] = field(default_factory=dict)  # address of a storage → its bytes, rounded
    used: int = 0
    peak: int = 0
    reserved: int = 0
    reserved_peak: int = 0


@dataclass
class _Failure:
    form: str
    left: int  # allocations that still succeed
    times: int


class State:
    """Everything the pretend card counts and limits.  One is active at a time."""

    def __init__(self, card_bytes: int, devices: int) -> None:
        self.memories = [Memory(card_bytes) for _ in range(devices)]
        self.counting: list[Counts] = []
        self.forbidding = 0
        self.failure: _Failure | None = None
        self.touched: set[int] = set()  # indices of cards that anything was put on
        self.lock = threading.RLock()

    # Counting

    def launched(self, name: str, kernels: int) -> None:
        for counts in self.counting:
            counts.launches += kernels
            counts.ops[name] += kernels

    def moved(self, nbytes: int, *, to_card: bool) -> None:
        for counts in self.counting:
            if to_card:
                counts.to_card_bytes += nbytes
                counts.uploads += 1
            else:
                counts.to_host_bytes += nbytes
                counts.downloads += 1

    def waited(self, what: str) -> None:
        """The CPU waits for the card.  Raises WouldSynchronize where that is forbidden."""
        if not self.counting and not self.forbidding:
            return
        sync = Sync(what, place())
        for counts in self.counting:
            counts.syncs.append(sync)
        if self.forbidding:
            raise WouldSynchronize(f"called a synchronizing CUDA operation: {sync}")

    # Memory

    def allocate(self, index: int, storage: Any) -> None:
        """A storage that is new on a card.  Raises what the allocator raises if it does not fit."""
        with self.lock:
            memory, key = self.memories[index], storage._cdata
            if key in memory.live:
                return
            self.touched.add(index)
            nbytes = storage.nbytes()
            size = -(-nbytes // BLOCK) * BLOCK
            if size == 0:
                return
            for counts in self.counting:
                counts.allocations += 1
                counts.allocated_bytes += size
            if self.failure is not None:
                self.failure.left -= 1
                if self.failure.left < 0 and FORMS[self.failure.form][0] == "any":
                    self._fail(index, nbytes)
            if memory.used + size > memory.total:
                raise self._out_of_memory(index, nbytes)
            memory.live[key] = size
            memory.used += size
            memory.peak = max(memory.peak, memory.used)
            memory.reserved = max(memory.reserved, memory.used)
            memory.reserved_peak = max(memory.reserved_peak, memory.reserved)
            for counts in self.counting:
                counts.peak_bytes = max(counts.peak_bytes, sum(each.used for each in self.memories))
            weakref.finalize(storage, self._freed, memory, key).atexit = False

    def _freed(self, memory: Memory, key: int) -> None:
        with self.lock:
            memory.used -= memory.live.pop(key, 0)

    def enter_library(self, kind: str, index: int) -> None:
        """A matrix product or a convolution begins: libraries need a handle and a workspace."""
        if self.failure is not None and self.failure.left < 0 and FORMS[self.failure.form][0] == kind:
            self._fail(index, 8 << 20)

    def _fail(self, index: int, nbytes: int) -> None:
        assert self.failure is not None
        form = self.failure.form
        self.failure.times -= 1
        if self.failure.times <= 0:
            self.failure = None
        if form == "allocator":
            raise self._out_of_memory(index, nbytes)
        raise FORMS[form][1](FORMS[form][2])

    def _out_of_memory(self, index: int, nbytes: int) -> torch.OutOfMemoryError:
        memory = self.memories[index]
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {_shown(nbytes)}. GPU {index} has a total capacity of "
            f"{_shown(memory.total)} of which {_shown(max(0, memory.total - memory.reserved))} is free. Including "
            f"non-PyTorch memory, this process has {_shown(memory.reserved)} memory in use. Of the allocated memory "
            f"{_shown(memory.used)} is allocated by PyTorch, and {_shown(memory.reserved - memory.used)} is reserved "
            "by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
            "Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
            "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )

    # For tests

    @contextlib.contextmanager
    def count(self) -> Iterator[Counts]:
        """Count what happens inside.  May be nested."""
        counts = Counts(peak_bytes=sum(memory.used for memory in self.memories))
        self.counting.append(counts)
        try:
            yield counts
        finally:
            self.counting = [each for each in self.counting if each is not counts]

    @contextlib.contextmanager
    def forbid_syncs(self) -> Iterator[None]:
        """A call inside that waits for the card raises WouldSynchronize."""
        self.forbidding += 1
        try:
            yield
        finally:
            self.forbidding -= 1

    def run_out(self, at: int, form: str = "allocator", times: int = 1) -> None:
        """After ``at`` more allocations that succeed, the next one (for a library's form: the next matrix product or
        convolution) fails in a form of FORMS, ``times`` times."""
        if form not in FORMS:
            raise ValueError(f"{form!r} is none of {', '.join(FORMS)}")
        self.failure = _Failure(form, at, times)

    def heal(self) -> None:
        """Forget a failure that has not happened."""
        self.failure = None


def _shown(nbytes: int) -> str:
    """Bytes as CUDACachingAllocator writes them."""
    if nbytes <= 1024:
        return f"{nbytes} bytes"
    for limit, unit in ((1 << 20, "KiB"), (1 << 30, "MiB")):
        if nbytes <= limit:
            return f"{nbytes / (limit >> 10):.2f} {unit}"
    return f"{nbytes / (1 << 30):.2f} GiB"


def place() -> str:
    """The innermost line of our code on the stack, else of a test, as ``trainer/loop/stepper.py:140 in step``."""
    frame: Any = sys._getframe(1)
    test = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno} in {frame.f_code.co_name}"
        if not test and file.startswith(TESTS) and not file.startswith(SELF):
            test = f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return test or "elsewhere"
