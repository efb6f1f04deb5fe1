"""Checks that need base, settings and images together: call them after load_base, before any work.

``check`` refuses what cannot be done; ``notes`` are messages for the user.
"""

from __future__ import annotations

import math

from trainer import optimizers
from trainer.bases import Base, families
from trainer.compute import holds_fp8, without_graphs
from trainer.config import TrainConfig
from trainer.data.captions import listed
from trainer.data.dataset import Dataset
from trainer.errors import ConfigError


def check(base: Base, config: TrainConfig) -> None:
    """ConfigError if the base cannot do what the settings ask for, MachineError if the optimizer is not installed."""
    optimizers.check_installed(config.optimizer_type)
    families.check(config, base.family, base.name)
    layers = int(base.text_encoders[0].config.num_hidden_layers)
    families.check_clip_skip(config, base.family, base.name, layers)
    if config.fp8_base and not holds_fp8(base.unet):
        raise ConfigError(
            "fp8_base is for hpo train: a search keeps one base for all trials, as it is",
            "leave fp8_base out",
        )


def notes(base: Base, config: TrainConfig, dataset: Dataset) -> tuple[str, ...]:
    """What this base ignores in these settings and captions."""
    found = []
    native_px = base.native_resolution_px
    if 4 * math.prod(config.size_px) <= native_px**2:
        found.append(
            f"{base.name} is {base.facts.title} made for {native_px} px; "
            f"these settings train {round(math.sqrt(math.prod(config.size_px)))} px"
        )
    found += families.passed_over(config, base.family)
    if reason := without_graphs(config):
        found.append(f"torch_compile has no effect with {reason}: the blocks are computed as without it")
    limit = config.max_token_length or base.caption_tokens
    long = [item.path for item in dataset.items if base.token_count(item.caption) > limit]
    if long:
        found.append(
            f"{len(long)} captions are longer than {limit} tokens, the rest is not read: {listed(long)}"
        )
    return tuple(found)
