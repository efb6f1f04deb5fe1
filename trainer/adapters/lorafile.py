"""LoRA files: written with kohya's and LyCORIS' keys, read and attached (``attaching``), continued by training.

Owns what is written, and how training begins with a file; see ``metadata`` for the metadata. The file holds what was
scored, since the adapter is rounded to the save precision first.  docs/adapters.md says which program reads what.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.adapter import MAGNITUDE, SAVE_DTYPES, Adapter, inject
from trainer.adapters.attaching import Attached as Attached
from trainer.adapters.attaching import LoraFile as LoraFile
from trainer.adapters.attaching import attach as attach
from trainer.adapters.attaching import read as read
from trainer.adapters.contents import DORA, LOCON, LORA, listed
from trainer.adapters.metadata import own_metadata, training_metadata
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.settings import NETWORK_TYPES
from trainer.tensorfile import to_bytes
from trainer.text import clean_text

EXACT = ("alpha", MAGNITUDE)  # kept in fp32: half types cannot hold every alpha, and magnitudes nearly cancel


def write(path: Path, adapter: Adapter, config: TrainConfig, more: Mapping[str, str] | None = None) -> None:
    """Write the adapter as kohya's networks.lora or LyCORIS would, atomically.  Weights in save_precision,
    alphas and magnitudes in fp32.  The bytes depend on weights, settings and metadata only, not on time.
    ``more`` is metadata beside the settings, as ``dataset_metadata``.  No path of this machine gets into the
    file, since files are shared."""
    dtype = SAVE_DTYPES[config.save_precision]
    tensors = {
        key: tensor if key.endswith(EXACT) else tensor.to(dtype).contiguous()
        for key, tensor in _with_unit_scales(adapter.state()).items()
    }
    training = {**training_metadata(adapter.base, config), **(more or {})}
    hashes = _file_hashes(tensors, training)
    write_atomic(path, to_bytes(tensors, {**training, **hashes, **own_metadata(adapter.base, config)}))


def begin(base: Base, config: TrainConfig) -> Adapter:
    """The adapter that training begins with: a fresh one, or the weights of network_weights.

    Raises ConfigError if the file has another kind, other modules, ranks or alphas than the settings. Nothing is padded
    or cut.
    """
    if not config.network_weights:
        return inject(base, config)
    name = clean_text(Path(config.network_weights).name)
    file = read(Path(config.network_weights))
    _check_kind(name, file, config)
    given = attach(base, file)
    state = given.state()
    given.remove()
    adapter = inject(base, config)
    try:
        wanted = adapter.state()
        if config.network_type == "DoRA":  # saved with alpha = rank, the rest of its scale in lora_up
            for key in [key for key in wanted if key.endswith(".alpha") and key in state]:
                up = key.removesuffix("alpha") + "lora_up.weight"
                state[up] = state[up] * (state[key] / wanted[key])
                state[key] = wanted[key]
        other = sorted(wanted.keys() ^ state.keys())
        if other:
            raise ConfigError(
                f"network_weights {name} has other tensors than these settings train: {listed(other)}",
                "set network_type, network_dim, conv_dim, factor … to what hpo inspect shows of it",
            )
        unequal = [
            f"{key} {_size(state[key])} instead of {_size(wanted[key])}"
            for key in wanted
            if _size(state[key]) != _size(wanted[key])
        ]
        if unequal:
            raise ConfigError(
                f"network_weights {name} has another rank or alpha than these settings: {listed(unequal)}",
                "set network_dim, network_alpha, conv_dim and conv_alpha to what hpo inspect shows of it",
            )
        adapter.load_state(state)
    except BaseException:
        adapter.remove()
        raise
    return adapter


def _check_kind(name: str, file: LoraFile, config: TrainConfig) -> None:
    """ConfigError for a file of a kind that these settings do not train."""
    alike = {LOCON: LORA}
    wanted = alike.get(config.network_type, config.network_type)
    counts = Counter(alike.get(kind, kind) for kind in file.contents.kinds.values())
    others = [f"{kind} ({count} modules)" for kind, count in counts.items() if kind != wanted]
    if others:
        trained = file.contents.kind.split(" ")[0]
        hint = (
            f"set network_type = {trained}"
            if len(counts) == 1 and trained in NETWORK_TYPES
            else (
                "start from a file of one kind that network_type can be, or merge this one into the base model first"
            )
        )
        raise ConfigError(
            f"network_weights {name} holds {', '.join(others)}; network_type is {config.network_type}", hint
        )
    decomposed = (
        tensor
        for key, tensor in file.tensors.items()
        if key.endswith((MAGNITUDE, "lora_magnitude_vector.weight"))
    )
    if config.network_type == DORA and any(tensor.shape[0] != 1 for tensor in decomposed):
        raise ConfigError(
            f"network_weights {name} has DoRA magnitudes per output, and this tool trains them per input",
            "train it again from the start, or go on with the tool that made it",
        )


def _size(tensor: Tensor) -> tuple[int, ...] | float:
    """A weight's shape, or an alpha's value."""
    return tuple(tensor.shape) if tensor.dim() else round(float(tensor), 4)


def _with_unit_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose DoRA modules have alpha = rank and their scale in lora_up: A1111 scales after the
    magnitude, the others before it, and a scale of 1 is the same for all."""
    tensors = dict(state)
    for name in state:
        if not name.endswith(f".{MAGNITUDE}"):
            continue
        key = name.removesuffix(f".{MAGNITUDE}")
        rank = float(state[f"{key}.lora_down.weight"].shape[0])
        alpha = float(state[f"{key}.alpha"])
        if alpha != rank:
            tensors[f"{key}.lora_up.weight"] = state[f"{key}.lora_up.weight"] * (alpha / rank)
            tensors[f"{key}.alpha"] = torch.tensor(rank)
    return tensors


def _file_hashes(tensors: dict[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash over the tensors' bytes, sshs_legacy_hash over 64 KiB at 1 MiB, both of a file that has
    only ss_* metadata (sd-scripts library/train_util.py, precalculate_safetensors_hashes)."""
    content = to_bytes(tensors, {k: v for k, v in training.items() if k.startswith("ss_")})
    header = int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[8 + header :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
