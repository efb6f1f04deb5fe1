"""Translate sd-scripts' settings of learning rates, the optimizer and its arguments.

sd-scripts leaves out what it leaves to a library; where our usual arguments differ from the library's defaults
(Adafactor, Prodigy), what the file means is added.  Does not own the table of optimizers (``trainer.optimizers``) or
the schedule (``schedules``).
"""

from __future__ import annotations

from typing import Any

from trainer import optimizers
from trainer.arguments import as_text as arguments_text
from trainer.arguments import parse
from trainer.checks import suggestion
from trainer.kohya.keys import KOHYA_DEFAULTS, LORA_PLUS
from trainer.kohya.reading import Reading, is_one_of
from trainer.optimizers import ONLY_SPEED, OPTIMIZER_NAMES, OPTIMIZERS
from trainer.tomlfile import as_text

# Optimizers that people use and that are not here, with what to use.
_NOT_HERE = {
    "prodigyplusschedulefree": "its versions 1.9 (of sd-scripts) and 2.0 give different updates; use Prodigy or "
    "AdamWScheduleFree",
}
# Arguments of older versions of bitsandbytes, with what newer ones always do.
_GONE: dict[str, tuple[Any, ...]] = {"block_wise": (True,), "percentile_clipping": (100,), "args": (None,)}


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


def _loraplus(reading: Reading) -> None:
    """Outside network_args sd-scripts does not read them."""
    for name in LORA_PLUS:
        if reading.take(name) not in (None, 0):
            reading.without_effect.append(
                f"{name}: belongs into network_args, where it would train lora_up at another rate (LoRA+); ignored "
                "here as by sd-scripts"
            )


def _optimizer(reading: Reading) -> None:
    name = _optimizer_name(reading)
    values = arguments_of(reading, "optimizer_args")
    if name is None:
        return
    if "weight_decay" in values:
        decay = values.pop("weight_decay")
        reading.given["weight_decay"] = decay
        reading.say("optimizer_args weight_decay", decay, f"weight_decay = {as_text(decay)}")
    values = _without_gone(reading, name, values)
    sound, wrong = optimizers.check(name, arguments_text(values))
    for argument, value, reason in wrong:
        reading.refuse(f"optimizer_args {argument}", value, reason, stands_for="optimizer_args")
    if name == "Adafactor":
        _adafactor(reading, sound)
    kept = {**_as_in_sd_scripts(name, reading), **sound}
    usual = {argument: rule.default for argument, rule in OPTIMIZERS[name].arguments.items()}
    usual |= OPTIMIZERS[name].ours
    if name == "Prodigy":
        usual["safeguard_warmup"] = _warms_up(reading)
    for argument, value in list(kept.items()):
        if value == usual[argument]:
            del kept[argument]
            if argument in sound:
                reading.say(f"optimizer_args {argument}", value, f"the same as without it in {name}")
        elif argument not in sound:
            reading.say(f"optimizer_args {argument}", "not given", f"{as_text(value)}, as sd-scripts does")
    if kept:
        reading.given["optimizer_args"] = arguments_text(kept)


def _optimizer_name(reading: Reading) -> str | None:
    """Our name of the optimizer, given or usual; None if there is none like it here."""
    name = reading.take("optimizer_type")
    decided = optimizers.named(reading.decided.get("optimizer_type"))
    for flag, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if reading.take(flag):
            name = meant
            reading.say(flag, True, f"optimizer_type = {meant}")
    if name is None or decided is not None:
        return decided or str(KOHYA_DEFAULTS["optimizer_type"])
    found = optimizers.named(name)
    if found is None:
        last = str(name).rpartition(".")[2]
        supported = "supported optimizers: " + ", ".join(OPTIMIZER_NAMES)
        if last != name:  # a class of some package, not a mistyped name
            supported = f"classes of other packages are not used; {supported}"
        near = suggestion(last, OPTIMIZER_NAMES) if last == name else ""
        reason = _NOT_HERE.get(last.lower()) or near or supported
        reading.refuse("optimizer_type", name, reason, stands_for="optimizer_type")
        return None
    reading.given["optimizer_type"] = found
    if found != name:
        reading.say("optimizer_type", name, found)
    return found


def arguments_of(reading: Reading, name: str) -> dict[str, Any]:
    """Take a key with arguments; of the same argument twice, the later counts, and that is said."""
    found = parse(name, reading.take(name))
    for argument, earlier in found.repeated:
        later = found.values[argument]
        reading.say(
            f"{name} {argument}", earlier, f"{as_text(later)}: the later value counts, as in sd-scripts"
        )
    return dict(found.values)


def _without_gone(reading: Reading, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that change no result."""
    left = dict(values)
    for argument, value in values.items():
        is_speed = argument in ONLY_SPEED and argument not in OPTIMIZERS[name].arguments
        if is_speed or (argument in _GONE and is_one_of(value, _GONE[argument])):
            del left[argument]
            reading.without_effect.append(f"optimizer_args {argument}: it changes speed, not the result")
    return left


def _as_in_sd_scripts(name: str, reading: Reading) -> dict[str, Any]:
    """What sd-scripts runs with where the file says nothing, if it is not what this tool usually does."""
    if name == "Adafactor":
        arguments = OPTIMIZERS[name].arguments
        return {key: arguments[key].default for key in ("scale_parameter", "relative_step", "warmup_init")}
    if name == "Prodigy":
        return {"safeguard_warmup": False}
    return {}


def _adafactor(reading: Reading, values: dict[str, Any]) -> None:
    """Relative steps are sd-scripts' default, and warmup_init turns them on."""
    if values.get("warmup_init") and not values.get("relative_step", True):
        values["relative_step"] = True
        reading.say("optimizer_args relative_step", False, "True, because of warmup_init, as sd-scripts does")
    if values.get("relative_step", True):
        reading.given["lr_scheduler"] = "adafactor"
        reading.say(
            "optimizer_type",
            "Adafactor",
            "it chooses its rate itself (relative_step=True); learning rates and the schedule have no effect, as in "
            "sd-scripts",
        )


def _warms_up(reading: Reading) -> bool:
    """Whether Prodigy gets safeguard_warmup here if it is not set."""
    schedule = reading.left.get("lr_scheduler_type") or reading.known(
        "lr_scheduler", KOHYA_DEFAULTS["lr_scheduler"]
    )
    return bool(reading.known("lr_warmup_steps")) and schedule != "constant"


TRANSLATIONS = (_rates, _loraplus, _optimizer)
