"""kohya_ss' types of LoRA as network_module and network_args (lora_gui.py:train_model, kohya_ss 45088f0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.kohya.frontends.found import as_number, tidy
from trainer.text import clean_text

# The window's own values of the fields below, for presets that lack them.
_USUAL: dict[str, Any] = {
    "LyCORIS_preset": "full",
    "conv_dim": 1,
    "conv_alpha": 1,
    "factor": -1,
    "unit": 1,
    "rank_dropout": 0,
    "module_dropout": 0,
    "constrain": 0.0,
    "train_on_input": True,
    "rescaled": False,
}
_DORA = "preset conv_dim conv_alpha use_tucker rank_dropout bypass_mode dora_wd module_dropout"
# type → (algo, the arguments that are always written)
_LYCORIS: dict[str, tuple[str, str]] = {
    "LyCORIS/BOFT": (
        "boft",
        "preset conv_dim conv_alpha module_dropout use_tucker rank_dropout rank_dropout_scale train_norm",
    ),
    "LyCORIS/Diag-OFT": (
        "diag-oft",
        "preset conv_dim conv_alpha module_dropout use_tucker rank_dropout rank_dropout_scale constraint rescaled "
        "train_norm",
    ),
    "LyCORIS/DyLoRA": (
        "dylora",
        "preset conv_dim conv_alpha use_tucker block_size rank_dropout module_dropout train_norm",
    ),
    "LyCORIS/GLoRA": (
        "glora",
        "preset conv_dim conv_alpha use_tucker rank_dropout module_dropout rank_dropout_scale train_norm",
    ),
    "LyCORIS/iA3": ("ia3", "preset conv_dim conv_alpha train_on_input"),
    "LyCORIS/LoCon": ("locon", f"{_DORA} use_scalar rank_dropout_scale train_norm"),
    "LyCORIS/LoHa": ("loha", f"{_DORA} use_scalar rank_dropout_scale train_norm"),
    "LyCORIS/LoKr": (
        "lokr",
        f"{_DORA} factor use_cp use_scalar decompose_both rank_dropout_scale train_norm",
    ),
    "LyCORIS/Native Fine-Tuning": (
        "full",
        "preset rank_dropout module_dropout rank_dropout_scale train_norm",
    ),
}
# argument → the field of the window, where they differ
_FIELD = {"preset": "LyCORIS_preset", "constraint": "constrain", "block_size": "unit"}
_BLOCKS = (
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "rank_dropout",
    "module_dropout",
)
# type → (module, the arguments that are written if they are not 0, false or empty)
_NATIVE: dict[str, tuple[str, tuple[str, ...]]] = {
    "Standard": ("networks.lora", _BLOCKS),
    "Kohya LoCon": ("networks.lora", _BLOCKS),
    "LoRA-FA": ("networks.lora_fa", _BLOCKS),
    "Kohya DyLoRA": ("networks.dylora", ("conv_dim", "conv_alpha", *_BLOCKS, "unit")),
    "Kohya LoHa": ("networks.loha", ("conv_dim", "use_tucker", "rank_dropout", "module_dropout")),
    "Kohya LoKr": ("networks.lokr", ("conv_dim", "use_tucker", "factor", "rank_dropout", "module_dropout")),
}
_LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


def network(fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """network_module and network_args of the chosen type."""
    kind = str(fields["LoRA_type"])
    kind = "LyCORIS/LoCon" if kind == "LoCon" else kind  # as update_my_data
    if kind in _LYCORIS:
        algorithm, names = _LYCORIS[kind]
        module = "lycoris.kohya"
        arguments = {name: _field(fields, _FIELD.get(name, name)) for name in names.split()}
        arguments["algo"] = algorithm
    elif kind in _NATIVE:
        module, native = _NATIVE[kind]
        arguments = {name: value for name in native if (value := _field(fields, name))}
        _own_rules(kind, fields, arguments)
    else:
        raise ConfigError(
            f"LoRA_type = {clean_text(kind)[:80]}: kohya_ss has no such type for SD1.5 and SDXL",
            f"types: {', '.join([*_NATIVE, *_LYCORIS])}",
        )
    arguments |= {name: value for name in _LORA_PLUS if (value := _field(fields, name))}
    notes.append(
        f"LoRA_type = {kind} → network_module = {module}"
        + (f", algo = {arguments['algo']}" if "algo" in arguments else "")
    )
    return {
        "network_module": module,
        "network_args": [f"{name}={''.join(str(value).split())}" for name, value in arguments.items()],
    }


def _own_rules(kind: str, fields: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    if kind == "Kohya LoCon":
        arguments |= {name: _field(fields, name) for name in ("conv_dim", "conv_alpha")}
    if kind in ("Kohya LoHa", "Kohya LoKr") and "conv_dim" in arguments:
        arguments["conv_alpha"] = _field(fields, "conv_alpha")
    if arguments.get("factor") == -1:
        del arguments["factor"]


def _field(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None:
        value = _USUAL.get(name, False)
    return tidy(as_number(value, value))
