"""Speed-ups of the U-Net that do not change the result: memory layout and compilation.

Attention needs no switch: diffusers and transformers call PyTorch's scaled_dot_product_attention, which uses
flash kernels if the GPU supports them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trainer.bases import Base
from trainer.config import TrainConfig

COMPILED = ("BasicTransformerBlock",)  # repeated up to 70 times in SDXL: compiled once for all


@contextlib.contextmanager
def faster(base: Base, config: TrainConfig, backend: str = "inductor") -> Iterator[None]:
    """Apply opt_channels_last and torch_compile during training; restores the base afterwards."""
    blocks = [m for m in base.unet.modules() if type(m).__name__ in COMPILED] if config.torch_compile else []
    if config.opt_channels_last:
        torch.nn.Module.to(base.unet, memory_format=torch.channels_last)
    for block in blocks:
        block.compile(backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        if config.opt_channels_last:
            torch.nn.Module.to(base.unet, memory_format=torch.contiguous_format)
