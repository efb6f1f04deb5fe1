"""Trace one training step without data: allocations and frees in the order in which CUDA would make them.

The networks are the real ones (diffusers, transformers, PEFT's layers, our adapter and checkpointing code) on the
meta device, where tensors have shapes and storages but no memory.  Six functions of torch are replaced while
tracing, because the meta device supports neither autocast nor fused attention. The replacements allocate and save
for backward what CUDA's kernels under autocast would (``kernels``).  Everything else is torch's autograd.

Owns the order and size of allocations of forward and backward.  Does not own weights and optimizer state
(``footprint``) or the allocator (``allocator``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from trainer.adapters import adapter as adapters
from trainer.adapters import dropout, kind_for, lowrank, magnitude, trained_targets
from trainer.bases import Base, Sizes, TextStates
from trainer.compute import recompute
from trainer.config import TrainConfig
from trainer.memory.kernels import Kernels, inputs_elsewhere
from trainer.memory.recorder import Recorder
from trainer.memory.traces import Trace, block_of


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Temporarily replace ``owner.name`` by ``stand_in``."""
    own = vars(owner).get(name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own) if own is not None else delattr(owner, name)


# The step


@dataclass
class Subject:
    """A base on the meta device with an injected adapter; without one, the U-Net itself is trained."""

    base: Base
    adapter: adapters.Adapter | None

    def trainable(self) -> list[nn.Parameter]:
        return list(self.base.unet.parameters()) if self.adapter is None else self.adapter.trainable()


def subject(base: Base, config: TrainConfig) -> Subject:
    """A base on the meta device with the adapter of these settings."""
    targets = trained_targets(base, config)
    weights: dict[str, Tensor] = {}
    with torch.device("meta"):
        for target in targets:
            layer = base.components()[target.component].get_submodule(target.path)
            kind = kind_for(config, target)
            for ending, value in kind.start(layer, target.rank, None).items():  # type: ignore[arg-type]
                weights[f"{target.key}.{ending}"] = value
            if target.kind == "DoRA":
                weights[f"{target.key}.{magnitude.MAGNITUDE}"] = magnitude.column_norm(layer.weight)
    shares = dropout.Dropout(config.network_dropout, config.rank_dropout, 0.0, config.rank_dropout_rows)
    return Subject(base, adapters.Adapter(base, targets, weights, dropout=shares))


def trace(it: Subject, config: TrainConfig, bucket_px: tuple[int, int], compute: torch.dtype) -> Trace:
    """Forward and backward of one micro-batch.  ``bucket_px``: width, height."""
    base, batch = it.base, config.train_batch_size
    width_px, height_px = bucket_px
    parameters = it.trainable()
    _set_kind(it, torch.bfloat16 if config.full_bf16 else torch.float32)
    if config.text_encoder_frozen and it.adapter is not None:
        it.adapter.freeze_text_encoders()
    recorder = Recorder()
    for module in base.modules():
        for tensor in (*module.parameters(), *module.buffers()):
            recorder.see(tensor, is_new=False)
    matrices = [p for p in base.unet.parameters() if p.dim() > 1 and not p.requires_grad]
    fp8 = frozenset(map(id, matrices)) if config.fp8_base else frozenset()
    is_plain, in_type = lowrank.is_plain, it.adapter is not None and not it.adapter.needs_autocast
    kernels = Kernels(recorder, None if in_type or compute == torch.float32 else compute, fp8)
    with contextlib.ExitStack() as stack:
        for name, function in kernels.patches():
            stack.enter_context(_replaced(F, name, function))
        stack.enter_context(_replaced(dropout, "keyed_generator", lambda *_, **__: None))
        stack.enter_context(_replaced(lowrank, "kind_of", lambda _: compute))
        stack.enter_context(
            _replaced(lowrank, "is_plain", lambda layer: is_plain(layer) and id(layer.weight) not in fp8)
        )
        stack.enter_context(_replaced(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(_replaced(recompute, "_with_inputs_in_ram", inputs_elsewhere))
        stack.enter_context(recorder)
        stack.enter_context(recompute.recomputing(base, config))
        if it.adapter is not None and (config.network_dropout or config.rank_dropout):
            it.adapter.apply_dropout(1)
        if it.adapter is not None:
            stack.enter_context(it.adapter.computing(compute))
        side = base.latent_factor_px
        shape = (batch, base.unet.config.in_channels, height_px // side, width_px // side)
        noisy_BCHW = torch.empty(shape, device="meta")
        timesteps_B = torch.zeros(batch, dtype=torch.long, device="meta")
        states = text_states(base, config, batch)
        sizes = [Sizes((height_px, width_px), (0, 0), (height_px, width_px))] * batch
        predicted_BCHW = base.predict(noisy_BCHW, timesteps_B, states, sizes)
        kernels.end_autocast()
        del states
        (predicted_BCHW - torch.empty_like(noisy_BCHW)).square().mean().backward()
        del predicted_BCHW, noisy_BCHW
        given = [p.grad for p in parameters if p.grad is not None]
        gradients = {recorder.known[grad.untyped_storage()._cdata] for grad in given}
    if it.adapter is not None:
        it.adapter.apply_dropout()
    blocks = tuple(block_of(*size, n in gradients) for n, size in enumerate(recorder.sizes))
    held = parameters
    if it.adapter is not None:  # LoRA-FA also holds weights that are not trained
        held = [weight for layer in it.adapter.layers for weight in layer.weights.values()]
    shapes = tuple((tuple(p.shape), p.grad is not None) for p in held)
    found = Trace(blocks, tuple(recorder.events), shapes)
    for parameter in parameters:
        parameter.grad = None
    return found


def _set_kind(it: Subject, kind: torch.dtype) -> None:
    """Convert trained weights to a dtype and drop gradients; DoRA magnitudes always stay fp32."""
    fp32 = (
        [] if it.adapter is None else [layer.weights.get(magnitude.MAGNITUDE) for layer in it.adapter.layers]
    )
    magnitudes = {id(weight) for weight in fp32}
    for parameter in it.trainable():
        parameter.grad = None
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in magnitudes else kind)


def text_states(base: Base, config: TrainConfig, batch: int) -> TextStates:
    """Cached text states as copied to the GPU, or states from the encoders if one of them is trained."""
    windows = (config.max_token_length or 75) // 75
    if config.trains_text_encoder:
        ids_BWL = torch.zeros((batch, windows, base.caption_tokens + 2), dtype=torch.long, device="meta")
        updates = torch.set_grad_enabled(config.updates_text_encoder)
        with updates, _replaced(base, "token_windows", lambda *_: ids_BWL):
            return base.encode_text([""] * batch, config.clip_skip, config.max_token_length)
    width = int(base.unet.config.cross_attention_dim)
    hidden_BLD = torch.empty(batch, windows * 75 + 2, width, device="meta")
    if not base.facts.has_pooled_text:
        return TextStates(hidden_BLD)
    return TextStates(
        hidden_BLD, torch.empty(batch, base.text_encoders[1].config.projection_dim, device="meta")
    )
