"""LoRA files: written with kohya's and LyCORIS' keys, read and attached (``attaching``), continued by training.

Owns what is written, and how training begins with a file; see ``metadata`` for the metadata. The file holds what was
scored, since the adapter is rounded to the save precision first.  docs/adapters.md says which program reads what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters import private
from trainer.adapters.adapter import SAVE_DTYPES, Adapter, inject
from trainer.adapters.attaching import Attached as Attached
from trainer.adapters.attaching import LoraFile as LoraFile
from trainer.adapters.attaching import attach as attach
from trainer.adapters.attaching import parts_of as parts_of
from trainer.adapters.attaching import read as read
from trainer.adapters.contents import listed
from trainer.adapters.kinds import SCALAR
from trainer.adapters.magnitude import MAGNITUDE
from trainer.adapters.metadata import least, own_metadata, training_metadata
from trainer.adapters.start import check_start
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.tensorfile import to_bytes
from trainer.text import clean_text

CONSTANTS = ("alpha", "on_input")
EXACT = (*CONSTANTS, MAGNITUDE)  # fp32: half types cannot hold every alpha, and magnitudes nearly cancel


def write(
    path: Path,
    adapter: Adapter,
    config: TrainConfig,
    more: Mapping[str, str] | None = None,
    *,
    note: Path | None = None,
) -> None:
    """Write the adapter as kohya's networks.lora or LyCORIS would, atomically.  Weights in save_precision,
    alphas and magnitudes in fp32.  The bytes depend on weights, settings and metadata only, not on time.
    ``more`` is metadata beside the settings, as ``dataset_metadata``.  No path of this machine gets into the
    file, since files are shared; one with a ``note`` (no_metadata) says only what it is, and the note says the rest.
    The note is written first: a kill between the two leaves no file that nothing is known of."""
    dtype = SAVE_DTYPES[config.save_precision]
    tensors = {
        key: tensor if key.endswith(EXACT) else tensor.to(dtype).contiguous()
        for key, tensor in _with_unit_scales(adapter.saved()).items()
    }
    training, own = (
        {**training_metadata(adapter.base, config), **(more or {})},
        own_metadata(adapter.base, config),
    )
    whole = {**training, **own}
    if note is not None:
        training, own = least(training), least(own)
    content = to_bytes(tensors, {**training, **_file_hashes(tensors, training), **own})
    if note is not None:
        private.keep(note, path.name, content, whole)
    write_atomic(path, content)


def begin(base: Base, config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> Adapter:
    """The adapter that training begins with: a fresh one, or the weights of network_weights.

    Modules that are not in the file begin as new, as in sd-scripts (networks/lora.py: load_weights); ``say`` gets a
    line about them. Raises ConfigError if the file has another kind, modules that are not trained, or other ranks or
    alphas than the settings. Nothing is padded or cut.
    """
    if not config.network_weights:
        return inject(base, config)
    name = clean_text(Path(config.network_weights).name)
    check_start(config, base.family)
    given = attach(base, read(Path(config.network_weights)), cores=config.use_tucker)
    state = given.state()
    given.remove()
    adapter = inject(base, config)
    try:
        wanted = adapter.state()
        if config.dim_from_weights:  # it also tells modules that are not trained
            keys = {layer.target.key for layer in adapter.layers}
            state = {key: tensor for key, tensor in state.items() if key.partition(".")[0] in keys}
        state = _as_trained(adapter, state)
        if config.network_type == "DoRA":  # saved with alpha = rank, the rest of its scale in lora_up
            for key in [key for key in wanted if key.endswith(".alpha") and key in state]:
                up = key.removesuffix("alpha") + "lora_up.weight"
                state[up] = state[up] * (state[key] / wanted[key])
                state[key] = wanted[key]
        new = _modules(wanted) - _modules(state)
        if new and new != _modules(wanted):
            state |= {key: tensor for key, tensor in wanted.items() if key.partition(".")[0] in new}
            count = "1 module begins" if len(new) == 1 else f"{len(new)} modules begin"
            say(
                f"network_weights {name}: {count} as new, because the file does not have them: {listed(sorted(new))}"
            )
        other = sorted(wanted.keys() ^ state.keys())
        if other:
            raise ConfigError(
                f"network_weights {name} has other tensors than these settings train: {listed(other)}",
                "set network_type, network_dim, conv_dim, factor … to what hpo inspect shows of it",
            )
        unequal = [
            f"{key} {_size(state[key])} instead of {_size(wanted[key])}"
            for key in wanted
            if not key.endswith(f".{SCALAR}") and _size(state[key]) != _size(wanted[key])
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


def _modules(state: Mapping[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key in state}


def _as_trained(adapter: Adapter, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in the parts that training has: DyLoRA's units, and the scalar of use_scalar."""
    found = dict(state)
    for layer in adapter.layers:
        start = f"{layer.target.key}."
        wanted = {ending: layer.weights[ending] for ending in layer.weights}
        if SCALAR not in wanted and layer.kind.endings:
            continue
        given = {key.removeprefix(start): found.pop(key) for key in [*found] if key.startswith(start)}
        constants = {ending: value for ending, value in given.items() if ending in CONSTANTS}
        tensors = {ending: value for ending, value in given.items() if ending not in CONSTANTS}
        try:
            parts = layer.kind.unfolded(tensors, wanted)
        except (KeyError, ValueError):
            parts = tensors
        found |= {start + ending: value for ending, value in (parts | constants).items()}
    return found


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
