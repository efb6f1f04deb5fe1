"""Replay: run a traced step through the simulated allocator, in addition to the memory that is already in use.

Owns how a sequence of allocations becomes a peak. ``tracing`` records the sequence, ``allocator`` places each
block. All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.memory.allocator import CachingAllocator
from trainer.memory.traces import Trace


@dataclass(frozen=True)
class Held:
    """Sizes of the tensors on the GPU in addition to the step. ``update``: tensors present only during the
    optimizer step (fp32 copies of bf16 weights and gradients, state moved from RAM). ``is_accumulated``: the
    gradients of the previous micro-batch are present, and new ones are freed after they are added."""

    base: Mapping[str, int]
    adapter: list[int]
    state: list[int]
    update: list[int]
    is_accumulated: bool


@dataclass(frozen=True)
class Peak:
    """Peak allocated and reserved memory, and the part of the step at that time."""

    allocated: int
    reserved: int
    activations: int
    gradients: int
    workspace: int


def replay(found: Trace, ranks: tuple[int, int], held: Held) -> Peak:
    """Replay two steps in the allocator; the optimizer state is created after the first. ``ranks``
    are network_dim and conv_dim."""
    allocator = CachingAllocator()
    sizes = [block.bytes_at(*ranks) for block in found.blocks]
    for size in (*held.base.values(), *held.adapter):
        allocator.allocate(size)
    peak = {"activations": 0, "gradients": 0, "workspace": 0}
    highest = 0
    before = [size for size, block in zip(sizes, found.blocks, strict=True) if block.is_gradient]
    if not held.is_accumulated:
        before = []
    for step in range(2):
        gradients = [allocator.allocate(size) for size in before]
        live = {"activations": 0, "gradients": sum(before), "workspace": 0}
        handles: dict[int, int] = {}
        for event in found.events:
            number = event if event >= 0 else ~event
            block = found.blocks[number]
            part = "gradients" if block.is_gradient else "workspace" if block.is_workspace else "activations"
            if event >= 0:
                handles[number] = allocator.allocate(sizes[number])
                live[part] += sizes[number]
                if step and allocator.allocated > highest:
                    highest, peak = allocator.allocated, dict(live)
                if not (held.is_accumulated and block.is_gradient):
                    continue
            if number in handles:
                allocator.free(handles.pop(number))
                live[part] -= sizes[number]
        if not step:
            for size in held.state:
                allocator.allocate(size)
        during = [allocator.allocate(size) for size in held.update]
        if step and allocator.allocated > highest:
            peak = {**live, "workspace": sum(held.update)}
        for handle in (*during, *handles.values(), *gradients):
            allocator.free(handle)
    return Peak(allocator.peak_allocated, allocator.reserved, **peak)
