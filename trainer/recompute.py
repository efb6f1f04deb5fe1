"""Gradient checkpointing: which blocks recompute their activations, and that the base is as before afterwards.

The order in which blocks are chosen is by what they save: activations kept for the backward pass grow with the
block's positions × channels × layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.bases.base import Base
from trainer.config import TrainConfig

# Values kept for each position and channel, of one resnet and of one transformer layer, in units of a tensor as
# wide as the block.  Counted by hand from diffusers' modules (norms, activations, q k v, the feed-forward's 8 ×
# widening): a ranking, not a forecast.
RESNET_TENSORS = 8
TRANSFORMER_TENSORS = 24


def block_order(unet: Any) -> list[str]:
    """Names of the blocks that can recompute, those that save most first: ``up_blocks.1``, …, ``mid_block``."""
    weights: dict[str, float] = {}
    levels = len(unet.down_blocks)
    named = [(f"down_blocks.{n}", block, n) for n, block in enumerate(unet.down_blocks)]
    named += [("mid_block", unet.mid_block, levels - 1)]
    named += [(f"up_blocks.{n}", block, levels - 1 - n) for n, block in enumerate(unet.up_blocks)]
    for name, block, level in named:
        kept = sum(
            RESNET_TENSORS * resnet.out_channels for resnet in getattr(block, "resnets", [])
        )
        for transformer in getattr(block, "attentions", []):
            width = transformer.norm.num_channels
            kept += TRANSFORMER_TENSORS * width * len(transformer.transformer_blocks)
        weights[name] = kept / 4**level
    return sorted(weights, key=lambda name: -weights[name])


@contextlib.contextmanager
def recomputing(base: Base, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing while training, on as many blocks as the settings say."""
    if not config.gradient_checkpointing:
        yield
        return
    encoders = base.text_encoders if config.updates_text_encoder else []
    # transformers' own switch leaves a hook on the embeddings behind, so its layers are switched one by one
    layers = [
        m for encoder in encoders for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    base.unet.enable_gradient_checkpointing()
    if config.gradient_checkpointing_blocks is not None:
        for name in block_order(base.unet)[config.gradient_checkpointing_blocks :]:
            _switch_off(base.unet.get_submodule(name))
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


def _switch_off(block: nn.Module) -> None:
    for module in block.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False
