"""Architectures that are not for this tool, by their name: FLUX.1, SD3, Lumina, Anima, Wan and others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.kohya.frontends.found import leaves, refuse
from trainer.text import clean_text

MUSUBI = "musubi-tuner"
# script of sd-scripts → what it trains
SCRIPTS = {
    "flux_train_network.py": "FLUX.1",
    "sd3_train_network.py": "Stable Diffusion 3",
    "lumina_train_network.py": "Lumina Image 2.0",
    "anima_train_network.py": "Anima",
    "hunyuan_image_train_network.py": "HunyuanImage-2.1",
    "flux_train.py": "FLUX.1",
    "sd3_train.py": "Stable Diffusion 3",
    "anima_train.py": "Anima",
    "train_db.py": "",
    "fine_tune.py": "",
    "sdxl_train.py": "",
    "train_textual_inversion.py": "",
    "sdxl_train_textual_inversion.py": "",
    "train_controlnet.py": "",
    "sdxl_train_control_net.py": "",
    "train_leco.py": "",
    "sdxl_train_leco.py": "",
    "wan_train_network.py": "Wan (musubi-tuner)",
    "hv_train_network.py": "HunyuanVideo (musubi-tuner)",
    "fpack_train_network.py": "FramePack (musubi-tuner)",
    "qwen_image_train_network.py": "Qwen-Image (musubi-tuner)",
    "flux_kontext_train_network.py": "FLUX.1 Kontext (musubi-tuner)",
    "zimage_train_network.py": "Z-Image (musubi-tuner)",
}
# part of a network_module → (architecture, what trains it)
_MODULES: dict[str, tuple[str, str]] = {
    "hunyuan_image": ("HunyuanImage-2.1", "sd-scripts (hunyuan_image_train_network.py)"),
    "flux": ("FLUX.1", "sd-scripts (flux_train_network.py)"),
    "sd3": ("Stable Diffusion 3", "sd-scripts (sd3_train_network.py)"),
    "lumina": ("Lumina Image 2.0", "sd-scripts (lumina_train_network.py)"),
    "anima": ("Anima", "sd-scripts (anima_train_network.py)"),
    "wan": ("Wan", MUSUBI),
    "framepack": ("FramePack", MUSUBI),
    "qwen_image": ("Qwen-Image", MUSUBI),
    "zimage": ("Z-Image", MUSUBI),
    "kandinsky5": ("Kandinsky 5", MUSUBI),
    "hv_1_5": ("HunyuanVideo 1.5", MUSUBI),
}
# a key with a value that only this architecture has
_KEYS: dict[str, tuple[str, str]] = {
    "gemma2": _MODULES["lumina"],
    "qwen3": _MODULES["anima"],
    "byt5": _MODULES["hunyuan_image"],
    "clip_g": _MODULES["sd3"],
    "ae": _MODULES["flux"],
    "dit": ("a video or DiT model", MUSUBI),
}
# a section of LoRA_Easy_Training_Scripts and its forks
_SECTIONS = {"flux_args": _MODULES["flux"], "anima_args": _MODULES["anima"]}
# a checkbox of kohya_ss' window, or part of lora-scripts' model_train_type
_CHOICES: dict[str, tuple[str, str]] = {
    "flux1_checkbox": _MODULES["flux"],
    "sd3_checkbox": _MODULES["sd3"],
    "lumina_checkbox": _MODULES["lumina"],
    "anima_checkbox": _MODULES["anima"],
    "hunyuan_image_checkbox": _MODULES["hunyuan_image"],
}
OURS = "this tool trains LoRAs of SD1.5 and SDXL"


def refuse_architecture(path: Path, table: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of another architecture, named."""
    for name, (architecture, trains) in _SECTIONS.items():
        if isinstance(section := table.get(name), Mapping) and section.get("args"):
            refuse(path, f"a configuration for {architecture} (it has {name})", f"{OURS}; use {trains}")
    flat = dict(leaves(table))
    if (found := _architecture(flat)) is not None:
        (name, trains), why = found
        refuse(path, f"a configuration for {name} ({why})", f"{OURS}; use {trains}")


def refuse_script(path: Path, script: str) -> None:
    """Raise ConfigError for a command of another training script."""
    if name := SCRIPTS[script]:
        refuse(path, f"a command for {name} ({script})", f"{OURS}; run the script itself")
    refuse(
        path, f"a command of {script}, which trains no LoRA", f"{OURS}; give a command of train_network.py"
    )


def _architecture(flat: Mapping[str, Any]) -> tuple[tuple[str, str], str] | None:
    module = str(flat.get("network_module") or "")
    kind = str(flat.get("model_train_type") or "")
    lora = str(flat.get("LoRA_type") or "")
    for part, known in _MODULES.items():
        if re.search(rf"networks\.(\w+_)?{part}$", module):
            return known, f"network_module = {clean_text(module)[:80]}"
        if kind.startswith(part.replace("_image", "")):
            return known, f"model_train_type = {clean_text(kind)[:40]}"
    for name, known in _CHOICES.items():
        if flat.get(name) is True:
            return known, f"{name} is set"
    for name in ("Flux1", "Anima", "Lumina", "HunyuanImage-2.1"):
        if lora.startswith(name):
            key = {"Flux1": "flux", "HunyuanImage-2.1": "hunyuan_image"}.get(name, name.lower())
            return _MODULES[key], f"LoRA_type = {clean_text(lora)[:40]}"
    if "LoRA_type" in flat:  # kohya_ss saves the fields of all architectures, whichever is chosen
        return None
    for name, known in _KEYS.items():
        value = flat.get(name)
        if isinstance(value, str) and value:
            return known, f"it has {name}"
    if isinstance(flat.get("t5xxl"), str) and flat["t5xxl"] and not module:
        return _MODULES["flux"], "it has t5xxl"
    return None
