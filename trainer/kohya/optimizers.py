"""Translate sd-scripts' settings of learning rates, optimizer and schedule.

Does not own what an optimizer does (``trainer.loop.optim``).
"""

from __future__ import annotations

from typing import Any

from trainer.config import OPTIMIZER_NAMES, SCHEDULER_NAMES
from trainer.kohya.keys import KOHYA_DEFAULTS, SAME_ARGUMENTS, SAME_OPTIMIZER
from trainer.kohya.reading import Reading, is_one_of, key_values
from trainer.tomlfile import as_text


def _rates(reading: Reading) -> None:
    """sd-scripts accepts a list of text encoder rates and uses the first one for SD1.5 and SDXL."""
    rates = reading.take("text_encoder_lr")
    if isinstance(rates, list):
        reading.say(
            "text_encoder_lr", rates, f"{as_text(rates[0])} for all text encoders, as sd-scripts does"
        )
        rates = rates[0]
    if rates is not None:
        reading.given["text_encoder_lr"] = rates
    if reading.take("network_train_text_encoder_only"):
        reading.given["unet_lr"] = 0.0
        reading.left.pop("unet_lr", None)
        reading.say("network_train_text_encoder_only", True, "unet_lr = 0")


def _optimizer(reading: Reading) -> None:
    name = reading.take("optimizer_type")
    if reading.take("use_8bit_adam"):
        name = "AdamW8bit"
        reading.say("use_8bit_adam", True, "optimizer_type = AdamW8bit")
    if reading.take("use_lion_optimizer"):
        reading.refuse(
            "use_lion_optimizer", True, "32-bit Lion is not supported; use optimizer_type = Lion8bit"
        )
    ours = KOHYA_DEFAULTS["optimizer_type"]
    if name is not None:
        exact = {known.lower(): known for known in OPTIMIZER_NAMES}
        found = exact.get(str(name).lower()) or SAME_OPTIMIZER.get(str(name).lower())
        if found is None:
            reading.refuse("optimizer_type", name, "supported optimizers: " + ", ".join(OPTIMIZER_NAMES))
        else:
            ours = reading.given["optimizer_type"] = found
            if found != name:
                reading.say("optimizer_type", name, found)
    _optimizer_arguments(reading, ours, key_values("optimizer_args", reading.take("optimizer_args")))


def _optimizer_arguments(reading: Reading, optimizer: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name == "weight_decay":
            reading.given["weight_decay"] = value
            reading.say("optimizer_args weight_decay", value, f"weight_decay = {as_text(value)}")
        elif optimizer == "Prodigy" and name == "safeguard_warmup":
            _safeguard(reading, value)
        elif not is_one_of(value, SAME_ARGUMENTS[optimizer].get(name, ())):
            reading.refuse(f"optimizer_args {name}", value, f"this argument of {optimizer} cannot be changed")
    if optimizer == "Adafactor" and "relative_step" not in arguments:
        reading.refuse(
            "optimizer_args relative_step",
            True,
            "Adafactor needs a fixed learning rate: add relative_step=False",
        )
    if optimizer == "Prodigy" and "safeguard_warmup" not in arguments:
        _safeguard(reading, False)


def _safeguard(reading: Reading, value: Any) -> None:
    """Prodigy uses safeguard_warmup if there is a warm-up."""
    warms_up = bool(reading.left.get("lr_warmup_steps"))
    warms_up &= reading.left.get("lr_scheduler", KOHYA_DEFAULTS["lr_scheduler"]) != "constant"
    if bool(value) != warms_up:
        why = "true, because of the warm-up" if warms_up else "false, because there is no warm-up"
        reading.say("optimizer_args safeguard_warmup", value, why)


def _schedule(reading: Reading) -> None:
    name = reading.take("lr_scheduler")
    warmup, cycles = reading.left.get("lr_warmup_steps"), reading.left.get("lr_scheduler_num_cycles")
    if isinstance(warmup, float) and warmup >= 1:
        reading.take("lr_warmup_steps")
        reason = "sd-scripts reads a number with a decimal point as a fraction of all steps; remove the point"
        reading.refuse("lr_warmup_steps", warmup, reason)
    if cycles == 0 and not isinstance(cycles, bool) and name != "cosine_with_restarts":
        reading.take("lr_scheduler_num_cycles")
        reading.without_effect.append("lr_scheduler_num_cycles: only used by cosine_with_restarts")
    if name is None:
        return
    if name in SCHEDULER_NAMES:
        reading.given["lr_scheduler"] = name
    else:
        reading.refuse("lr_scheduler", name, "supported schedules: " + ", ".join(SCHEDULER_NAMES))


TRANSLATIONS = (_rates, _optimizer, _schedule)
