"""computing(): sampling in the number type of the base, adapter included.

LoRA's own layer (``lowrank``) has its weights cast once for all steps. A layer of PEFT, and a change of a weight, keep
theirs in fp32 and, outside autocast, compute in it: the input is widened and the output narrowed at every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from trainer.adapters import lowrank

if TYPE_CHECKING:
    from torch import nn

    from trainer.bases import Base


@contextlib.contextmanager
def computing(base: Base, *networks: nn.Module) -> Iterator[None]:
    """These networks compute in the base's type, whatever kind of adapter is in them. fp32: nothing changes."""
    kind = base.compute_dtype
    if kind == torch.float32:
        yield
        return
    wrapped = [m for network in networks for m in network.modules() if hasattr(m, "base_layer")]
    own = [layer for layer in wrapped if isinstance(layer, lowrank.LowRankLayer)]
    needs_autocast = len(own) < len(wrapped)
    with lowrank.computing(own, kind), torch.autocast(base.device.type, kind, enabled=needs_autocast):
        yield
