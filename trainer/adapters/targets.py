"""Targets: which modules of a base get an adapter, of which rank and alpha, and at which share of the rate.

Owns the choice.  Putting adapters there is ``adapter``'s.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from trainer.adapters.kinds import kernel_size, kind_of
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
    """The modules that sd-scripts' ``networks.lora`` would train with these settings, in module order."""
    wanted = {component for component in base.components() if _is_trained(component, config)}
    kind = config.network_type
    targets = [
        Target(component, path, key, config.network_dim, config.network_alpha, kind)
        for component, names in base.lora_names().items()
        if component in wanted
        for path, key in names.items()
    ]
    if config.conv_dim is not None and "unet" in wanted:
        conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
        for path, key in base.conv_names()["unet"].items():
            wide = kernel_size(base.unet.get_submodule(path)) > 1
            rank, alpha = (
                (config.conv_dim, conv_alpha) if wide else (config.network_dim, config.network_alpha)
            )
            targets.append(Target("unet", path, key, rank, alpha, kind))
    targets = [_with_own_alpha(base, config, target) for target in targets]
    rates = block_rates(config, base.family)
    if rates is None:
        return targets
    rated = [replace(t, rate=block_rate(rates, t.key)) if t.component == "unet" else t for t in targets]
    return [target for target in rated if target.rate > 0]


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
    assert found is not None, f"{key} lies in no block"
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
