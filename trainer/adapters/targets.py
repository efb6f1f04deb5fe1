"""Targets: which modules of a base get an adapter, of which rank and alpha, and at which share of the rate.

Owns the choice.  Putting adapters there is ``adapter``'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from trainer.adapters.choice import kind_for
from trainer.adapters.kinds import kernel_size
from trainer.adapters.presets import PRESETS, chosen, preset_of
from trainer.bases import FAMILIES, Base, BlockRanks, BlockRates, block_ranks, block_rates
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.text import clean_text

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
    if config.dim_from_weights:
        targets = [target for target in _of_weights(base, config) if target.component in wanted]
    else:
        named = _of_preset(base, config) if config.lycoris_preset else _of_networks_lora(base, config)
        targets = [_with_own_alpha(base, config, target) for target in named if target.component in wanted]
    return _rated(targets, block_rates(config, base.family))


def trained_targets(base: Base, config: TrainConfig) -> list[Target]:
    """``targets_of`` a run, which trains something.  Raises ConfigError if there are none."""
    targets = targets_of(base, config)
    if not targets:
        raise _nothing_trained(config)
    return targets


def _nothing_trained(config: TrainConfig) -> ConfigError:
    if config.lycoris_preset and not config.dim_from_weights:
        return ConfigError(
            f"lycoris_preset = {clean_text(config.lycoris_preset)[:200]} names no module that is trained here",
            "name modules in unet_target_module or unet_target_name, or use preset=full",
        )
    return ConfigError("nothing is trained: every rate is 0", "set unet_lr or text_encoder_lr above 0")


def _rated(targets: list[Target], rates: BlockRates | None) -> list[Target]:
    """Without the modules of blocks that are not trained."""
    if rates is None:
        return targets
    rated = [replace(t, rate=block_rate(rates, t.key)) if t.component == "unet" else t for t in targets]
    return [target for target in rated if target.rate > 0]


def _of_weights(base: Base, config: TrainConfig) -> list[Target]:
    """The modules of network_weights, at their ranks and alphas (sd-scripts dim_from_weights)."""
    from trainer.adapters import lorafile  # imports this module

    found, _ = lorafile.parts_of(base, lorafile.read(Path(config.network_weights)))
    same = {"LoRA", "LoCon"}
    for target in found:
        if target.kind != config.network_type and not {target.kind, config.network_type} <= same:
            raise ConfigError(
                f"network_weights holds {target.kind}, but network_type = {config.network_type}",
                f"set network_type = {target.kind}",
            )
    return [replace(target, kind=config.network_type) for target in found]


def _of_networks_lora(base: Base, config: TrainConfig) -> Iterator[Target]:
    ranks = block_ranks(config, base.family)
    for component, names in base.lora_names().items():
        blocks = ranks if component == "unet" else None
        for path, key in names.items():
            found = _ranked(component, path, key, base, config, blocks, 0)
            if found is not None:
                yield found
    if config.conv_dim is not None or (ranks is not None and ranks.conv_dims is not None):
        for path, key in base.conv_names()["unet"].items():
            found = _ranked("unet", path, key, base, config, ranks, config.conv_dim or 0)
            if found is not None:
                yield found
    if config.train_norm:
        around = PRESETS["attn-mlp" if config.conv_dim is None else "full"]
        for it in chosen(base, around):
            if isinstance(it.module, nn.GroupNorm | nn.LayerNorm):
                yield Target(it.component, it.path, base.key_of(it.component, it.path), 1, 1.0, "Norm")


def _of_preset(base: Base, config: TrainConfig) -> Iterator[Target]:
    """As LyCORIS: the rank of 3×3 convolutions is network_dim unless conv_dim is given."""
    preset = preset_of(config.lycoris_preset)
    conv_dim = config.network_dim if config.conv_dim is None else config.conv_dim
    for it in chosen(base, preset):
        key = base.key_of(it.component, it.path)
        found = _ranked(it.component, it.path, key, base, config, None, conv_dim * preset.enable_conv)
        if found is not None:
            yield replace(found, alpha=float(it.on_input)) if found.kind == "IA3" else found


def _ranked(
    component: str,
    path: str,
    key: str,
    base: Base,
    config: TrainConfig,
    ranks: BlockRanks | None,
    conv_dim: int,
) -> Target | None:
    """A target with its rank and alpha; None for rank 0, and for a norm."""
    module = base.components()[component].get_submodule(path)
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return Target(component, path, key, 1, 1.0, "Norm") if config.train_norm else None
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    is_wide = kernel_size(module) > 1
    if ranks is not None:
        rank, alpha = ranks.of(_block_number(base.family, key), is_wide=is_wide)
    elif is_wide:
        rank, alpha = conv_dim, config.network_alpha if config.conv_alpha is None else config.conv_alpha
    else:
        rank, alpha = config.network_dim, config.network_alpha
    # alpha 0 means the rank, as in sd-scripts
    return Target(component, path, key, rank, alpha or float(rank), config.network_type) if rank else None


def count_weights(base: Base, config: TrainConfig) -> int:
    """The number of trainable values of these settings, without creating the adapter."""
    count = 0
    for target in targets_of(base, config):
        layer = base.components()[target.component].get_submodule(target.path)
        kind = kind_for(config, target)
        shapes = kind.shapes(layer, target.rank)
        count += sum(math.prod(shape) for ending, shape in shapes.items() if ending not in kind.frozen)
        if target.kind == "DoRA":
            count += layer.weight.shape[1]  # one magnitude per input (column_norm)
    return count


def block_rate(rates: BlockRates, key: str) -> float:
    """The multiplier of a U-Net module by its kohya key; 1 outside the blocks (conv_in, conv_out, time_embedding)."""
    place = _block(key)
    if place is None:
        return 1.0
    part, number = place
    table: tuple[float, ...] = getattr(rates, part)
    return table[number]


def _block_number(family: str, key: str) -> int:
    """The number of a module's block, counted from the first down block to the last up block."""
    place = _block(key)
    assert place is not None, f"{key} lies in no block"
    part, number = place
    down, mid, _up = FAMILIES[family].blocks
    return {"down": 0, "mid": down, "up": down + mid}[part] + number


