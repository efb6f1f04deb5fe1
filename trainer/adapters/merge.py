"""base_weights: LoRA files that become part of the base before training.

Owns the merge and the base's new identity.  As in sd-scripts (train_network.py, ``base_weights``) each file is added
with its multiplier, in fp32, and rounded to the type of the base.  The trained LoRA does not contain them: to use it as
it was trained, merge the same files first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters import lorafile
from trainer.adapters.adapter import Layer
from trainer.adapters.magnitude import MAGNITUDE, column_norm, row_norm
from trainer.bases import Base
from trainer.compute import weight_of
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.oom import memory_named
from trainer.paths import user_path
from trainer.text import clean_text


def base_weights(config: TrainConfig) -> list[tuple[Path, float]]:
    """The files to merge, each with its multiplier; missing multipliers are 1, as in sd-scripts.  Raises ConfigError
    for a multiplier that is not a finite number, or a path of another system."""
    paths = [Path(user_path(part, "base_weights")) for part in config.base_weights.split(";") if part.strip()]
    multipliers = [part.strip() for part in config.base_weights_multiplier.split(",") if part.strip()]
    try:
        numbers = [float(part) for part in multipliers]
        are_finite = all(map(math.isfinite, numbers))
    except ValueError:
        are_finite = False
    if not are_finite:
        raise ConfigError(
            f"base_weights_multiplier = {clean_text(config.base_weights_multiplier)[:40]} is not a list of numbers",
            "write for example 1,0.5",
        )
    return [(path, numbers[n] if n < len(numbers) else 1.0) for n, path in enumerate(paths)]


def merge_base_weights(base: Base, config: TrainConfig, say: Callable[[str], None] = lambda _: None) -> None:
    """Merge the files of ``base_weights`` into a base that was just loaded.  Its identity changes, so that nothing
    computed with other weights is taken for its own.  Raises ModelFileError for a file that does not fit."""
    files = [(lorafile.read(path), multiplier) for path, multiplier in base_weights(config)]
    for file, multiplier in files:
        with memory_named(f"out of memory while merging {file.path.name} into {base.name}"):
            _merge(base, file, multiplier)
        say(f"merged {clean_text(file.path.name)} into the base, strength {multiplier:g}")


def _merge(base: Base, file: lorafile.LoraFile, multiplier: float) -> None:
    """Add the change of one file, layer by layer: all changes of SDXL together would be 10 GB."""
    adapter = lorafile.attach(base, file)
    try:
        others = [*adapter.differences]
        changed_twice = {id(layer) for layer, _ in others}
        kept = []
        with torch.no_grad():
            for layer in adapter.layers:
                own, change = layer.wrapped.base_layer, _change(layer)
                if id(own) in changed_twice:  # its difference comes first
                    kept.append((own, change))
                else:
                    _add(own.weight, change, multiplier)
    finally:
        adapter.remove()
    for own, difference in others:
        _add(own.weight, difference.weight, multiplier)
        _add(own.bias, difference.bias, multiplier)
    for own, change in kept:
        _add(own.weight, change, multiplier)
    digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
    base.identity = hashlib.sha256(f"{base.identity}+{multiplier:g}×{digest}".encode()).hexdigest()


def _add(own: Tensor | None, change: Tensor | None, multiplier: float) -> None:
    """Add a change to a parameter; a bias that a layer does not have stays away."""
    if own is not None and change is not None:
        added = own.detach().float() + multiplier * change.to(own.device).reshape(own.shape)
        own.data.copy_(added.to(own.dtype))


def _change(layer: Layer) -> Tensor:
    """W' − W of a module, fp32."""
    weight = weight_of(layer.wrapped.base_layer).float()
    delta = layer.delta().float().reshape(weight.shape)
    magnitude = layer.weights.get(MAGNITUDE)
    if magnitude is None:
        return delta
    norm = column_norm(weight + delta) if magnitude.shape[0] == 1 else row_norm(weight + delta)
    return (weight + delta) * magnitude / norm.clamp(min=torch.finfo(torch.float32).eps) - weight
