"""Ranks: the processes that train one LoRA together, one per GPU – or the only one.

Owns how they find each other (the variables set by torchrun and accelerate's launcher) and what they exchange.
Every process holds the whole adapter and makes the same update; the parts of a step are distributed in turn, so
the effective batch size equals the settings on any number of GPUs.  Rank 0 writes all files.

The first process alone encodes, draws samples and validates, which may take hours; NCCL ends a process that waits for
10 minutes. So they agree (``any``, ``lowest``, ``wait``) over connections of their own, without a GPU and with
``PATIENCE``: every exchange of numbers follows such an agreement at once. A process that dies closes its connections,
which the others notice immediately.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import oom as memory
from trainer.errors import RESUME, MachineError

BUCKET_VALUES = 1 << 24  # gradients sent at once: 64 MiB in fp32
PATIENCE = timedelta(days=7)  # of those that wait for work that one process does alone
COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``world``; ``local`` is its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether it is true in any process."""
        if self.world == 1:
            return mine
        flag = torch.tensor([float(mine)])
        with _together():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=_patient())
        return bool(flag.item())

    def lowest(self, mine: int | None) -> int | None:
        """The lowest of the processes' numbers; None if they have none."""
        if self.world == 1 or mine is None:
            return mine
        number = torch.tensor([mine], dtype=torch.int64)
        with _together():
            dist.all_reduce(number, dist.ReduceOp.MIN, group=_patient())
        return int(number.item())

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all."""
        if self.world > 1:
            with _together():
                dist.all_reduce(tensor)

    def sum_gradients_(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over all.  A weight without a gradient in any process keeps none.

        Raises torch.OutOfMemoryError, in every process, where one of them has no room for what is sent.
        """
        if self.world == 1 or not weights:
            return
        has = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
        with _together():
            dist.all_reduce(has, dist.ReduceOp.MAX)
        with self.agreed():
            for weight, anywhere in zip(weights, has.tolist(), strict=True):
                if anywhere and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            rooms = _rooms([weight.grad for weight in weights if weight.grad is not None])
        for bucket, flat in rooms:
            torch.cat([gradient.flatten() for gradient in bucket], out=flat)
            with _together():
                dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """If one process runs out of memory here, all raise together instead of waiting for it."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world == 1 or not memory.is_out_of_memory(error):
                raise
            failure = error
        if self.any(failure is not None):
            raise failure or torch.OutOfMemoryError("another process ran out of memory")

    def wait(self) -> None:
        """Wait for all processes, however long the others need."""
        if self.world > 1:
            with _together():
                dist.barrier(group=_patient())


ALONE = Ranks()
_groups: list[dist.ProcessGroup] = []  # the patient one, while connected


def launched() -> Ranks:
    """What the launcher set for this process; None without a launcher or with one process."""
    if not all(name in os.environ for name in COUNTS):
        return ALONE
    try:
        rank, world, local = (int(os.environ[name]) for name in COUNTS)
    except ValueError:
        raise MachineError(
            "RANK, WORLD_SIZE and LOCAL_RANK are not whole numbers",
            "start with torchrun or accelerate launch",
        ) from None
    return Ranks(rank, world, local) if world > 1 else ALONE


def join(ranks: Ranks, device: str) -> None:
    """Connect to the other processes. Returns when all are there."""
    if ranks.world == 1 or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", rank=ranks.rank, world_size=ranks.world
        )
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        if isinstance(patient, dist.ProcessGroup):  # always, for a member
            _groups.append(patient)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MachineError(
            f"the {ranks.world} processes do not find each other: {reason}",
            "start them with torchrun --nproc-per-node N or accelerate launch",
        ) from None


def leave() -> None:
    """Disconnect from the other processes."""
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _patient() -> dist.ProcessGroup | None:
    """The processes over connections that wait; the usual ones where another caller has connected them."""
    return _groups[0] if _groups else None


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Communicate with all. Raises MachineError if one of them has died."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if memory.is_out_of_memory(
            error
        ):  # NCCL allocates for itself, and the others cannot know that this one failed
            raise MachineError(
                f"no memory is left to exchange gradients with the other processes: {reason}",
                f"lower micro_batch_size or set gradient_checkpointing = true; to go on: {RESUME}",
            ) from None
        raise MachineError(
            f"another process of this run is gone: {reason}", f"its message says why; to go on: {RESUME}"
        ) from None


def _rooms(gradients: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """What is sent at once, each with the room it is sent in; buckets of one dtype share theirs."""
    found: list[tuple[list[Tensor], Tensor]] = []
    for kind in sorted({gradient.dtype for gradient in gradients}, key=str):
        buckets = _buckets([gradient for gradient in gradients if gradient.dtype == kind])
        sizes = [sum(gradient.numel() for gradient in bucket) for bucket in buckets]
        room = torch.empty(max(sizes), dtype=kind, device=gradients[0].device)
        found += [(bucket, room[:size]) for bucket, size in zip(buckets, sizes, strict=True)]
    return found


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.numel() > room:
            buckets.append([])
            room = max(BUCKET_VALUES, tensor.numel())
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets
