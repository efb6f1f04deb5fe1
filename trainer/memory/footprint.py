"""predict(): the peak GPU memory of a training step, by component, without a GPU and without weights.

Owns everything on the GPU in addition to the traced step (base, adapter, gradients, optimizer state, CUDA's
own memory), and the peak of a sequence of allocations. ``tracing`` records that sequence, ``replay`` replays
it, ``stacks`` finds settings that fit. All sizes are in bytes; GB in texts are 10⁹ bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.bases import FAMILIES, detect
from trainer.config import TrainConfig
from trainer.errors import MissingModel
from trainer.memory import store, vae
from trainer.memory.replay import Held, Peak, replay
from trainer.memory.states import optimizer_bytes as optimizer_bytes
from trainer.memory.traces import CONV_DIM, DIM, Trace, as_table, from_table
from trainer.oom import CUDA_CONTEXT_BYTES

# PyTorch's cuBLAS workspace: :4096:2:16:8 (PyTorch docs, CUDA semantics); 32 MiB on Hopper, the value used here.
CUBLAS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class BaseFacts:
    """The structure of a base: its family and the configurations of its networks, as JSON texts."""

    name: str
    family: str
    configs: tuple[tuple[str, str], ...]

    def config(self, component: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(dict(self.configs)[component])
        return found

    @property
    def latent_factor_px(self) -> int:
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @property
    def native_resolution_px(self) -> int:
        return int(self.config("unet")["sample_size"]) * self.latent_factor_px


@dataclass(frozen=True)
class Footprint:
    """A predicted peak and its parts. ``parts`` add up to ``peak_bytes``, the value that nvidia-smi shows."""

    parts: Mapping[str, int]
    peak_bytes: int
    allocated_bytes: int  # torch.cuda.max_memory_allocated
    reserved_bytes: int  # torch.cuda.max_memory_reserved
    bucket_px: tuple[int, int]
    images_at_once: int


def base_facts(spec: str | Path) -> BaseFacts:
    """The structure of a base: a short name, a diffusers folder or a single .safetensors file."""
    found = detect.configs_of(str(spec))
    if found is None:
        raise MissingModel(
            f"there is no base {str(spec)!r} on this machine, so its memory cannot be planned",
            "give sdxl or sd15 (all fine-tunes need the same memory), mini-sd15, mini-sdxl, a folder or a file",
        )
    tables = {
        name: detect.read_json(found.folder / name / "config.json")
        for name in ("unet", "vae", *FAMILIES[found.family].text_encoders)
    }
    texts = {name: json.dumps(table, sort_keys=True) for name, table in tables.items()}
    return BaseFacts(found.name, found.family, tuple(texts.items()))


@lru_cache(maxsize=256)
def predict(config: TrainConfig, facts: BaseFacts, *, bucket_px: tuple[int, int] | None = None) -> Footprint:
    """The peak of a training step on a GPU that computes in ``mixed_precision`` (auto: bf16).

    ``bucket_px`` is (width, height); by default the resolution, the largest area of a bucket. Latents are
    cached, but with random_crop or color_aug: then the VAE is there too. Text encoders are on the GPU only if one
    of them is trained or captions vary.
    """
    bucket = bucket_px or config.size_px
    found = _trace(facts, _traced_settings(config), bucket)
    dim, conv_dim = (config.network_dim, config.conv_dim or 1)
    if _has_own_ranks(config):
        dim = conv_dim = 1
    shapes = [(_at_rank(shape, dim, conv_dim), is_updated) for shape, is_updated in found.shapes]
    adapter = [(2 if config.full_bf16 else 4) * _count(shape) for shape, _ in shapes]
    updated = [shape for shape, is_updated in shapes if is_updated]
    state = [optimizer_bytes(config.optimizer_type, shape, config.optimizer_args) for shape in updated]
    update = [4 * _count(shape) for shape in updated] if config.full_bf16 else []
    if config.cpu_offload:
        state, update = [], [*update, *state]
    held = Held(base_bytes(config, facts), adapter, state, update, accumulates(config))
    peak = replay(found, (dim, conv_dim), held)
    if vae.encodes_anew(config):
        needed = vae.encode_bytes(config, facts.config("vae"), bucket, compute_type(config))
        peak = vae.at_least(peak, held, needed)
    return _footprint(peak, held, bucket, config.images_at_once)


def _footprint(peak: Peak, held: Held, bucket_px: tuple[int, int], images_at_once: int) -> Footprint:
    parts = {
        **{f"base: {name}": size for name, size in held.base.items()},
        "adapter": sum(held.adapter),
        "optimizer state": sum(held.state),
        "gradients": peak.gradients,
        "activations": peak.activations,
        "workspace": peak.workspace + CUBLAS_BYTES,
        "rounding and fragmentation": 0,
        "CUDA context": CUDA_CONTEXT_BYTES,
    }
    reserved = peak.reserved + CUBLAS_BYTES
    whole = reserved + CUDA_CONTEXT_BYTES
    parts["rounding and fragmentation"] = whole - sum(parts.values())
    return Footprint(parts, whole, peak.allocated + CUBLAS_BYTES, reserved, bucket_px, images_at_once)


def predict_full(config: TrainConfig, facts: BaseFacts) -> Footprint:
    """The same for full fine-tuning of the U-Net in fp32, without an adapter. This tool cannot train that
    way; the prediction is compared with published measurements."""
    bucket = config.size_px
    settings = _traced_settings(config.with_values({"network_type": "LoRA", "conv_dim": None}))
    found = _trace(facts, settings, bucket, is_full=True)
    kind, arguments = config.optimizer_type, config.optimizer_args
    state = [optimizer_bytes(kind, shape, arguments) for shape, _ in found.shapes]
    weights = {"unet": 4 * sum(_count(shape) for shape, _ in found.shapes)}
    held = Held(weights, [], state, [], accumulates(config))
    return _footprint(replay(found, (1, 1), held), held, bucket, config.images_at_once)


# Memory in addition to the traced step


def accumulates(config: TrainConfig) -> bool:
    """Whether gradients are accumulated over micro-batches."""
    return config.gradient_accumulation_steps > 1 or config.images_at_once < config.train_batch_size


def compute_type(config: TrainConfig) -> str:
    """torch's name of the dtype of computation; auto means bf16 here."""
    return {"no": "float32", "fp16": "float16"}.get(config.mixed_precision, "bfloat16")


