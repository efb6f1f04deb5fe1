"""A pretend card: a device that behaves like CUDA where there is none.

    with pretend_card(16 * GB) as card:
        base = load_base("mini-sd15", device="cuda")
        with card.count() as counts:
            next(steps)
        print(counts.summary(), counts.sync_places)
        with card.forbid_syncs():  # WouldSynchronize names the line of our code
            next(steps)
        card.run_out(at=20, form="cublas")  # FORMS: the texts and types of PyTorch's own errors

Tensors say ``cuda:0``, hold CPU data and share its arithmetic, so a run on the card gives the losses of the CPU.  What
meets on different devices raises, generators belong to a device, copies are counted and wait unless they are pinned
and non_blocking, storages take memory while they live.

Which way was chosen.  Tensors are a subclass (``tensors.CardTensor``) whose TensorImpl carries the CUDA dispatch keys
over CPU storage; a dispatch mode makes such tensors from factories and copies, a function mode sees a call before C++
asks for a device.  The other ways end sooner:

* Fake tensors say cuda without a card too, but have no values: no losses, no images, no scores, and whatever reads a
  value ends there.
* PrivateUse1 (PyTorch's openreg test backend) is the most complete device, but its type is not "cuda" and PyTorch
  refuses to rename it so: every ``device.type == "cuda"`` of ours and of diffusers, PEFT and transformers would take
  the other branch, and those are what is tested here.
* A wrapper subclass whose TensorImpl says cuda ends the process in autograd, which asks the driver for a stream.

So C++ takes the card's tensors for CPU tensors. What follows from that is answered in Python: ``to``, ``cpu``,
``numpy``, ``data``, grouping of optimizers' tensors, autocast (``autocast``: PyTorch's own lists), and temporary
tensors that C++ makes inside a call or a backward pass, which belong to the card of the call. bitsandbytes'
optimizers run its CPU kernels on the card's data. Not like CUDA: kernels' rounding and their random numbers (a
generator of the card draws the CPU's), streams (everything is done at once), threads (the backward pass runs in
the caller's), fragmentation, and cuDNN's workspaces. Kernel launches are a model (``kernels``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.pretendcard import cuda
from tests.pretendcard.state import FORMS, Counts, State, Sync, WouldSynchronize
from tests.pretendcard.tensors import CardTensor

GB = 1_000_000_000

__all__ = ["FORMS", "GB", "CardTensor", "Counts", "State", "Sync", "WouldSynchronize", "pretend_card"]


@contextlib.contextmanager
def pretend_card(
    card_bytes: int = 16 * GB,
    *,
    devices: int = 1,
    bf16: bool = True,
    capability: tuple[int, int] = (8, 9),
    name: str = "Pretend 4080",
) -> Iterator[State]:
    """A card of ``card_bytes`` (or several equal ones) while the block runs.  Without ``bf16`` it is an older one."""
    card = State(card_bytes, devices)
    with cuda.installed(card, bf16=bf16, capability=capability, name=name):
        yield card
