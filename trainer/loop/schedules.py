"""The learning rate of every step: pure functions of its number, so a schedule has no state to save or restore.

Most schedules multiply every group's rate by the same factor (``rate``); some come down to a lowest rate that is no
factor, so ``learning_rate`` is asked with a group's full rate.  Names and arguments are in ``trainer.schedules``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer import optimizers
from trainer.config import TrainConfig
from trainer.data import steps_of, warmup_steps
from trainer.schedules import arguments_of, step_rules

POLYNOMIAL_END = 1e-7  # the rate that polynomial ends at, as in diffusers


@dataclass(frozen=True)
class At:
    """A step, counted from 0, in its run."""

    step: int
    warmup: int
    total: int
    arguments: dict[str, Any]

    @property
    def done(self) -> float:
        """The share of the steps after warm-up that are behind, 0 to 1."""
        return (self.step - self.warmup) / max(1, self.total - self.warmup)


# Factors after warm-up, as transformers' and diffusers' optimization.py


def _constant(config: TrainConfig, at: At) -> float:
    return 1.0


def _linear(config: TrainConfig, at: At) -> float:
    return max(0.0, 1.0 - at.done)


def _cosine(config: TrainConfig, at: At) -> float:
    waves = at.arguments["num_cycles"]
    turn = at.done if waves == 0.5 else 2.0 * waves * at.done
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * turn)))


def _cosine_with_restarts(config: TrainConfig, at: At) -> float:
    if at.done >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((config.lr_scheduler_num_cycles * at.done) % 1.0))))


def _polynomial(config: TrainConfig, at: At) -> float:
    """Down to ``lr_end`` / learning_rate if lr_end is set, as in sd-scripts; otherwise to 1e-7 for the network with
    the highest rate."""
    last: float | None = at.arguments["lr_end"]
    if last is None:
        last, start = POLYNOMIAL_END, _highest(config)
    else:
        start = config.learning_rate
    if start <= last:
        return 1.0
    end = last / start
    if at.done >= 1.0:
        return end
    return end + (1.0 - end) * (1.0 - at.done) ** config.lr_scheduler_power


def _cosine_with_min_lr(config: TrainConfig, at: At) -> float:
    lowest = config.lr_scheduler_min_lr_ratio
    if lowest is None:
        lowest = at.arguments["min_lr"] / config.learning_rate
    factor = 0.5 * (1.0 + math.cos(math.pi * config.lr_scheduler_num_cycles * at.done))
    return max(0.0, factor * (1.0 - lowest) + lowest)


def _warmup_stable_decay(config: TrainConfig, at: At) -> float:
    """Its warm-up starts at the lowest rate and has forms of its own, so it is here too."""
    lowest = config.lr_scheduler_min_lr_ratio or 0.0
    decay = steps_of(config.lr_decay_steps, at.total)
    falls_from = at.total - decay
    if at.step < at.warmup:
        done = at.step / at.warmup
        forms = {"cosine": 0.5 * (1.0 - math.cos(math.pi * done)), "1-sqrt": 1.0 - math.sqrt(1.0 - done)}
        return max(0.0, forms.get(at.arguments["warmup_type"], done) * (1.0 - lowest) + lowest)
    if at.step < falls_from:
        return 1.0
    if at.step >= at.total:
        return lowest
    done = (at.step - falls_from) / max(1, decay)
    wave = 0.5 * (1.0 + math.cos(math.pi * config.lr_scheduler_num_cycles * done))
    forms = {"linear": 1.0 - done, "1-sqrt": 1.0 - math.sqrt(done)}
    return max(0.0, forms.get(at.arguments["decay_type"], wave) * (1.0 - lowest) + lowest)


def _inverse_sqrt(config: TrainConfig, at: At) -> float:
    scale = config.lr_scheduler_timescale or at.warmup or 10_000
    return 1.0 / math.sqrt((at.step - at.warmup + scale) / scale)


def _piecewise_constant(config: TrainConfig, at: At) -> float:
    rules, last = step_rules(at.arguments["step_rules"])
    return next((factor for step, factor in rules if at.step < step), last)


def _step(config: TrainConfig, at: At) -> float:
    return _power(at.arguments["gamma"], at.step // at.arguments["step_size"])


def _multi_step(config: TrainConfig, at: At) -> float:
    milestones = at.arguments["milestones"]
    milestones = sorted(milestones) if isinstance(milestones, tuple) else [milestones]
    return _power(at.arguments["gamma"], bisect_right(milestones, at.step))


def _exponential(config: TrainConfig, at: At) -> float:
    return _power(at.arguments["gamma"], at.step)


def _linear_between(config: TrainConfig, at: At) -> float:
    start, end, steps = (at.arguments[name] for name in ("start_factor", "end_factor", "total_iters"))
    return float(start + (end - start) * min(steps, at.step) / steps)


def _constant_at_first(config: TrainConfig, at: At) -> float:
    return float(at.arguments["factor"]) if at.step < at.arguments["total_iters"] else 1.0


def _polynomial_to_zero(config: TrainConfig, at: At) -> float:
    steps = at.arguments["total_iters"]
    return float((1.0 - min(at.step, steps) / steps) ** at.arguments["power"])


FACTORS: dict[str, Callable[[TrainConfig, At], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
    "inverse_sqrt": _inverse_sqrt,
    "piecewise_constant": _piecewise_constant,
    "StepLR": _step,
    "MultiStepLR": _multi_step,
    "ExponentialLR": _exponential,
    "LinearLR": _linear_between,
    "ConstantLR": _constant_at_first,
    "PolynomialLR": _polynomial_to_zero,
}


# Rates from a group's full rate, for schedules with a lowest rate of their own


def _cosine_annealing(config: TrainConfig, at: At, full: float) -> float:
    """torch.optim.lr_scheduler.CosineAnnealingLR: down and up again, every T_max steps."""
    lowest = at.arguments["eta_min"]
    return float(lowest + (full - lowest) * (1.0 + math.cos(math.pi * at.step / at.arguments["T_max"])) / 2.0)


def _warm_restarts(config: TrainConfig, at: At, full: float) -> float:
    """torch.optim.lr_scheduler.CosineAnnealingWarmRestarts (arXiv 1608.03983)."""
    lowest, longer = at.arguments["eta_min"], at.arguments["T_mult"]
    _, place, length = _cycle(at.step, at.arguments["T_0"], lambda length: length * longer)
    return float(lowest + (full - lowest) * (1.0 + math.cos(math.pi * place / length)) / 2.0)


def _restarts_of_lora_easy(
    at: At, cycles: int, full: float, lowest: float, form: Callable[[float], float]
) -> float:
    """Cycles with a warm-up each; the highest rate of a cycle is γ times that of the one before. Without
    first_cycle_max_steps as LoRA_Easy_Training_scripts' utils/validation.py sets it: an equal share of the run."""
    warmup, longer = at.arguments["warmup_steps"], at.arguments["cycle_multiplier"]
    first = at.arguments["first_cycle_max_steps"] or at.total // cycles
    first = max(first, warmup + 1)
    number, place, length = _cycle(at.step, first, lambda n: round((n - warmup) * longer) + warmup)
    highest = full * _power(at.arguments["gamma"], number)
    if highest <= lowest:
        return lowest
    if place < warmup:
        return float((highest - lowest) * place / warmup + lowest)
    return lowest + (highest - lowest) * form((place - warmup) / (length - warmup))