def base_bytes(config: TrainConfig, facts: BaseFacts) -> dict[str, int]:
    """component → bytes of the frozen networks that stay on the GPU during training."""
    networks = _networks(facts)
    element = 4 if compute_type(config) == "float32" else 2
    found = {"unet": sum(n * _weight_bytes(shape, element, config.fp8_base) for shape, n in networks["unet"])}
    if text_encoders_stay(config):
        for name in FAMILIES[facts.family].text_encoders:
            found[name] = sum(n * _weight_bytes(shape, element, False) for shape, n in networks[name])
    if vae.encodes_anew(config):
        found["vae"] = vae.weight_bytes(config, facts.config("vae"), compute_type(config))
    return found


def network_bytes(facts: BaseFacts, name: str, element_bytes: int) -> int:
    """Bytes of the U-Net or a text encoder, every value in ``element_bytes``."""
    return sum(n * _weight_bytes(shape, element_bytes, False) for shape, n in _networks(facts)[name])


def text_encoders_stay(config: TrainConfig) -> bool:
    """Whether captions are encoded in every step, because a text encoder is trained or captions vary."""
    varied = config.shuffle_caption or config.caption_tag_dropout_rate > 0 or config.enable_wildcard
    return config.trains_text_encoder or (varied and not config.cpu_offload)


def _weight_bytes(tensor: tuple[int, ...], element: int, is_fp8: bool) -> int:
    """Bytes of a weight; in fp8, matrices and kernels have one bf16 scale per output (``trainer.compute.fp8``)."""
    if is_fp8 and len(tensor) >= 2:
        return _count(tensor) + 2 * tensor[0]
    return element * _count(tensor)


@lru_cache(maxsize=8)
def _networks(facts: BaseFacts) -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """component → shapes of its tensors, and how many have each."""

    def compute() -> tuple[Any, Any]:
        found = fresh_tensors(facts)
        return found, found

    def unpack(table: Any) -> Any:
        return {name: [(tuple(shape), int(n)) for shape, n in shapes] for name, shapes in table.items()}

    return store.stored(tensors_question(facts), unpack, compute)


def tensors_question(facts: BaseFacts) -> dict[str, Any]:
    """The question of the store for the shapes of a base's tensors."""
    return {"what": "tensors", **_asked(facts)}


def fresh_tensors(facts: BaseFacts) -> Any:
    """The shapes of a base's tensors, found now."""
    return _loaded_networks().tensor_shapes(facts)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _at_rank(shape: tuple[int, ...], dim: int, conv_dim: int) -> tuple[int, ...]:
    ranks = {DIM: dim, CONV_DIM: conv_dim}
    return tuple(ranks.get(side, side) for side in shape)


# Traces


def _loaded_networks() -> Any:
    """The module ``networks``, with torch and PEFT. PEFT imports bitsandbytes (a second or two) for layers that are
    not used here; it leaves them out if it does not find the package."""
    if "trainer.memory.networks" in sys.modules:
        return sys.modules["trainer.memory.networks"]
    absent = "peft" not in sys.modules and "bitsandbytes" not in sys.modules
    if absent:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    with store.uncollected():
        try:
            import peft.import_utils

            peft.import_utils.is_bnb_available()  # remembers its answer
            peft.import_utils.is_bnb_4bit_available()
        finally:
            if absent:
                del sys.modules["bitsandbytes"]
        from trainer.memory import networks

    return networks


