"""Gradient checkpointing: which blocks recompute their activations, for as long as training lasts.

Owns the order in which U-Net blocks are chosen and the switches in diffusers' and transformers' networks; the
loop runs inside ``recomputing``, and so does the planner's trace.
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
    """Paths of the U-Net's blocks in the order in which they recompute: the outermost hold the most
    activations for the least arithmetic.  up before down: it has one resnet more."""
    downs, ups = len(unet.down_blocks), len(unet.up_blocks)
    pairs = [(f"up_blocks.{ups - 1 - level}", f"down_blocks.{level}") for level in range(min(downs, ups))]
    order = [path for pair in pairs for path in pair]
    if getattr(unet, "mid_block", None) is not None:
        order.append("mid_block")
    return order


def _with_inputs_in_ram(module: Any, *inputs: Any) -> Any:
    """Recompute a module in the backward pass from inputs that wait in the computer's memory.  What is saved
    inside is not touched by this: recomputing throws it away anyway."""
    pinned = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, use_reentrant=False)


@contextlib.contextmanager
def recomputing(base: Base, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing while training; the base is as before afterwards."""
    if not config.gradient_checkpointing:
        yield
        return
    encoders = base.text_encoders if config.updates_text_encoder else []
    # transformers' own switch leaves a hook on the embeddings behind, so its layers are switched one by one
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
        layer.train()  # it recomputes in training mode only; CLIP has no dropout that would act
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        for layer in layers:
            layer.gradient_checkpointing = False
            layer.eval()