def _block(key: str) -> tuple[str, int] | None:
    """down, mid or up, and the number of the block in it (sd-scripts networks/lora.py, get_block_index).

    SD1.5: down block i, layer j is number 1 + 3i + j (samplers j = 2) – number 0 is conv_in, which has no
    LoRA – and up block i, layer j number 3i + j.  SDXL: the numbers of sgm's names.
    """
    found = _BLOCK.match(key)
    if found is None:
        return None
    if found["sgm"]:
        return {"input": "down", "middle": "mid", "output": "up"}[found["sgm"]], int(found["n"])
    if not found["old"]:
        return "mid", 0
    layer = 2 if found["what"].endswith("samplers") else int(found["j"])
    number = 3 * int(found["i"]) + layer
    return found["old"], number + (found["old"] == "down")


def _is_trained(component: str, config: TrainConfig) -> bool:
    if component == "unet":
        return config.trains_unet
    return config.effective_text_encoder_lrs[component == "text_encoder_2"] > 0


def _with_own_alpha(base: Base, config: TrainConfig, target: Target) -> Target:
    """A target with the constant that its kind of adapter has for these settings: alpha, a constraint …"""
    if target.kind in ("OFT", "BOFT"):
        return replace(target, alpha=config.constraint)
    if target.kind == "IA3":
        return target if config.lycoris_preset else replace(target, alpha=0.0)
    layer = base.components()[target.component].get_submodule(target.path)
    kind = kind_for(config, target)
    alpha = kind.alpha(layer, target.rank, target.alpha)
    if config.rs_lora and kind.constant and alpha == target.alpha:
        alpha *= math.sqrt(target.rank)
    return replace(target, alpha=alpha)
