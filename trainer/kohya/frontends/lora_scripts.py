"""Configurations of lora-scripts (Akegarasu): fields of its window as settings of sd-scripts.

Rules as in lora-scripts fdefba9 (``mikazuki/app/api.py``) and its window (lora-gui-dist: parseParams). Its saved files
are settings of sd-scripts already; files with fields of the window are translated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.kohya.frontends.found import Found, as_number, refuse, tidy

FORM = "a configuration of lora-scripts"
_MARKS = frozenset(
    {
        "model_train_type",
        "lycoris_algo",
        "lokr_factor",
        "dylora_unit",
        "network_args_custom",
        "optimizer_args_custom",
        "ui_custom_params",
        "enable_preview",
        "enable_block_weights",
        "enable_base_weight",
        "prodigy_d_coef",
        "positive_prompts",
        "randomly_choice_prompt",
    }
)
_NUMBERS = ("learning_rate", "unet_lr", "text_encoder_lr")
_UNSET_AT_ZERO = (
    "vae",
    "reg_data_dir",
    "network_weights",
    "noise_offset",
    "multires_noise_iterations",
    "multires_noise_discount",
    "caption_dropout_rate",
    "network_dropout",
    "scale_weight_norms",
)
_SAMPLES = ("sample_prompts", "sample_sampler", "sample_every_n_epochs")
_PROMPT = (
    "positive_prompts",
    "negative_prompts",
    "sample_width",
    "sample_height",
    "sample_cfg",
    "sample_seed",
    "sample_steps",
    "prompt_file",
    "randomly_choice_prompt",
)
_BLOCKS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
# Fields that the window leaves out of what it saves: a file with one of them holds the fields themselves.
_WINDOW = _MARKS - {"model_train_type", "positive_prompts", "randomly_choice_prompt"}
_SD15_ONLY = ("v2", "v_parameterization", "scale_v_pred_loss_like_noise_pred", "clip_skip")
_GONE = frozenset(
    {*_MARKS, *_PROMPT, *_BLOCKS, "conv_dim", "conv_alpha", "dropout", "train_norm", "prodigy_d0", "gpu_ids"}
)


def is_lora_scripts(table: Mapping[str, Any]) -> bool:
    return bool(_MARKS & set(table)) or _is_template(table)


def _is_template(table: Mapping[str, Any]) -> bool:
    return isinstance(table.get("data"), Mapping) and isinstance(table.get("metadata"), Mapping)


def read_lora_scripts(path: Path, table: Mapping[str, Any]) -> Found:
    """The settings of a file of lora-scripts. Raises ConfigError for a template, and for one that trains no LoRA."""
    if _is_template(table):
        refuse(
            path,
            "a template of lora-scripts, with the changed fields only",
            "open it there, and give the file it saves",
        )
    kind = str(table.get("model_train_type", "sd-lora"))
    if not kind.endswith("-lora"):
        refuse(path, f"{FORM} for {kind}", "this tool trains LoRAs of SD1.5 and SDXL")
    notes: list[str] = []
    holds_fields = bool(_WINDOW & set(table))
    left_out = {*_GONE, *(_SD15_ONLY if holds_fields and kind.startswith("sdxl") else ())}
    settings = {name: value for name, value in table.items() if name not in left_out}
    if arguments := _network_args(table):
        settings["network_args"] = [*_list(table, "network_args"), *arguments]
        notes.append(f"network_args = {', '.join(arguments)}")
    if arguments := _optimizer_args(table, holds_fields):
        settings["optimizer_args"] = arguments
    if holds_fields and str(table.get("optimizer_type", "")).lower().startswith("dada"):
        settings |= dict.fromkeys(_NUMBERS, 1.0)
    _preview(table, settings, notes)
    if not table.get("enable_base_weight", True):
        settings.pop("base_weights", None)
        settings.pop("base_weights_multiplier", None)
    for name in _NUMBERS:
        if name in settings:
            settings[name] = as_number(settings[name], settings[name])
    kept = {
        name: value
        for name, value in settings.items()
        if not (name in _UNSET_AT_ZERO and value in (0, "", False))
    }
    if "model_train_type" in table:
        notes.append(f"model_train_type = {kind}: the base's file says so")
    return Found(FORM, kept, notes=tuple(notes), is_translated=True)


def _network_args(table: Mapping[str, Any]) -> list[str]:
    """network_args of the window's fields (parseParams)."""
    found: list[str] = []
    module = table.get("network_module")
    if module == "lycoris.kohya" and "lycoris_algo" in table:
        usual = {"conv_dim": 4, "conv_alpha": 1, "dropout": 0}
        found += [f"{name}={tidy(table.get(name, value))}" for name, value in usual.items()]
        found.append(f"algo={table['lycoris_algo']}")
        if table.get("lokr_factor"):
            found.append(f"factor={table['lokr_factor']}")
        if table.get("train_norm"):
            found.append("train_norm=True")
    elif module == "networks.dylora" and "dylora_unit" in table:
        found.append(f"unit={table['dylora_unit']}")
    if table.get("enable_block_weights"):
        found += [f"{name}={table[name]}" for name in _BLOCKS if name in table]
    return found + _list(table, "network_args_custom")


def _optimizer_args(table: Mapping[str, Any], holds_fields: bool) -> list[str]:
    kind = str(table.get("optimizer_type", "")).lower()
    found = _list(table, "optimizer_args")
    if kind == "prodigy" and "prodigy_d_coef" in table:
        found += [
            "decouple=True",
            "weight_decay=0.01",
            "use_bias_correction=True",
            f"d_coef={table['prodigy_d_coef']}",
        ]
        found += ["safeguard_warmup=True"] if table.get("lr_warmup_steps") else []
        found += [f"d0={table['prodigy_d0']}"] if table.get("prodigy_d0") else []
    elif holds_fields and kind in ("dadaptation", "dadaptadam"):
        found += ["decouple=True", "weight_decay=0.01"]
    return found + _list(table, "optimizer_args_custom")


def _list(table: Mapping[str, Any], name: str) -> list[str]:
    value = table.get(name)
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)] if value else []


def _preview(table: Mapping[str, Any], settings: dict[str, Any], notes: list[str]) -> None:
    """Sample images: one prompt in the fields (get_sample_prompts), or a file; none unless they are switched on."""
    if table.get("enable_preview") is False:
        for name in _SAMPLES:
            settings.pop(name, None)
        return
    if file := str(table.get("prompt_file") or "").strip():
        settings["sample_prompts"] = file
    elif table.get("positive_prompts") and not table.get("randomly_choice_prompt"):
        parts = [str(table["positive_prompts"]).strip()]
        if negative := str(table.get("negative_prompts") or "").strip():
            parts.append(f"--n {negative}")
        usual = {"w": ("sample_width", 512), "h": ("sample_height", 512), "l": ("sample_cfg", 7)}
        usual |= {"s": ("sample_steps", 24), "d": ("sample_seed", 2333)}
        parts += [f"--{flag} {table.get(name, value)}" for flag, (name, value) in usual.items()]
        settings["sample_prompts"] = " ".join(" ".join(parts).split())
    elif table.get("randomly_choice_prompt"):
        notes.append("randomly_choice_prompt: no sample images; give sample_prompts")
        for name in _SAMPLES:
            settings.pop(name, None)
