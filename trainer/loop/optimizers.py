"""An optimizer from its table entry: the class of its library, imported when it is used, and its arguments.

Only classes of the table (``trainer.optimizers``) are imported, never a name from a file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.errors import MachineError
from trainer.optimizers import OPTIMIZERS, arguments_of, missing

Groups = list[dict[str, Any]]


def make(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over these groups, each with its own lr.

    Raises MachineError if its library is not installed.
    """
    made = _class(config.optimizer_type, _is_on_cpu(groups))
    values = {**_arguments(groups, config), "weight_decay": config.weight_decay}
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints "Using decoupled weight decay"
        optimizer: torch.optim.Optimizer = made(groups, **values)
    return optimizer


def _arguments(groups: Groups, config: TrainConfig) -> dict[str, Any]:
    """The arguments besides weight_decay. ``lr`` is sd-scripts' learning_rate: no group uses it, but some libraries
    check it, and Lion's decoupled_weight_decay divides by it."""
    values = arguments_of(config.optimizer_type, config.optimizer_args)
    values["lr"] = config.learning_rate or max(group["lr"] for group in groups)
    if config.has_relative_steps:
        values["lr"] = None  # Adafactor wants none, and ignores those of the groups
    if values.get("growth_rate", 1.0) is None:
        values["growth_rate"] = float("inf")
    if config.optimizer_type == "Prodigy":
        values.setdefault("safeguard_warmup", config.safeguards_warmup)
    return values


def _class(name: str, is_on_cpu: bool) -> Any:
    """The class of the library. Paged state is a matter of CUDA: on a CPU it is the same optimizer without pages."""
    entry = OPTIMIZERS[name]
    module, _, kind = entry.where.partition(":")
    if is_on_cpu and kind.startswith("Paged"):
        kind = {"PagedAdamW32bit": "AdamW"}.get(kind, kind.removeprefix("Paged"))
    try:
        return getattr(importlib.import_module(module), kind)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise missing(name) from None
        raise MachineError(
            f"optimizer_type = {name}: {entry.package} cannot be imported: {error}",
            f"pip install --upgrade {entry.package}, or set optimizer_type = AdamW",
        ) from None


def _is_on_cpu(groups: Groups) -> bool:
    return all(weight.device.type == "cpu" for group in groups for weight in group["params"])
