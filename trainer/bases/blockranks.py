"""Block-wise ranks and alphas: block_dims, block_alphas, conv_block_dims, conv_block_alphas.

Owns the arithmetic of sd-scripts' networks.lora (get_block_dims_and_alphas).  Does not own the mapping of LoRA modules
to blocks; see the adapter.  Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.bases.families import FAMILIES
from trainer.config import LARGEST_DIM, TrainConfig
from trainer.errors import ConfigError


@dataclass(frozen=True)
class BlockRanks:
    """Rank and alpha of each U-Net block, in the order down, middle, up.  Rank 0: the block has no LoRA there.
    ``conv_dims`` (of 3×3 convolutions) is None where they are not trained."""

    dims: tuple[int, ...]
    alphas: tuple[float, ...]
    conv_dims: tuple[int, ...] | None
    conv_alphas: tuple[float, ...]

    def of(self, block: int, *, is_wide: bool) -> tuple[int, float]:
        """(rank, alpha) of a module; ``is_wide``: a 3×3 convolution."""
        if not is_wide:
            return self.dims[block], self.alphas[block]
        return (0, 0.0) if self.conv_dims is None else (self.conv_dims[block], self.conv_alphas[block])


def block_ranks(config: TrainConfig, family: str) -> BlockRanks | None:
    """The ranks for a family; None if no block setting is given.  Raises ConfigError for a wrong number of values."""
    names = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    if not any(getattr(config, name) for name in names):
        return None
    whole = sum(FAMILIES[family].blocks) + 2 * FAMILIES[family].outer_blocks
    dims = _numbers("block_dims", config.block_dims, whole, LARGEST_DIM)
    alphas = _numbers("block_alphas", config.block_alphas, whole, 4096)
    conv_dims = _numbers("conv_block_dims", config.conv_block_dims, whole, LARGEST_DIM)
    conv_alphas = _numbers("conv_block_alphas", config.conv_block_alphas, whole, 4096)
    if conv_dims is None and config.conv_dim is not None:
        conv_dims = (config.conv_dim,) * whole
    conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
    found = BlockRanks(
        _whole("block_dims", dims or (config.network_dim,) * whole),
        tuple(float(alpha) for alpha in alphas or (config.network_alpha,) * whole),
        None if conv_dims is None else _whole("conv_block_dims", conv_dims),
        tuple(float(alpha) for alpha in conv_alphas or (conv_alpha,) * whole),
    )
    return _inner(found, FAMILIES[family].outer_blocks, whole)


def _inner(ranks: BlockRanks, outer: int, whole: int) -> BlockRanks:
    """Without the blocks that have no LoRA modules."""
    inside = slice(outer, whole - outer)
    return BlockRanks(
        ranks.dims[inside],
        ranks.alphas[inside],
        None if ranks.conv_dims is None else ranks.conv_dims[inside],
        ranks.conv_alphas[inside],
    )


def _numbers(name: str, text: str, count: int, highest: float) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{name} = {text[:40]} is not a list of numbers", "write for example 4,4,8"
        ) from None
    if len(values) != count:
        raise ConfigError(
            f"{name} has {len(values)} values, but this base has {count} blocks", f"give {count} numbers"
        )
    if not all(0 <= value <= highest for value in values):
        raise ConfigError(f"{name}: a value is outside its limits", f"from 0 to {highest:g}")
    return values


def _whole(name: str, values: tuple[float, ...]) -> tuple[int, ...]:
    if any(value != int(value) for value in values):
        raise ConfigError(f"{name}: a rank is not a whole number", "write whole numbers")
    return tuple(int(value) for value in values)
