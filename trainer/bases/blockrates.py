"""Block-wise learning rates: down_lr_weight, mid_lr_weight and up_lr_weight as one multiplier per U-Net block.

Owns the arithmetic of sd-scripts' networks.lora. Does not own the mapping of LoRA modules to blocks; see the
base and the adapter. Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.bases.families import FAMILIES
from trainer.config import TrainConfig
from trainer.errors import ConfigError

_SHAPES = ("sine", "cosine", "linear", "reverse_linear", "zeros")


@dataclass(frozen=True)
class BlockRates:
    """Multipliers of unet_lr.  0: the block has no LoRA."""

    down: tuple[float, ...]
    mid: tuple[float, ...]
    up: tuple[float, ...]


def block_rates(config: TrainConfig, family: str) -> BlockRates | None:
    """The multipliers for a family; None if no block setting is given."""
    given = (config.down_lr_weight, config.mid_lr_weight, config.up_lr_weight)
    if not any(given):
        return None
    down, mid, up = (
        _above(config.block_lr_zero_threshold, _weights(name, text, count))
        for name, text, count in zip(
            ("down_lr_weight", "mid_lr_weight", "up_lr_weight"), given, FAMILIES[family].blocks, strict=True
        )
    )
    if not any(down + mid + up):
        raise ConfigError(
            "all block multipliers are 0, so the U-Net is not trained",
            "to train no U-Net, set unet_lr = 0 instead",
        )
    return BlockRates(down, mid, up)


def _weights(name: str, text: str, count: int) -> tuple[float, ...]:
    """``0,0.5,1`` (a missing number is 0), or a shape with an optional offset, such as ``cosine+.25``."""
    if not text:
        return (1.0,) * count
    shape, _, plus = text.partition("+")
    if shape.strip() in _SHAPES:
        base = _number(name, plus) if plus else 0.0
        return tuple(value + base for value in _shape(shape.strip(), count))
    values = tuple(_number(name, part) if part.strip() else 0.0 for part in text.split(","))
    if len(values) != count:
        filled = (*values, *(1.0,) * count)[:count]
        raise ConfigError(
            f"{name} has {len(values)} values, but this base has {count} such blocks",
            f"sd-scripts would use {','.join(f'{value:g}' for value in filled)}; write that if you want it",
        )
    return values


def _shape(shape: str, count: int) -> list[float]:
    rising = [place / (count - 1) if count > 1 else 1.0 for place in range(count)]
    if shape == "zeros":
        return [0.0] * count
    if shape in ("sine", "cosine"):
        rising = [math.sin(math.pi * share / 2) for share in rising]
    return rising[::-1] if shape in ("cosine", "reverse_linear") else rising


def _above(threshold: float, values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value if value > threshold else 0.0 for value in values)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ConfigError(f"{name}: {text[:20]!r} is not a multiplier", "give numbers from 0 to 100")
    return value
