"""computing(): sampling in the number type of the base, adapter included.

A layer of PEFT keeps its weights in fp32 and, outside autocast, computes in it: its input is widened and its output
narrowed at every layer. Layers with ``casts_itself`` bring their weights to the type of their input and need no
autocast, which would also run every norm in fp32.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from trainer.bases import Base


def computing(base: Base, *networks: nn.Module) -> AbstractContextManager[object]:
    """Autocast to the base's type while these networks compute, if an adapter in them needs it. fp32: nothing."""
    if base.compute_dtype == torch.float32 or not any(map(needs_autocast, networks)):
        return contextlib.nullcontext()
    return torch.autocast(base.device.type, base.compute_dtype)


def needs_autocast(network: nn.Module) -> bool:
    """Whether a layer of an adapter in this network would compute in fp32."""
    return any(
        not getattr(module, "casts_itself", False)
        and any(parameter.dtype == torch.float32 for parameter in module.parameters())
        for module in network.modules()
        if hasattr(module, "base_layer")
    )
