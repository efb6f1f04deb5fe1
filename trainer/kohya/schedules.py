"""Translate sd-scripts' settings of the learning rate schedule (library/train_util.py:get_scheduler_fix).

Runs after ``optimizers``, which may replace the schedule.  Does not own the table of schedules
(``trainer.schedules``).
"""

from __future__ import annotations

from typing import Any

from trainer import optimizers, schedules
from trainer.arguments import as_text as arguments_text
from trainer.checks import suggestion
from trainer.kohya.keys import KOHYA_DEFAULTS
from trainer.kohya.optimizers import arguments_of
from trainer.kohya.reading import Reading, is_one_of
from trainer.optimizers import OPTIMIZERS
from trainer.schedules import CYCLIC, SCHEDULER_NAMES, SCHEDULES
from trainer.tomlfile import as_text

_HARMLESS: dict[str, tuple[Any, ...]] = {"last_epoch": (-1,), "verbose": (False, "deprecated")}


def _steps(reading: Reading) -> None:
    """A number of steps, or a share of all: below 1, or with %."""
    for name in ("lr_warmup_steps", "lr_decay_steps"):
        value = reading.left.get(name)
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                share = float(value.strip()[:-1]) / 100
            except ValueError:
                continue  # the check of the setting says what is wrong
            value = reading.left[name] = share
            if share < 1:
                reading.say(name, f"{share * 100:g}%", f"{share:g} of all steps")
        if isinstance(value, float) and value >= 1:
            _share_above_one(reading, name, value)


def _share_above_one(reading: Reading, name: str, value: float) -> None:
    """With a decimal point sd-scripts reads a share of all steps: 100.0 would be a hundred times the run."""
    if value == 1:
        length = reading.given.get("max_train_steps", KOHYA_DEFAULTS["max_train_steps"])
        if length is not None:
            reading.left[name] = length
            reading.say(name, value, f"{as_text(length)} steps: 1.0 is a share of 100 % in sd-scripts")
        else:
            reading.take(name)
            reason = "1.0 is a share of 100 % in sd-scripts, the whole run; write 1 for one step"
            reading.refuse(name, value, reason)
        return
    reading.differ(
        f"{name} = {value:g} is read as {value:g} steps; sd-scripts reads a number with a decimal point as a share "
        f"of all steps, here {value * 100:g} %"
    )


def _schedule(reading: Reading) -> None:
    given, kind = reading.take("lr_scheduler"), reading.take("lr_scheduler_type")
    values = arguments_of(reading, "lr_scheduler_args")
    optimizer = optimizers.named(reading.known("optimizer_type", KOHYA_DEFAULTS["optimizer_type"]))
    if reading.given.get("lr_scheduler") == "adafactor":  # Adafactor with relative steps
        _replaced(reading, kind or given, values, "Adafactor with relative steps")
        return
    if optimizer is not None and OPTIMIZERS[optimizer].is_schedule_free:
        if (name := schedules.named(given)) is not None:
            reading.given["lr_scheduler"] = name
        _replaced(reading, kind or given, values, str(optimizer))
        return
    name = _name(reading, given, kind)
    if name is None:
        return
    _cycles(reading, name)
    for argument in [key for key, value in values.items() if is_one_of(value, _HARMLESS.get(key, ()))]:
        reading.say(f"lr_scheduler_args {argument}", values.pop(argument), "the same as without it")
    sound, wrong = schedules.check(name, arguments_text(values))
    for argument, value, reason in wrong:
        reading.refuse(f"lr_scheduler_args {argument}", value, reason, stands_for="lr_scheduler_args")
    if name == "polynomial" and "lr_end" not in sound and _highest(reading) != _learning_rate(reading):
        sound["lr_end"] = 1e-7  # sd-scripts counts it against learning_rate
    if "first_cycle_max_steps" in SCHEDULES[name].arguments and "first_cycle_max_steps" not in sound:
        cycles = reading.left.get("lr_scheduler_num_cycles", 1)
        meaning = (
            f"all steps / {as_text(cycles)} (lr_scheduler_num_cycles), as LoRA_Easy_Training_Scripts sets it"
        )
        reading.say("lr_scheduler_args first_cycle_max_steps", "not given", meaning)
    if sound:
        reading.given["lr_scheduler_args"] = arguments_text(sound)


def _name(reading: Reading, given: Any, kind: Any) -> str | None:
    """Our name of the schedule, given or usual; None if there is none like it here."""
    key, asked = ("lr_scheduler_type", kind) if kind is not None else ("lr_scheduler", given)
    if kind is not None and given is not None:
        reading.without_effect.append("lr_scheduler: lr_scheduler_type replaces it, as in sd-scripts")
    decided = schedules.named(reading.decided.get("lr_scheduler"))
    if asked is None or decided is not None:
        return decided or str(KOHYA_DEFAULTS["lr_scheduler"])
    name = schedules.named(asked)
    if name is None:
        near = suggestion(str(asked).rpartition(".")[2], SCHEDULER_NAMES)
        reading.refuse(key, asked, near or "supported schedules: " + ", ".join(SCHEDULER_NAMES))
        return None
    if name == "adafactor":
        reading.refuse(key, asked, "it is for Adafactor with relative_step=True; sd-scripts ends here too")
        return None
    reading.given["lr_scheduler"] = name
    if key == "lr_scheduler_type" or name != asked:
        reading.say(key, asked, f"lr_scheduler = {name}")
    if not SCHEDULES[name].warms_up and name != "constant" and reading.left.get("lr_warmup_steps"):
        reading.take("lr_warmup_steps")
        reading.without_effect.append(f"lr_warmup_steps: {name} has no warm-up of this kind")
    return name


def _replaced(reading: Reading, asked: Any, arguments: dict[str, Any], by: str) -> None:
    """The optimizer has no schedule: what the file says of one is not used, as in sd-scripts."""
    is_said = str(asked).startswith("adafactor") or asked in (
        None,
        "constant",
    )  # a LoRA of sd-scripts: adafactor:1e-4
    names = [] if is_said else ["lr_scheduler"]
    names += ["lr_scheduler_args"] if arguments else []
    names += ["lr_warmup_steps"] if reading.take("lr_warmup_steps") else []
    for name in names:
        reading.without_effect.append(f"{name}: {by} uses no schedule")
    _cycles(reading, "constant")


def _cycles(reading: Reading, name: str) -> None:
    if reading.left.get("lr_scheduler_num_cycles") in (0, 0.0) and name not in CYCLIC:
        reading.take("lr_scheduler_num_cycles")
        reading.without_effect.append("lr_scheduler_num_cycles: only used by cosine_with_restarts")


def _learning_rate(reading: Reading) -> Any:
    return reading.known("learning_rate", KOHYA_DEFAULTS["learning_rate"])


def _highest(reading: Reading) -> Any:
    """The highest rate that a network is trained at."""
    usual = _learning_rate(reading)
    rates = [reading.known("unet_lr", usual)]
    if not reading.known("network_train_unet_only"):
        rates.append(reading.known("text_encoder_lr", usual))
    numbers = [rate for rate in rates if isinstance(rate, int | float)]
    return max(numbers, default=usual)


TRANSLATIONS = (_steps, _schedule)