def _rex(config: TrainConfig, at: At, full: float) -> float:
    """REX (arXiv 2107.04197) with restarts: LoraEasyCustomOptimizer's RexAnnealingWarmRestarts."""
    lowest, d = at.arguments["min_lr"], at.arguments["d"]
    lowest = lowest if lowest < full else 0.0

    def form(done: float) -> float:
        return (1.0 - done) / ((1.0 - d) + d * (1.0 - done))

    return _restarts_of_lora_easy(at, config.lr_scheduler_num_cycles, full, lowest, form)


def _cosine_of_lora_easy(config: TrainConfig, at: At, full: float) -> float:
    """LoraEasyCustomOptimizer's CosineAnnealingWarmRestarts."""

    def form(done: float) -> float:
        return (1.0 + math.cos(math.pi * done)) / 2.0

    return _restarts_of_lora_easy(at, config.lr_scheduler_num_cycles, full, at.arguments["min_lr"], form)


def _adafactor(config: TrainConfig, at: At, full: float) -> float:
    """The relative step that Adafactor takes by itself, for the log (transformers' Adafactor._get_lr; without the
    scale of each weight)."""
    warms_up = optimizers.effective(config.optimizer_type, config.optimizer_args, "warmup_init")
    return min(1e-6 * (at.step + 1) if warms_up else 1e-2, 1.0 / math.sqrt(at.step + 1))


RATES: dict[str, Callable[[TrainConfig, At, float], float]] = {
    "CosineAnnealingLR": _cosine_annealing,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "RexAnnealingWarmRestarts": _rex,
    "CosineAnnealingWarmupRestarts": _cosine_of_lora_easy,
    "adafactor": _adafactor,
}


def _power(base: float, exponent: int) -> float:
    """Infinite where a float cannot hold it, as in torch: the run then ends because its loss diverges."""
    try:
        return float(base) ** exponent
    except OverflowError:
        return math.inf


def _cycle(step: int, length: int, longer: Callable[[int], int]) -> tuple[int, int, int]:
    """The cycle of a step, its place in it, and the cycle's length."""
    number = 0
    while step >= length:
        following = longer(length)
        if following == length:
            more, step = divmod(step, length)
            return number + more, step, length
        step -= length
        number += 1
        length = following
    return number, step, length


def _highest(config: TrainConfig) -> float:
    return max(config.effective_unet_lr, *config.effective_text_encoder_lrs)


def learning_rate(config: TrainConfig, total_steps: int, step: int, full: float) -> float:
    """The rate for step ``step``, counted from 0, of a group whose full rate is ``full``."""
    if config.is_schedule_free:
        return full
    name = "adafactor" if config.has_relative_steps else config.lr_scheduler
    at = At(step, warmup_steps(config, total_steps), total_steps, arguments_of(name, _own(config, name)))
    if name in RATES:
        return RATES[name](config, at, full)
    if step < at.warmup and name != "warmup_stable_decay":
        return full * (step / at.warmup)
    return full * FACTORS[name](config, at)


def _own(config: TrainConfig, name: str) -> str:
    return config.lr_scheduler_args if name == config.lr_scheduler else ""


def rate(config: TrainConfig, total_steps: int, step: int) -> float:
    """The factor of every group's rate for step ``step``, for schedules that have one."""
    return learning_rate(config, total_steps, step, 1.0)
