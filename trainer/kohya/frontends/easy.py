"""Configurations of LoRA_Easy_Training_Scripts (TOML): its sections as settings and a dataset description.

Rules as in its backend 162e56d, ``utils/validation.py`` (validate_args, validate_dataset_args, validate_warmup_ratio),
and its window ae5ce07, ``main_ui_files/MainUI.py`` (perform_name_replace). One difference: the backend counts the
images to turn ``warmup_ratio`` into steps; sd-scripts reads a share as well, so here it stays one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.datasetforms import easy_dataset, is_easy
from trainer.kohya.frontends.found import Found, leaves, refuse

FORM = "a configuration of LoRA_Easy_Training_Scripts"
# Choices of the window that are no settings of sd-scripts, besides those below.
_WINDOW = frozenset(
    {
        "easy_name",
        "tag_occurrence",
        "tag_file_location",
        "save_toml",
        "save_toml_location",
        "sdxl",
        "fa",
        "warmup_ratio",
    }
)
_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args")
_NAMED = ("output_dir", "output_name", "resume", "log_prefix")
# Its own optimizers (validate_optimizer).
_OPTIMIZERS = {
    "came": "LoraEasyCustomOptimizer.came.CAME",
    "compass": "LoraEasyCustomOptimizer.compass.Compass",
    "lpfadamw": "LoraEasyCustomOptimizer.lpfadamw.LPFAdamW",
    "rmsprop": "LoraEasyCustomOptimizer.rmsprop.RMSProp",
}
__all__ = ["FORM", "is_easy", "read_easy"]


def read_easy(path: Path, table: Mapping[str, Any]) -> Found:
    """The settings of a configuration. Raises ConfigError for one that trains no LoRA."""
    if str(dict(leaves(table)).get("train_mode", "lora")).lower() != "lora":
        refuse(path, f"{FORM} for textual inversion", "this tool trains LoRAs; give a LoRA configuration")
    groups = [
        part["args"]
        for part in table.values()
        if isinstance(part, Mapping) and isinstance(part.get("args"), Mapping)
    ]
    fields = {name: value for group in groups for name, value in group.items()}
    settings: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in fields.items():
        if name in _LISTS and isinstance(value, Mapping):
            settings[name] = [
                _argument(key, entry) for key, entry in value.items() if not (key == "preset" and entry == "")
            ]
        elif name not in _WINDOW and value and not (isinstance(value, str) and value.lower() == "false"):
            settings[name] = True if isinstance(value, str) and value.lower() == "true" else value
    settings = {name: value for name, value in settings.items() if value != []}
    settings["network_module"] = _module(fields, notes)
    if (share := fields.get("warmup_ratio")) is not None:
        settings["lr_warmup_steps"] = share
        notes.append(f"warmup_ratio = {share} → lr_warmup_steps = {share} of all steps")
    kind = str(settings.get("optimizer_type", "")).lower()
    if kind in _OPTIMIZERS:
        settings["optimizer_type"] = _OPTIMIZERS[kind]
    _name(fields, settings, notes)
    if "sdxl" in fields:
        notes.append(f"sdxl = {str(fields['sdxl']).lower()}: the base's file says so")
    return Found(FORM, settings, easy_dataset(table), tuple(notes), is_translated=True)


def _argument(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{name}={','.join(str(entry) for entry in value)}"
    shown = str(value)
    return f"{name}={shown.capitalize() if shown in ('true', 'false') else shown}"


def _module(fields: Mapping[str, Any], notes: list[str]) -> str:
    arguments = fields.get("network_args")
    names: Any = arguments if isinstance(arguments, Mapping) else {}
    module = "networks.lora"
    if fields.get("fa"):
        module = "networks.lora_fa"
    if "unit" in names:
        module = "networks.dylora"
    if "algo" in names:
        module = "lycoris.kohya"
    module = str(fields.get("network_module") or module)
    notes.append(f"network_module = {module}, as its backend chooses it")
    return module


def _name(fields: Mapping[str, Any], settings: dict[str, Any], notes: list[str]) -> None:
    """The window's ``${replace}`` stands for easy_name."""
    for name in _NAMED:
        value = settings.get(name)
        if isinstance(value, str) and "${replace}" in value:
            settings[name] = value.replace("${replace}", str(fields.get("easy_name", "")))
            notes.append(f"{name} → {settings[name]}, with easy_name")
