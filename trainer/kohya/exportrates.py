"""Export of the optimizer and the schedule to sd-scripts.

sd-scripts gets every argument that decides an update, because its libraries have other defaults than this tool.
"""

from __future__ import annotations

from typing import Any

from trainer import optimizers, schedules
from trainer.arguments import as_entries, parse
from trainer.config import TrainConfig
from trainer.kohya.keys import KOHYA_DEFAULTS

# Optimizers that sd-scripts only knows by their full class name.
_FULL_NAMES = {
    "CAME": "came_pytorch.CAME",
    "AdEMAMix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "PagedAdEMAMix8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
}
_NOT_IN_ITS_REQUIREMENTS = ("dadaptation", "came-pytorch")


def exported_optimizer(config: TrainConfig, notes: list[str]) -> dict[str, Any]:
    """optimizer_type and optimizer_args."""
    name = config.optimizer_type
    values = {"weight_decay": config.weight_decay, **optimizers.told_arguments(name, config.optimizer_args)}
    if name == "Prodigy":
        values.setdefault("use_bias_correction", False)
        values.setdefault("safeguard_warmup", config.safeguards_warmup)
    package = optimizers.OPTIMIZERS[name].package
    if package in _NOT_IN_ITS_REQUIREMENTS:
        notes.append(f"{name} needs a package in sd-scripts: pip install {package}")
    return {"optimizer_type": _FULL_NAMES.get(name, name), "optimizer_args": as_entries(values)}


def exported_schedule(config: TrainConfig, notes: list[str]) -> dict[str, Any]:
    """lr_scheduler or lr_scheduler_type with their arguments, and steps of warm-up and decay."""
    if config.is_schedule_free or config.has_relative_steps:
        return {}
    name = config.lr_scheduler
    table: dict[str, Any] = {}
    values = dict(parse("lr_scheduler_args", config.lr_scheduler_args).values)
    where = schedules.SCHEDULES[name].where
    if where:
        table["lr_scheduler_type"] = where
    elif name != KOHYA_DEFAULTS["lr_scheduler"]:
        table["lr_scheduler"] = name
    if "first_cycle_max_steps" in schedules.SCHEDULES[name].arguments and not values.get(
        "first_cycle_max_steps"
    ):
        notes.append(
            f"{name}: add first_cycle_max_steps to lr_scheduler_args: all steps / {config.lr_scheduler_num_cycles}"
        )
    highest = max(config.effective_unet_lr, *config.effective_text_encoder_lrs)
    if name == "polynomial" and "lr_end" not in values and highest != config.learning_rate:
        values["lr_end"] = 1e-7 * config.learning_rate / highest  # sd-scripts counts it against learning_rate
    if values:
        table["lr_scheduler_args"] = as_entries(values)
    if config.warms_up and config.lr_warmup_steps:
        table["lr_warmup_steps"] = _steps(config.lr_warmup_steps)
    if config.lr_decay_steps:
        table["lr_decay_steps"] = _steps(config.lr_decay_steps)
    return table


def _steps(given: float) -> float:
    """With a decimal point, sd-scripts reads a share of all steps."""
    return int(given) if given >= 1 else given
