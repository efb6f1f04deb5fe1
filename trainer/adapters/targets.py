"""Targets: which modules of a base get an adapter, of which rank and alpha, and at which share of the rate.

Owns the choice.  Putting adapters there is ``adapter``'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from trainer.adapters.kinds import kernel_size, kind_of
from trainer.adapters.presets import chosen, preset_of
from trainer.bases import Base, BlockRates, block_rates
from trainer.config import TrainConfig

_BLOCK = re.compile(
    r"lora_unet_(?:(?P<old>down|up)_blocks_(?P<i>\d+)_(?P<what>resnets|attentions|downsamplers|upsamplers)_(?P<j>\d+)"
    r"|(?P<sgm>input|middle|output)_blocks?_(?P<n>\d+)|mid_block)_"
)


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter.  ``key`` is its name in kohya's files, ``rate`` multiplies the
    rate of its component."""

    component: str
    path: str
    key: str
    rank: int
    alpha: float
    kind: str = "LoRA"
    rate: float = 1.0


def targets_of(base: Base, config: TrainConfig) -> list[Target]:
    """The modules that these settings train, in module order: those of sd-scripts' ``networks.lora``, or of a preset of
    LyCORIS."""
    wanted = {component for component in base.components() if _is_trained(component, config)}
    named = _of_preset(base, config) if config.lycoris_preset else _of_networks_lora(base, config)
    targets = [_with_own_alpha(base, config, target) for target in named if target.component in wanted]
    rates = block_rates(config, base.family)
    if rates is None:
        return targets
    rated = [replace(t, rate=block_rate(rates, t.key)) if t.component == "unet" else t for t in targets]
    return [target for target in rated if target.rate > 0]


def _of_networks_lora(base: Base, config: TrainConfig) -> Iterator[Target]:
    for component, names in base.lora_names().items():
        for path, key in names.items():
            yield Target(component, path, key, config.network_dim, config.network_alpha, config.network_type)
    if config.conv_dim is not None:
        for path, key in base.conv_names()["unet"].items():
            found = _ranked("unet", path, key, base.unet.get_submodule(path), config, config.conv_dim)
            if found is not None:
                yield found


def _of_preset(base: Base, config: TrainConfig) -> Iterator[Target]:
    """As LyCORIS: the rank of 3×3 convolutions is network_dim unless conv_dim is given."""
    preset = preset_of(config.lycoris_preset)
    conv_dim = config.network_dim if config.conv_dim is None else config.conv_dim
    for it in chosen(base, preset):
        key = base.key_of(it.component, it.path)
        found = _ranked(it.component, it.path, key, it.module, config, conv_dim * preset.enable_conv)
        if found is not None:
            yield found


def _ranked(
    component: str, path: str, key: str, module: nn.Module, config: TrainConfig, conv_dim: int
) -> Target | None:
    """A target with its rank and alpha; None for a 3×3 convolution of rank 0, and for a norm."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    if kernel_size(module) == 1:
        return Target(component, path, key, config.network_dim, config.network_alpha, config.network_type)
    if conv_dim == 0:
        return None
    conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
    return Target(component, path, key, conv_dim, conv_alpha, config.network_type)


def count_weights(base: Base, config: TrainConfig) -> int:
    """The number of trainable values of these settings, without creating the adapter."""
    count = 0
    for target in targets_of(base, config):
        layer = base.components()[target.component].get_submodule(target.path)
        count += sum(math.prod(shape) for shape in kind_of(config).shapes(layer, target.rank).values())
        if target.kind == "DoRA":
            count += layer.weight.shape[1]  # one magnitude per input (column_norm)
    return count


def block_rate(rates: BlockRates, key: str) -> float:
    """The multiplier of a U-Net module by its kohya key (sd-scripts networks/lora.py, get_block_index).

    SD1.5: down block i, layer j is number 1 + 3i + j (samplers j = 2) – number 0 is conv_in, which has no
    LoRA – and up block i, layer j number 3i + j.  SDXL: the numbers of sgm's names.
    """
    found = _BLOCK.match(key)
    if found is None:  # conv_in, conv_out, time_embedding
        return 1.0
    if found["sgm"]:
        table = {"input": rates.down, "middle": rates.mid, "output": rates.up}[found["sgm"]]
        return table[int(found["n"])]
    if not found["old"]:
        return rates.mid[0]
    layer = 2 if found["what"].endswith("samplers") else int(found["j"])
    number = 3 * int(found["i"]) + layer
    return rates.down[1 + number] if found["old"] == "down" else rates.up[number]


def _is_trained(component: str, config: TrainConfig) -> bool:
    if component == "unet":
        return config.trains_unet
    return config.effective_text_encoder_lrs[component == "text_encoder_2"] > 0


def _with_own_alpha(base: Base, config: TrainConfig, target: Target) -> Target:
    """A target with the alpha that its kind of adapter has for these settings."""
    layer = base.components()[target.component].get_submodule(target.path)
    return replace(target, alpha=kind_of(config).alpha(layer, target.rank, target.alpha))
