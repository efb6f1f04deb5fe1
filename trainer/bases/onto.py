"""onto: a tensor made on the CPU, sent to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device. To a GPU from pinned memory, so that the CPU goes on at once: from ordinary memory the
    copy waits for all work that the GPU still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)
