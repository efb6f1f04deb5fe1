"""OPTIMIZERS and SCHEDULES: tables from kohya's names to what they do, and the parameter groups.

The rate of a step is a pure function of its number; a schedule has no state to save or restore.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from trainer.adapters import Adapter
from trainer.config import TrainConfig
from trainer.data import warmup_steps
from trainer.errors import ConfigError, MachineError

POLYNOMIAL_END = 1e-7  # the rate that polynomial ends at, as in diffusers


# Schedules.  ``done`` is the share of the steps after warm-up that are behind, 0 to 1.


def _constant(config: TrainConfig, done: float) -> float:
    return 1.0


def _linear(config: TrainConfig, done: float) -> float:
    return max(0.0, 1.0 - done)


def _cosine(config: TrainConfig, done: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def _cosine_with_restarts(config: TrainConfig, done: float) -> float:
    if done >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((config.lr_scheduler_num_cycles * done) % 1.0))))


def _polynomial(config: TrainConfig, done: float) -> float:
    start = max(config.effective_unet_lr, *config.effective_text_encoder_lrs)
    if start <= POLYNOMIAL_END:
        return 1.0
    end = POLYNOMIAL_END / start
    return end + (1.0 - end) * (1.0 - min(1.0, done)) ** config.lr_scheduler_power


SCHEDULES: dict[str, Callable[[TrainConfig, float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}


def rate(config: TrainConfig, total_steps: int, step: int) -> float:
    """Multiplier of every group's rate for step ``step``, counted from 0 (as diffusers' ``get_scheduler``)."""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return step / warmup
    return SCHEDULES[config.lr_scheduler](config, (step - warmup) / max(1, total_steps - warmup))


# Optimizers.  Each builder takes the parameter groups (with their own lr) and the settings.

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _adamw_8bit(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return _bitsandbytes().optim.AdamW8bit(groups, weight_decay=config.weight_decay)


def _lion_8bit(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return _bitsandbytes().optim.Lion8bit(groups, weight_decay=config.weight_decay)


def _adafactor(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor at a fixed rate: the schedule is ours, not its own relative step."""
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def _prodigy(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Prodigy estimates the rate itself; learning_rate multiplies it and is usually 1.0 (arXiv
    2306.06101)."""
    if len({group["lr"] for group in groups}) > 1:
        raise ConfigError(
            "Prodigy adapts one learning rate and cannot use a separate text_encoder_lr",
            "set text_encoder_lr equal to learning_rate (usually 1.0), or to 0",
        )
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints "Using decoupled weight decay"
        return Prodigy(
            groups,
            weight_decay=config.weight_decay,
            decouple=True,
            safeguard_warmup=config.lr_warmup_steps > 0 and config.lr_scheduler != "constant",
        )


OPTIMIZERS: dict[str, Callable[[Groups, TrainConfig], torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "AdamW8bit": _adamw_8bit,
    "Lion8bit": _lion_8bit,
    "Adafactor": _adafactor,
    "Prodigy": _prodigy,
}


def build_optimizer(config: TrainConfig, adapter: Adapter) -> torch.optim.Optimizer:
    """The optimizer over one group for the U-Net and one for all text encoders, each at its own rate; with
    block rates one group for each rate of the U-Net's, with text_encoder_lr1/2 one for each encoder.

    A group's ``base_lr`` is its full rate; ``set_rate`` scales it step by step.
    """
    first, second = config.effective_text_encoder_lrs
    groups: dict[str, dict[str, Any]] = {}
    for layer in adapter.layers:
        target = layer.target
        if not any(weight.requires_grad for weight in layer.weights.values()):
            continue  # frozen
        if target.component == "unet":
            lr = config.effective_unet_lr * target.rate
            name = "unet" if target.rate == 1.0 else f"unet_x{target.rate:g}"
        else:
            is_second = target.component == "text_encoder_2"
            lr = second if is_second else first
            name = "text_encoder_2" if is_second and first != second else "text_encoder"
        group = groups.setdefault(name, {"params": [], "lr": lr, "name": name, "base_lr": lr})
        group["params"].extend(layer.weights.values())
    return OPTIMIZERS[config.optimizer_type](list(groups.values()), config)


def set_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Give every group its rate for the coming step; returns group name → rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


# Weights in bf16 (full_bf16).  Eight bits of mantissa: an update below 2⁻⁹ of a weight is rounded away every time.
# So the update is made in fp32 and rounded up or down at random, with the chances that keep its mean
# (arXiv 2010.06192, section 3).  Only the optimizer's step sees fp32, when no activations are alive.


@contextlib.contextmanager
def in_fp32(weights: Sequence[torch.nn.Parameter], draw: torch.Generator | None = None) -> Iterator[None]:
    """Weights and their gradients as fp32; afterwards bf16 again, rounded stochastically with ``draw``.

    Also what an optimizer's state must be loaded in: optimizers cast it to the weights' type.
    """
    small = [weight for weight in weights if weight.dtype != torch.float32]
    for weight in small:
        gradient, weight.grad = weight.grad, None
        weight.data = weight.data.float()
        weight.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for weight in small:
            weight.grad = None
            weight.data = stochastic_bf16(weight.data, draw)


def stochastic_bf16(values: torch.Tensor, draw: torch.Generator | None) -> torch.Tensor:
    """fp32 as bf16: to either neighbour, the nearer one more often, so that the mean is the value itself.
    What bf16 can hold stays as it is."""
    bits = values.contiguous().view(torch.int32)
    dice = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draw)
    return ((bits + dice) & -65536).view(torch.float32).to(torch.bfloat16)


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move what the optimizer remembers of each weight to a device.  Single numbers stay where they are."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MachineError(
            f"8-bit optimizers need bitsandbytes: {error}", "install it, or set optimizer_type = AdamW"
        ) from None
    return bitsandbytes
