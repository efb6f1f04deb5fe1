"""Networks: a base on the meta device, without memory for its weights, ready to be traced.

Owns building a base and its adapter from configurations, and the shapes of a base's tensors. Loads torch, diffusers,
transformers and PEFT, which takes seconds; everything that ``footprint`` finds in its store does without.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from trainer.bases import CLASSES, FAMILIES, Base, Parts, empty_network
from trainer.config import TrainConfig
from trainer.memory import tracing
from trainer.memory.store import uncollected
from trainer.memory.traces import Trace

if TYPE_CHECKING:
    from trainer.memory.footprint import BaseFacts

# component → (shape of its tensors, how many tensors have it)
Shapes = dict[str, list[tuple[tuple[int, ...], int]]]

# Settings that do not affect the injected adapter, with a fixed value.
_SAME_ADAPTER = {
    "train_batch_size": 1,
    "gradient_checkpointing": False,
    "checkpoint_blocks": None,
    "full_bf16": False,
    "fp8_base": False,
    "cpu_offload_checkpointing": False,
    "text_encoder_frozen": False,
    "mixed_precision": "auto",
    "max_token_length": None,
    "clip_skip": None,
}
_shapes: dict[BaseFacts, Shapes] = {}


def traced(
    facts: BaseFacts,
    config: TrainConfig,
    bucket_px: tuple[int, int],
    compute_type: str,
    *,
    is_full: bool = False,
) -> Trace:
    """Trace one step of these settings, computed in torch's ``compute_type``; ``is_full``: of the U-Net itself,
    without an adapter."""
    compute: torch.dtype = getattr(torch, compute_type)
    with uncollected():
        it = _whole(facts) if is_full else _subject(facts, config.with_values(_SAME_ADAPTER))
        for module in it.base.components().values():
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(compute)
        it.base.compute_dtype = compute
        return tracing.trace(it, config, bucket_px, compute)


def tensor_shapes(facts: BaseFacts) -> Shapes:
    """The shapes of all tensors of the U-Net and the text encoders."""
    if facts not in _shapes:
        meta_base(facts)
    return _shapes[facts]


@lru_cache(maxsize=1)
def _whole(facts: BaseFacts) -> tracing.Subject:
    base = meta_base(facts)
    base.unet.requires_grad_(True)
    return tracing.Subject(base, None)


@lru_cache(maxsize=1)
def _subject(facts: BaseFacts, config: TrainConfig) -> tracing.Subject:
    return tracing.subject(meta_base(facts), config)


def meta_base(facts: BaseFacts) -> Base:
    """All modules of a base, without memory for their weights."""
    names = ("unet", *FAMILIES[facts.family].text_encoders)
    networks: dict[str, Any] = {name: empty_network(name, facts.config(name)) for name in names}
    _shapes[facts] = {
        name: list(Counter(tuple(p.shape) for p in network.parameters()).items())
        for name, network in networks.items()
    }
    tokenizers = []
    for name in names[1:]:
        text = facts.config(name)
        length, end = text.get("max_position_embeddings", 77), text.get("eos_token_id", 49407)
        tokenizers.append(SimpleNamespace(model_max_length=length, eos_token_id=end, get_vocab=dict))
    vae = empty_network("vae", facts.config("vae"))
    encoders = tuple(networks[name] for name in names[1:])
    parts = Parts(networks["unet"], vae, encoders, tuple(tokenizers), {})
    return CLASSES[facts.family](facts.name, "meta", parts)
