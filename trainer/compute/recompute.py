"""Gradient checkpointing: which blocks recompute their activations during training.

Owns the order in which U-Net blocks are chosen, and how it is switched on in diffusers and transformers
networks. The training loop and the planner's trace run inside ``recomputing``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.bases import Base
from trainer.config import TrainConfig


def blocks_outermost_first(unet: Any) -> list[str]:
    """Paths of the U-Net blocks in the order in which they start to recompute. The outermost blocks have the
    most activations for the least arithmetic; up comes before down because it has one more resnet."""
    downs, ups = len(unet.down_blocks), len(unet.up_blocks)
    pairs = [(f"up_blocks.{ups - 1 - level}", f"down_blocks.{level}") for level in range(min(downs, ups))]
    order = [path for pair in pairs for path in pair]
    if getattr(unet, "mid_block", None) is not None:
        order.append("mid_block")
    return order


def _with_inputs_in_ram(module: Any, *inputs: Any) -> Any:
    """Recompute a module in the backward pass from inputs stored in RAM. Tensors saved inside the module are
    not moved: recomputation discards them anyway."""
    pinned = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, use_reentrant=False)


@contextlib.contextmanager
def recomputing(base: Base, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing during training; restores the base afterwards."""
    if not config.gradient_checkpointing:
        yield
        return
    encoders = base.text_encoders if config.updates_text_encoder else []
    # the switch in transformers leaves a hook on the embeddings, so layers are switched one by one
    layers = [
        m for encoder in encoders for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    offload = config.cpu_offload_checkpointing
    base.unet.enable_gradient_checkpointing(_with_inputs_in_ram if offload else None)
    order = blocks_outermost_first(base.unet)
    for path in order[config.checkpoint_blocks or len(order) :]:
        for module in base.unet.get_submodule(path).modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
    for layer in layers:
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
        layer.train()  # recomputation needs training mode; CLIP has no active dropout
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        for layer in layers:
            layer.gradient_checkpointing = False
            layer.eval()
