"""Translate sd-scripts' network_module and network_args, and those of LyCORIS.

Does not own what a type of adapter does (``trainer.adapters``).
"""

from __future__ import annotations

from typing import Any

from trainer.kohya.keys import KOHYA_DEFAULTS, LYCORIS_TYPES, NETWORK_ARGUMENTS
from trainer.kohya.reading import Reading, is_one_of, key_values
from trainer.tomlfile import as_text


def _network(reading: Reading) -> None:
    module = reading.take("network_module")
    arguments = key_values("network_args", reading.take("network_args"))
    if module == "lycoris.kohya":
        arguments = _lycoris(reading, arguments)
    else:
        arguments = _zero_convolutions(reading, arguments)
    if module not in (None, "networks.lora", "lycoris.kohya"):
        known = "supported: networks.lora (LoCon with conv_dim) and lycoris.kohya (locon, loha, lokr)"
        reading.refuse("network_module", module, known)
    for name, value in arguments.items():
        if name in NETWORK_ARGUMENTS:
            reading.given[name] = multipliers(value) if name.endswith("lr_weight") else value
            reading.say(f"network_args {name}", value, f"{name} = {as_text(reading.given[name])}")
        elif value not in (0, None, False):
            reading.refuse(f"network_args {name}", value, "supported: " + ", ".join(NETWORK_ARGUMENTS))
    if reading.left.get("network_alpha") == 0:
        rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
        reading.left["network_alpha"] = rank
        reading.say("network_alpha", 0, f"{as_text(rank)}, which is network_dim")


def _lycoris(reading: Reading, arguments: dict[str, Any]) -> dict[str, Any]:
    """Translate the LyCORIS algorithm to network_type; returns the remaining arguments."""
    left = dict(arguments)
    algorithm = str(left.pop("algo", "lora")).lower()
    kind = LYCORIS_TYPES.get(algorithm)
    if kind is None:
        reading.refuse("network_args algo", algorithm, "supported: " + ", ".join(LYCORIS_TYPES))
        return left
    if left.pop("dora_wd", False) not in (False, 0, "False", "false"):
        if kind not in ("LoRA", "LoCon"):
            reading.refuse("network_args dora_wd", True, f"supported for lora and locon, not for {algorithm}")
            return left
        kind = "DoRA"
        if left.pop("wd_on_output", True) not in (False, "False", "false"):
            reading.say("network_args wd_on_output", True, "false: DoRA magnitudes are per input here")
    if (dropout := left.pop("dropout", None)) is not None:
        _lycoris_dropout(reading, kind, dropout)
    preset = left.pop("preset", "full")
    if preset not in ("full", "attn-mlp"):
        reading.refuse(
            "network_args preset", preset, "not supported: the modules of networks.lora are trained"
        )
    if (
        preset == "full" and kind == "LoRA"
    ):  # the LyCORIS preset full also trains convolutions, which is LoCon
        kind = "LoCon"
    rank = reading.left.get("network_dim", KOHYA_DEFAULTS["network_dim"])
    usual = {
        "conv_dim": rank,
        "conv_alpha": reading.left.get("network_alpha", KOHYA_DEFAULTS["network_alpha"]),
    }
    for name, value in usual.items():
        if name in left and is_one_of(left[name], (0, None)):
            del left[name]
            taken = f"{as_text(value)}, as LyCORIS does" if preset == "full" else "unset"
            reading.say(f"network_args {name}", 0, taken)
        if preset == "full":
            left.setdefault(name, value)
    reading.given["network_type"] = kind
    where = "the modules of networks.lora" + (" with 3×3 convolutions" if preset == "full" else "")
    reading.say("network_module", "lycoris.kohya", f"network_type = {kind}, on {where}")
    return left


def _lycoris_dropout(reading: Reading, kind: str, value: Any) -> None:
    """The LyCORIS name of network_dropout; it overrides network_dropout."""
    reading.take("network_dropout")
    if kind in ("LoHa", "LoKr"):
        reading.say("network_args dropout", value, f"ignored: LyCORIS has no dropout for {kind}")
        return
    reading.given["network_dropout"] = value or 0.0
    reading.say("network_args dropout", value, f"network_dropout = {as_text(value or 0.0)}")


def _zero_convolutions(reading: Reading, arguments: dict[str, Any]) -> dict[str, Any]:
    """In networks.lora, rank 0 means no 3×3 convolutions, and alpha 0 means alpha = rank."""
    left = dict(arguments)
    if is_one_of(left.get("conv_dim"), (0,)):
        reading.say("network_args conv_dim", left.pop("conv_dim"), "unset: no 3×3 convolutions")
    if is_one_of(left.get("conv_alpha"), (0,)):
        rank = left.get("conv_dim")
        if rank is None:
            del left["conv_alpha"]
        else:
            left["conv_alpha"] = rank
        reading.say("network_args conv_alpha", 0, "unset" if rank is None else f"{rank}, which is conv_dim")
    return left


def multipliers(value: Any) -> str:
    """Block multipliers as one text: from a tuple of numbers, a number, or the name of a shape."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


TRANSLATIONS = (_network,)
