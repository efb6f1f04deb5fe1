"""Recorder: the sequence of allocations and frees on the meta device, and how each size depends on the ranks.

Ranks: a trace uses prime numbers as ranks that divide no other size. So the size of every storage is known to
be constant or proportional to network_dim or conv_dim, and one trace works for all ranks.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DIM, CONV_DIM = 257, 263  # primes above every latent side and text length that divide no channel count
CONSTANT, PER_DIM, PER_CONV_DIM = 0, 1, 2


@dataclass(frozen=True)
class Block:
    """One allocation: ``size_bytes`` in total, or per unit of rank."""

    size_bytes: int
    scales_with: int
    is_gradient: bool = False
    is_workspace: bool = False

    def bytes_at(self, dim: int, conv_dim: int) -> int:
        return self.size_bytes * (1, dim, conv_dim)[self.scales_with]


class Recorder(TorchDispatchMode):
    """Tracks every storage from its first tensor to its last."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self.sizes: list[tuple[int, int, bool]] = []
        self.known: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.see(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self.see(part)
        return result

    def see(self, tensor: Tensor, *, is_new: bool = True) -> None:
        """Register a tensor. ``is_new = False``: it existed before the step and is not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        number = -1
        if is_new:
            number = self._allocate(storage.nbytes(), tensor.element_size())
        self.known[key] = number
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))

    def workspace(self, size_bytes: int) -> None:
        """Record memory that a kernel uses while it runs."""
        self.events.append(~self._allocate(size_bytes, 1, is_workspace=True))

    def _allocate(self, size_bytes: int, element_bytes: int, *, is_workspace: bool = False) -> int:
        self.sizes.append((size_bytes, size_bytes // element_bytes, is_workspace))
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def _gone(self, key: int) -> None:
        number = self.known.pop(key)
        del self._references[key]
        if number >= 0:
            self.events.append(~number)


def block_of(size_bytes: int, elements: int, is_workspace: bool, is_gradient: bool) -> Block:
    for scale, prime in ((PER_DIM, DIM), (PER_CONV_DIM, CONV_DIM)):
        if elements and elements % prime == 0 and size_bytes % prime == 0:
            return Block(size_bytes // prime, scale, is_gradient, is_workspace)
    return Block(size_bytes, CONSTANT, is_gradient, is_workspace)
