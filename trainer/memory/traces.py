"""Trace: the allocations and frees of one training step, as data. Loads no torch, so a stored trace is read at once.

Owns the form of a trace in memory and as JSON. ``tracing`` records one, ``replay`` runs it through the allocator,
``store`` keeps it on disk.

Ranks: a trace uses prime numbers as ranks that divide no other size. So the size of every storage is known to
be constant or proportional to network_dim or conv_dim, and one trace works for all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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


@dataclass(frozen=True)
class Trace:
    """``events``: n ≥ 0 allocates block n, ~n frees it. ``shapes``: the shapes of the adapter's tensors, and
    whether each has a gradient."""

    blocks: tuple[Block, ...]
    events: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, ...], bool], ...]


@lru_cache(maxsize=4096)
def block_of(size_bytes: int, elements: int, is_workspace: bool, is_gradient: bool) -> Block:
    """The block of a storage, with the rank that its size is proportional to."""
    for scale, prime in ((PER_DIM, DIM), (PER_CONV_DIM, CONV_DIM)):
        if elements and elements % prime == 0 and size_bytes % prime == 0:
            return Block(size_bytes // prime, scale, is_gradient, is_workspace)
    return Block(size_bytes, CONSTANT, is_gradient, is_workspace)


def as_table(trace: Trace) -> dict[str, Any]:
    """The trace as a JSON table; equal blocks are written once."""
    kinds: dict[Block, int] = {}
    order = [kinds.setdefault(block, len(kinds)) for block in trace.blocks]
    return {
        "kinds": [[b.size_bytes, b.scales_with, b.is_gradient, b.is_workspace] for b in kinds],
        "blocks": order,
        "events": list(trace.events),
        "shapes": [[list(shape), has_gradient] for shape, has_gradient in trace.shapes],
    }


def from_table(table: Any) -> Trace:
    """The trace of a JSON table. Raises ValueError, TypeError, KeyError or IndexError if it is not one."""
    kinds = [
        Block(int(size), int(scale), bool(grad), bool(work)) for size, scale, grad, work in table["kinds"]
    ]
    blocks = tuple([kinds[number] for number in table["blocks"]])
    events = tuple(table["events"])
    if [event for event in events if event >= 0] != list(range(len(blocks))):
        raise ValueError("every block is allocated once, in order")
    freed = [~event for event in events if event < 0]
    if len(set(freed)) != len(freed) or max(freed, default=0) >= max(1, len(blocks)):
        raise ValueError("a block is freed at most once")
    shapes = tuple((tuple(map(int, shape)), bool(has_gradient)) for shape, has_gradient in table["shapes"])
    return Trace(blocks, events, shapes)