# Settings whose tensors are not proportional to one rank.
_FORMS = (
    "full_matrix",
    "decompose_both",
    "unbalanced_factorization",
    "use_tucker",
    "use_scalar",
)
_OF_ONE_RANK = ("LoRA", "LoCon", "DoRA", "LoHa", "LoRA-FA")
_DECIDES_A_TRACE = (
    "network_type",
    "gradient_checkpointing",
    "full_bf16",
    "fp8_base",
    "text_encoder_frozen",
    "cpu_offload_checkpointing",
    "clip_skip",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "mixed_precision",
    "lycoris_preset",
    "rank_dropout_rows",
    "train_norm",
    "rescaled",
    "oft_blocks",
    "unit",
    *_FORMS,
)
_RANKS = ("block_dims", "conv_block_dims", "dim_from_weights")


def _has_own_ranks(config: TrainConfig) -> bool:
    """Whether the trace is made with the ranks themselves: tensors are not proportional to one rank."""
    return config.network_type not in _OF_ONE_RANK or any(
        getattr(config, name) for name in (*_RANKS, *_FORMS)
    )


def _traced_settings(config: TrainConfig) -> TrainConfig:
    """The settings that affect the sequence of allocations; all others are set to a fixed value."""
    ranks: dict[str, Any] = {"network_dim": DIM}
    if _has_own_ranks(config):
        ranks = {name: getattr(config, name) for name in ("network_dim", "conv_dim", "factor", *_RANKS)}
    elif config.conv_dim:
        ranks["conv_dim"] = CONV_DIM
    elif config.conv_dim == 0:
        ranks["conv_dim"] = 0
    elif config.lycoris_preset:  # LyCORIS' rank of convolutions is that of the others
        ranks["conv_dim"] = DIM
    values = {name: getattr(config, name) for name in _DECIDES_A_TRACE}
    first, second = config.effective_text_encoder_lrs
    values |= {
        "train_batch_size": config.images_at_once,
        "unet_lr": float(config.trains_unet),
        "text_encoder_lr1": float(first > 0),
        "text_encoder_lr2": float(second > 0),
        "network_dropout": 0.5 if config.network_dropout else 0.0,
        "rank_dropout": 0.5 if config.rank_dropout else 0.0,
        "checkpoint_blocks": config.checkpoint_blocks if config.gradient_checkpointing else None,
        "max_token_length": None if config.max_token_length == 75 else config.max_token_length,
        "network_weights": config.network_weights if config.dim_from_weights else "",
    }
    return TrainConfig(**values, **ranks)


def memory_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the memory of a step, as JSON values. Equal ones need the same memory; the rates are 1
    where something is trained, and ``train_batch_size`` counts the images that are computed at once."""
    values = _traced_settings(config).as_dict()
    ranks = {name: getattr(config, name) or 0 for name in ("network_dim", "conv_dim")}
    added = {name: getattr(config, name) for name in ("optimizer_type", "cpu_offload")}
    added |= {"size_px": list(config.size_px)}
    added |= {"optimizer_args": str(config.optimizer_args), "accumulates": accumulates(config)}
    return {**values, **ranks, **added}


def _asked(facts: BaseFacts) -> dict[str, Any]:
    """A base as part of a question to the store; its name makes no difference."""
    return {"family": facts.family, "configs": dict(facts.configs)}


@lru_cache(maxsize=64)
def _trace(
    facts: BaseFacts, config: TrainConfig, bucket_px: tuple[int, int], *, is_full: bool = False
) -> Trace:
    """The trace of these settings (``_traced_settings``), stored or fresh."""

    def compute() -> tuple[Trace, Any]:
        found = _loaded_networks().traced(facts, config, bucket_px, compute_type(config), is_full=is_full)
        return found, as_table(found)

    return store.stored(_step_question(facts, config, bucket_px, is_full), from_table, compute)


def _step_question(
    facts: BaseFacts, config: TrainConfig, bucket_px: tuple[int, int], is_full: bool
) -> dict[str, Any]:
    return {
        "what": "full step" if is_full else "step",
        **_asked(facts),
        "settings": config.as_dict(),
        "bucket_px": list(bucket_px),
    }


def step_question(facts: BaseFacts, config: TrainConfig, bucket_px: tuple[int, int]) -> dict[str, Any]:
    """The question of the store for one step of these settings."""
    return _step_question(facts, _traced_settings(config), bucket_px, is_full=False)


def fresh_step(facts: BaseFacts, config: TrainConfig, bucket_px: tuple[int, int]) -> dict[str, Any]:
    """The trace of one step of these settings as a JSON table, traced now."""
    asked = _traced_settings(config)
    return as_table(_loaded_networks().traced(facts, asked, bucket_px, compute_type(asked)))
