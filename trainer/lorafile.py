"""LoRA files: kohya's keys and metadata out; kohya's and diffusers' names in.

Owns the file format only.  What is in the file is what was scored: the adapter is rounded to the save
precision before, and every setting travels in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer import optim
from trainer.adapter import SAVE_DTYPES, Adapter, Target
from trainer.bases.base import Base
from trainer.config import TrainConfig
from trainer.dataset import Dataset
from trainer.errors import ModelFileError
from trainer.files import clean_text, write_atomic
from trainer.loop import plan
from trainer.tensorfile import load_tensors, read_header, to_bytes

CONFIG_KEY = "lora_hpo_config"
SHOWN_KEYS = 5  # how many keys an error names
HALVES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: its tensors under the file's own names, its metadata, and the family it is for."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    family: str


def write(
    path: Path,
    adapter: Adapter,
    base: Base,
    config: TrainConfig,
    extra_metadata: Mapping[str, str] | None = None,
    dataset: Dataset | None = None,
) -> None:
    """Write the adapter as kohya's networks.lora would, atomically.  Weights in save_precision, alphas in
    fp32 (half types cannot hold every alpha).  The bytes depend on weights, settings and metadata only, not
    on time.  With the ``dataset`` the metadata says how long it was trained on which tags.  No path of this
    machine gets into the file, since files are shared."""
    dtype = SAVE_DTYPES[config.save_precision]
    tensors = {
        key: tensor if key.endswith(".alpha") else tensor.to(dtype).contiguous()
        for key, tensor in adapter.state().items()
    }
    training = {
        **training_metadata(base, config),
        **(dataset_metadata(config, dataset) if dataset else {}),
        **(extra_metadata or {}),
    }
    metadata = {
        **training,
        **_file_hashes(tensors, training),
        **_modelspec(base, config),
        CONFIG_KEY: json.dumps(
            config.as_dict() | {"pretrained_model_name_or_path": base.name, "train_data_dir": ""}
        ),
        "lora_hpo_base": base.identity,
    }
    write_atomic(path, to_bytes(tensors, metadata))


def training_metadata(base: Base, config: TrainConfig) -> dict[str, str]:
    """sd-scripts' ss_* entries: readers choose the family by ss_base_model_version and show the rest."""
    conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
    conv = {} if config.conv_dim is None else {"conv_dim": config.conv_dim, "conv_alpha": conv_alpha}
    values = {
        "ss_v2": False,
        "ss_base_model_version": base.kohya_base_version,
        "ss_sd_model_name": base.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha,
        "ss_network_dropout": config.network_dropout,
        "ss_network_args": json.dumps({name: str(value) for name, value in conv.items()}),
        "ss_output_name": config.output_name,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.effective_unet_lr,
        "ss_text_encoder_lr": config.effective_text_encoder_lr,
        "ss_optimizer": config.optimizer_type,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_max_train_steps": config.max_train_steps,
        "ss_num_epochs": config.max_train_epochs,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": config.seed,
        "ss_clip_skip": config.clip_skip,
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_noise_offset": config.noise_offset,
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_enable_bucket": config.enable_bucket,
        "ss_shuffle_caption": config.shuffle_caption,
        "ss_keep_tokens": config.keep_tokens,
    }
    return {name: str(value) for name, value in values.items()}


def dataset_metadata(config: TrainConfig, dataset: Dataset) -> dict[str, str]:
    """sd-scripts' ss_* entries that depend on the images: the run's length in steps, and how often each tag
    is in the captions of a folder."""
    length = plan(config, dataset)
    tags: dict[str, Counter[str]] = {}
    for item in dataset.items:
        words = (tag.strip().lower() for tag in item.caption.split(","))
        tags.setdefault(item.path.parent.name, Counter()).update(word for word in words if word)
    values = {
        "ss_num_train_images": sum(item.repeats for item in dataset.items),
        "ss_max_train_steps": length.total_steps,
        "ss_steps": length.total_steps,
        "ss_num_epochs": length.total_epochs,
        "ss_epoch": length.total_epochs,
        "ss_lr_warmup_steps": optim.warmup_steps(config, length.total_steps),
        "ss_tag_frequency": json.dumps(tags, sort_keys=True),
    }
    return {name: str(value) for name, value in values.items()}


def read(path: Path) -> LoraFile:
    """A LoRA file, header checked first.  Anything that is not one is refused."""
    header = read_header(path)
    foreign = [name for name in header.shapes if _half(name) is None]
    if foreign or not header.shapes:
        raise ModelFileError(
            f"{path} holds more than a LoRA: {_listed(foreign)}" if foreign else f"{path} holds no tensors",
            "LoHa, LoKr, DoRA and full models cannot be attached",
        )
    tensors = load_tensors(path)
    return LoraFile(path, tensors, header.metadata, _family(header.metadata, header.shapes))


def attach(base: Base, file: LoraFile) -> Adapter:
    """Put a LoRA file into a base.  Every key must fit a module of the base, with both halves and equal
    shapes."""
    if file.family != base.family:
        raise ModelFileError(
            f"{file.path.name} is a LoRA for {file.family}, the base {base.name} is {base.family}",
            "use it with a base of its own family",
        )
    known = _known_names(base)
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        ending = _half(name)
        assert ending is not None
        module = name.removesuffix(ending)
        if module in known:
            if found.setdefault(module, {}).setdefault(HALVES[ending], tensor) is not tensor:
                raise _damaged(file, f"it has {module} twice")
        else:
            unknown.append(name)
    unknown += [module for module, parts in found.items() if not {"down", "up"} <= parts.keys()]
    targets: list[Target] = []
    weights: dict[str, Tensor] = {}
    for module, parts in found.items():
        component, path, key = known[module]
        if {"down", "up"} <= parts.keys():
            if any(target.key == key for target in targets):
                raise _damaged(file, f"it has {key} twice, under two names")
            rank, alpha = _rank_and_alpha(file, module, parts)
            targets.append(Target(component, path, key, rank, alpha))
            weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"] = parts["down"], parts["up"]
            if not _fits(base.components()[component].get_submodule(path).weight, parts["down"], parts["up"]):
                unknown.append(f"{module} {tuple(parts['down'].shape)}")
    if unknown:
        raise ModelFileError(
            f"{len(unknown)} entries of {file.path.name} do not fit {base.name}: {_listed(unknown)}",
            "the file is partial, of another kind, or for another base",
        )
    return Adapter(base, targets, weights)


