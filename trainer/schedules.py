"""The learning rate schedules by name: arguments with their limits, and how files spell them.

A name in a file only selects an entry of this table: nothing that a file names is imported.  Does not own the rates
(``trainer.loop.schedules``).  Never imports torch.

Sources: transformers and diffusers (``get_scheduler``), as sd-scripts' library/train_util.py:get_scheduler_fix calls
them; torch.optim.lr_scheduler; LoraEasyCustomOptimizer of LoRA_Easy_Training_scripts_Backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.arguments import NUMBER, TEXT, WHOLE, Argument, check_arguments, parse

_STEPS = Argument(WHOLE, low=1, high=1e9, is_needed=True)
_FACTOR = Argument(NUMBER, 0.1, low=0, high=1000, low_is_excluded=True)
_RATE = Argument(NUMBER, 0.0, low=0, high=10)
_START = Argument(NUMBER, 1 / 3, low=0, high=1, low_is_excluded=True)
_FIVE = Argument(WHOLE, 5, low=1, high=1e9)
_RESTARTS = {
    "gamma": Argument(NUMBER, low=0, high=1000, low_is_excluded=True, is_needed=True),
    "cycle_multiplier": Argument(NUMBER, 1.0, low=1, high=1000),
    "first_cycle_max_steps": Argument(WHOLE, None, low=1, high=1e9, can_be_none=True),
    "min_lr": Argument(NUMBER, 1e-6, low=0, high=10),
    "warmup_steps": Argument(WHOLE, 0, low=0, high=1e9),
}
_WAVES = Argument(NUMBER, 0.5, low=0, high=1000, low_is_excluded=True)
_FORM = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Schedule:
    """A schedule. ``warms_up``: lr_warmup_steps count. ``where`` is the class of lr_scheduler_type in sd-scripts, ""
    for a name of lr_scheduler."""

    arguments: Mapping[str, Argument] = field(default_factory=dict)
    warms_up: bool = True
    where: str = ""
    spellings: tuple[str, ...] = ()


def _of_torch(name: str, arguments: Mapping[str, Argument]) -> Schedule:
    where = f"torch.optim.lr_scheduler.{name}"
    return Schedule(arguments, warms_up=False, where=where, spellings=(where, name))


def _of_lora_easy(name: str, arguments: Mapping[str, Argument]) -> Schedule:
    where = f"LoraEasyCustomOptimizer.{name}.{name}"
    return Schedule(
        arguments, warms_up=False, where=where, spellings=(where, f"LoraEasyCustomOptimizer.{name}")
    )


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(warms_up=False),
    "constant_with_warmup": Schedule(),
    "linear": Schedule(),
    "cosine": Schedule({"num_cycles": _WAVES}),
    "cosine_with_restarts": Schedule(),
    "polynomial": Schedule({"lr_end": Argument(NUMBER, None, low=0, high=10, can_be_none=True)}),
    "cosine_with_min_lr": Schedule({"min_lr": _RATE}),
    "warmup_stable_decay": Schedule(
        {
            "warmup_type": Argument(TEXT, "linear", choices=_FORM),
            "decay_type": Argument(TEXT, "cosine", choices=_FORM),
        }
    ),
    "inverse_sqrt": Schedule(),
    "piecewise_constant": Schedule({"step_rules": Argument(TEXT, is_needed=True)}, warms_up=False),
    "adafactor": Schedule(warms_up=False),
    "RexAnnealingWarmRestarts": _of_lora_easy(
        "RexAnnealingWarmRestarts",
        {**_RESTARTS, "d": Argument(NUMBER, 0.9, low=0, high=1, high_is_excluded=True)},
    ),
    "CosineAnnealingWarmupRestarts": _of_lora_easy("CosineAnnealingWarmRestarts", _RESTARTS),
    "CosineAnnealingWarmRestarts": _of_torch(
        "CosineAnnealingWarmRestarts",
        {"T_0": _STEPS, "T_mult": Argument(WHOLE, 1, low=1, high=1000), "eta_min": _RATE},
    ),
    "CosineAnnealingLR": _of_torch("CosineAnnealingLR", {"T_max": _STEPS, "eta_min": _RATE}),
    "StepLR": _of_torch("StepLR", {"step_size": _STEPS, "gamma": _FACTOR}),
    "MultiStepLR": _of_torch(
        "MultiStepLR",
        {
            "milestones": Argument(WHOLE, low=0, high=1e9, is_needed=True, any_count=True),
            "gamma": _FACTOR,
        },
    ),
    "ExponentialLR": _of_torch(
        "ExponentialLR", {"gamma": Argument(NUMBER, low=0, high=10, low_is_excluded=True, is_needed=True)}
    ),
    "LinearLR": _of_torch(
        "LinearLR",
        {"start_factor": _START, "end_factor": Argument(NUMBER, 1.0, low=0, high=1), "total_iters": _FIVE},
    ),
    "ConstantLR": _of_torch(
        "ConstantLR", {"factor": Argument(NUMBER, 1 / 3, low=0, high=1), "total_iters": _FIVE}
    ),
    "PolynomialLR": _of_torch(
        "PolynomialLR", {"total_iters": _FIVE, "power": Argument(NUMBER, 1.0, low=0, high=10)}
    ),
}
SCHEDULER_NAMES = tuple(SCHEDULES)
CYCLIC = (
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "RexAnnealingWarmRestarts",
    "CosineAnnealingWarmupRestarts",
)  # lr_scheduler_num_cycles counts
_BY_SPELLING = {
    spelling.lower(): name for name, schedule in SCHEDULES.items() for spelling in (name, *schedule.spellings)
}


def named(name: Any) -> str | None:
    """The schedule that a file means by lr_scheduler or lr_scheduler_type. None if there is no such one."""
    return _BY_SPELLING.get(name.strip().lower()) if isinstance(name, str) else None


def canonical(name: Any) -> Any:
    """The name of the table, or what was given, for the check that follows."""
    return named(name) or name


def check(lr_scheduler: str, lr_scheduler_args: str) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """The arguments that were set, and those that are wrong or missing, as ``check_arguments``."""
    table = SCHEDULES[lr_scheduler].arguments
    values = parse("lr_scheduler_args", lr_scheduler_args).values
    sound, wrong = check_arguments("lr_scheduler_args", lr_scheduler, values, table)
    wrong += [
        (name, None, f"{lr_scheduler} needs it: {argument.words}")
        for name, argument in table.items()
        if argument.is_needed and name not in values
    ]
    if "step_rules" in sound:
        try:
            step_rules(sound["step_rules"])
        except ValueError:
            reason = "write factor:step pairs and the last factor, for example 1:100,0.5:200,0.1"
            wrong.append(("step_rules", sound["step_rules"], reason))
    if sound.get("first_cycle_max_steps") and sound.get("warmup_steps", 0) >= sound["first_cycle_max_steps"]:
        wrong.append(("warmup_steps", sound["warmup_steps"], "it must be below first_cycle_max_steps"))
    return sound, wrong


def arguments_of(lr_scheduler: str, lr_scheduler_args: str) -> dict[str, Any]:
    """All arguments of a schedule, with the defaults of its library."""
    defaults = {name: argument.default for name, argument in SCHEDULES[lr_scheduler].arguments.items()}
    return {**defaults, **check(lr_scheduler, lr_scheduler_args)[0]}


def step_rules(text: str) -> tuple[list[tuple[int, float]], float]:
    """``1:100,0.5:200,0.1`` → the factors below each step, by step, and the factor after them (diffusers'
    optimization.py:get_piecewise_constant_schedule). Raises ValueError."""
    *rules, last = text.split(",")
    pairs = [rule.split(":") for rule in rules]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(text)
    return sorted({int(step): float(factor) for factor, step in pairs}.items()), float(last)