def _known_names(base: Base) -> dict[str, tuple[str, str, str]]:
    """Every name a file may use for a module → (component, path, kohya key): kohya's, diffusers' with
    underscores under kohya's prefix (some SDXL writers), and diffusers' dotted."""
    known: dict[str, tuple[str, str, str]] = {}
    for table in (base.lora_names(), base.conv_names()):
        for component, names in table.items():
            for path, key in names.items():
                entry = (component, path, key)
                known[f"{component}.{path}"] = entry
                if component == "unet":
                    known["lora_unet_" + path.replace(".", "_")] = entry
                else:
                    known[f"{component}.text_model.{path.removeprefix('text_model.')}"] = entry
                known[key] = entry
    return known


def _half(name: str) -> str | None:
    """The ending of a LoRA tensor's name, or None if it has none of a LoRA's endings."""
    return next((ending for ending in HALVES if name.endswith(ending)), None)


def _family(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sd15 or sdxl: by kohya's metadata, else by names that only SDXL has, else by the text width it
    reads."""
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sdxl"):
        return "sdxl"
    if version.startswith("sd_v1"):
        return "sd15"
    marks = (
        "lora_te1_",
        "lora_te2_",
        "text_encoder_2.",
        "_input_blocks_",
        "_middle_block_",
        "_output_blocks_",
    )
    if any(mark in name for name in shapes for mark in marks):
        return "sdxl"
    # proj_in is a convolution in SD1.5 and linear in SDXL; cross-attention reads 768 or 2048 wide states
    downs = {name: shape for name, shape in shapes.items() if HALVES.get(_half(name) or "") == "down"}
    widths = {shape[-1] for name, shape in downs.items() if "attn2" in name and "to_k" in name}
    flat = any("proj_in" in name and len(shape) == 2 for name, shape in downs.items())
    return "sdxl" if flat or 2048 in widths else "sd15"


def _rank_and_alpha(file: LoraFile, module: str, parts: Mapping[str, Tensor]) -> tuple[int, float]:
    """Rank and alpha of a module, or ModelFileError: numbers that a file may hold wrongly in any way.  Alpha
    0 or none means the rank, as in sd-scripts."""
    down, up = parts["down"], parts["up"]
    if down.dim() not in (2, 4) or up.dim() != down.dim() or down.numel() == 0 or up.numel() == 0:
        raise _damaged(file, f"{module} has halves {tuple(down.shape)} and {tuple(up.shape)}")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise _damaged(file, f"{module} is not of floating-point numbers")
    if not all(bool(half.float().isfinite().all()) for half in (down, up)):
        raise _damaged(file, f"{module} is not finite")
    rank = int(down.shape[0])
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise _damaged(file, f"{module} has {parts['alpha'].numel()} alphas")
    alpha = float(parts["alpha"]) if "alpha" in parts else _default_alpha(file, module, rank)
    if not math.isfinite(alpha):
        raise _damaged(file, f"{module} has alpha {alpha}")
    return rank, alpha or float(rank)


def _default_alpha(file: LoraFile, module: str, rank: int) -> float:
    """Alpha of a module that has no alpha tensor: PEFT's settings in diffusers' metadata, else the rank
    (scale 1)."""
    try:
        settings = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        component, _, path = module.partition(".")
        pattern = settings.get(f"{component}.alpha_pattern") or {}
        return float(pattern.get(path, settings.get(f"{component}.lora_alpha", rank)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _damaged(file, f"its lora_adapter_metadata gives {module} no alpha") from None


def _damaged(file: LoraFile, why: str) -> ModelFileError:
    return ModelFileError(f"{file.path.name} cannot be attached: {why}", "make or download it again")


def _fits(weight: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether two halves belong to a weight of this shape."""
    rank = down.shape[0]
    if weight.dim() == 2:
        return down.shape == (rank, weight.shape[1]) and up.shape == (weight.shape[0], rank)
    return down.shape == (rank, *weight.shape[1:]) and up.shape == (weight.shape[0], rank, 1, 1)


def _file_hashes(tensors: dict[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash over the tensors' bytes, sshs_legacy_hash over 64 KiB at 1 MiB, both of a file that
    has only ss_* metadata (sd-scripts library/train_util.py, precalculate_safetensors_hashes)."""
    content = to_bytes(tensors, {k: v for k, v in training.items() if k.startswith("ss_")})
    header = int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[8 + header :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _modelspec(base: Base, config: TrainConfig) -> dict[str, str]:
    """The entries that modelspec 1.0.1 requires, and the prediction type."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.kohya_architecture,
        "modelspec.implementation": base.kohya_implementation,
        "modelspec.title": config.output_name,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.prediction_type": base.prediction_type,
    }


def _listed(names: list[str]) -> str:
    """The first names of a list, shortened: a hostile file may hold very long ones."""
    shown = ", ".join(clean_text(name[:120]) for name in names[:SHOWN_KEYS])
    return shown + (" …" if len(names) > SHOWN_KEYS else "")
