"""What is not for this tool, by its name: other architectures, other programs, other files.

Each has two lines: what the file is, and what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.kohya.frontends.found import leaves, refuse, shown
from trainer.text import clean_text

_MUSUBI = "musubi-tuner"
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
    "wan": ("Wan", _MUSUBI),
    "framepack": ("FramePack", _MUSUBI),
    "qwen_image": ("Qwen-Image", _MUSUBI),
    "zimage": ("Z-Image", _MUSUBI),
    "kandinsky5": ("Kandinsky 5", _MUSUBI),
    "hv_1_5": ("HunyuanVideo 1.5", _MUSUBI),
}
# a key with a value that only this architecture has
_KEYS: dict[str, tuple[str, str]] = {
    "gemma2": _MODULES["lumina"],
    "qwen3": _MODULES["anima"],
    "byt5": _MODULES["hunyuan_image"],
    "clip_g": _MODULES["sd3"],
    "ae": _MODULES["flux"],
    "dit": ("a video or DiT model", _MUSUBI),
}
# a checkbox of kohya_ss' window, or part of lora-scripts' model_train_type
_CHOICES: dict[str, tuple[str, str]] = {
    "flux1_checkbox": _MODULES["flux"],
    "sd3_checkbox": _MODULES["sd3"],
    "lumina_checkbox": _MODULES["lumina"],
    "anima_checkbox": _MODULES["anima"],
    "hunyuan_image_checkbox": _MODULES["hunyuan_image"],
}
_OURS = "this tool trains LoRAs of SD1.5 and SDXL"


def refuse_architecture(path: Path, table: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of another architecture, named."""
    flat = dict(leaves(table))
    if (found := _architecture(flat)) is not None:
        (name, trains), why = found
        refuse(path, f"a configuration for {name} ({why})", f"{_OURS}; use {trains}")


def refuse_script(path: Path, script: str) -> None:
    """Raise ConfigError for a command of another training script."""
    if name := SCRIPTS[script]:
        refuse(path, f"a command for {name} ({script})", f"{_OURS}; run the script itself")
    refuse(
        path, f"a command of {script}, which trains no LoRA", f"{_OURS}; give a command of train_network.py"
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


# Programs, by the keys of their JSON or TOML


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda table: all(name in table for name in names)


def _any(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda table: any(name in table for name in names)


def _all_values(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda table: (
        bool(table) and all(isinstance(value, dict) and name in value for value in table.values())
    )


_TO_TOML = "write its settings into a TOML of sd-scripts; docs/settings.md lists them"
# (does it fit?, what it is, what to do)
_JSON: tuple[tuple[Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (_has("job", "config"), "a job of ai-toolkit", _TO_TOML),
    (_has("training_method"), "a configuration of OneTrainer", _TO_TOML),
    (
        lambda table: "model_family" in table or sum(str(name).startswith("--") for name in table) > 2,
        "a configuration of SimpleTuner",
        _TO_TOML,
    ),
    (_has("compute_environment"), "a configuration of accelerate", "give the TOML of the training itself"),
    (_has("nodes", "links"), "a workflow of ComfyUI", "it draws images; give a training file"),
    (_all_values("class_type"), "a workflow of ComfyUI", "it draws images; give a training file"),
    (
        _has("cells", "nbformat"),
        "a notebook",
        "give the config_file.toml or training_config.toml that it writes",
    ),
    (
        _any("_diffusers_version", "_class_name"),
        "a part of a diffusers model",
        "give the model folder with --base",
    ),
    (_has("peft_type"), "the configuration of a LoRA of PEFT", "give the .safetensors beside it"),
    (_has("architectures"), "a part of a transformers model", "give the model folder with --base"),
    (
        _has("num_vectors_per_token"),
        "a preset of kohya_ss for textual inversion",
        f"{_OURS}; give a LoRA preset",
    ),
    (
        _any("image_folder", "train_text_encoder", "create_buckets"),
        "a preset of kohya_ss for fine-tuning",
        f"{_OURS}; give a LoRA preset",
    ),
    (
        _any("no_token_padding", "learning_rate_te1"),
        "a preset of kohya_ss for DreamBooth",
        f"{_OURS}; give a LoRA preset",
    ),
    (
        _any("ss_network_module", "ss_base_model_version"),
        "the metadata of a LoRA",
        "give the LoRA itself (.safetensors)",
    ),
    (
        _any("activation text", "sd version"),
        "a note of A1111 about a LoRA",
        "give the LoRA itself (.safetensors)",
    ),
    (
        _any("trainedWords", "modelVersions"),
        "a description from civitai",
        "give the LoRA itself (.safetensors)",
    ),
    (
        _any("sd_model_checkpoint", "txt2img/Prompt/value"),
        "a configuration of A1111",
        "it draws images; give a training file",
    ),
    (_all_values("caption"), "captions in one JSON (in_json)", 'name it in a training file: in_json = "…"'),
    (_all_values("tags"), "captions in one JSON (in_json)", 'name it in a training file: in_json = "…"'),
    (
        _all_values("train_resolution"),
        "captions in one JSON (in_json)",
        'name it in a training file: in_json = "…"',
    ),
    (
        _has("learning_rate", "pretrained_model_name_or_path", "instance_data_dir"),
        "arguments of a diffusers script",
        _TO_TOML,
    ),
)
_TOML: tuple[tuple[Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (
        lambda table: isinstance(table.get("prompts"), list),
        "a list of prompts",
        'name it in a training file: sample_prompts = "…"',
    ),
    (_any("build-system", "project"), "a pyproject.toml", "give a training file"),
    (
        lambda table: isinstance(table.get("prompt"), dict) and "subset" in table["prompt"],
        "a file of sample prompts",
        'name it in a training file: sample_prompts = "…"',
    ),
    (
        _any("unet_target_module", "unet_target_name", "enable_conv"),
        "a LyCORIS preset",
        'name it in network_args: "preset=…"',
    ),
    (
        lambda table: isinstance(table.get("adapter"), dict) and "directory" not in table,
        "a configuration of diffusion-pipe",
        _TO_TOML,
    ),
    (lambda table: isinstance(table.get("directory"), list), "a dataset of diffusion-pipe", _TO_TOML),
    (
        lambda table: _first_dataset(
            table, "image_directory", "video_directory", "image_jsonl_file", "video_jsonl_file"
        ),
        f"a dataset file of {_MUSUBI}",
        f"{_OURS}; write image_dir and num_repeats in [[datasets.subsets]], as sd-scripts does",
    ),
)


def _first_dataset(table: Mapping[str, Any], *names: str) -> bool:
    datasets = table.get("datasets")
    return isinstance(datasets, list) and any(
        isinstance(d, dict) and any(n in d for n in names) for d in datasets
    )


def refuse_json(path: Path, value: Any) -> None:
    """Raise ConfigError for JSON of another program; returns for everything unknown."""
    if isinstance(value, list):
        tables = [entry for entry in value if isinstance(entry, dict)]
        if any("instance_data_dir" in table and "type" in table for table in tables):
            refuse(path, "a dataset list of SimpleTuner", _TO_TOML)
        if any("prompt" in table for table in tables):
            refuse(path, "a list of sample prompts", 'name it in a training file: sample_prompts = "…"')
        refuse(path, "a JSON list", "give a training file: a table of settings")
    if not isinstance(value, dict):
        refuse(path, "JSON without settings", "give a training file: a table of settings")
    for fits, what, hint in _JSON:
        if fits(value):
            refuse(path, what, hint)


def refuse_unknown(path: Path, table: Mapping[str, Any], kind: str) -> None:
    """Raise ConfigError for a table without one known setting. A file with one or two keys may just be mistyped."""
    from trainer.config import SETTINGS
    from trainer.kohya.keys import KNOWN_KEYS

    names = {name for name, _ in leaves(table)} - {"output_dir"}
    if len(names) > 2 and not names & (KNOWN_KEYS | set(SETTINGS)):
        listed = ", ".join(clean_text(name)[:40] for name in sorted(names)[:3])
        refuse(
            path,
            f"{kind} without a setting of sd-scripts ({listed}, …)",
            "give a training file; docs/settings.md lists its keys",
        )


def refuse_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Raise ConfigError for TOML of another program."""
    for fits, what, hint in _TOML:
        if fits(table):
            refuse(path, what, hint)


# Files by their first bytes


_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"BM", "a picture (BMP)"),
    (b"PK\x03\x04", "a ZIP archive or a .pt file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "a database (SQLite)"),
    (b"\x7fELF", "a program"),
)
_TRAINING_FILE = "give a training file (TOML)"


def refuse_bytes(path: Path, head: bytes) -> None:
    """Raise ConfigError for a file that is no text, by its first bytes."""
    for magic, what in _MAGIC:
        if head.startswith(magic) and not (magic == b"BM" and b"\0" not in head):
            refuse(path, what, _TRAINING_FILE)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        refuse(path, "a picture (WebP)", _TRAINING_FILE)
    if (
        len(head) > 9
        and head[8:9] == b"{"
        and int.from_bytes(head[:8], "little") < 1 << 28
        and b"\0" in head[:8]
    ):
        refuse(path, "a model or LoRA (.safetensors) under another name", "rename it to .safetensors")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        refuse(path, "UTF-16 text", "save it as UTF-8")
    if b"\0" in head:
        refuse(path, "no text", _TRAINING_FILE)


def refuse_text(path: Path, text: str) -> None:
    """Raise ConfigError for a text that is no settings at all."""
    start = text.lstrip()[:400]
    if not start:
        refuse(path, "empty", _TRAINING_FILE)
    if re.match(r"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        refuse(
            path, "a web page", "download the file itself; on GitHub or Hugging Face use “raw” or “download”"
        )
    if start.startswith("version https://git-lfs"):
        refuse(path, "a Git LFS pointer, not the file itself", "run git lfs pull, or download the file")
    if path.suffix.lower() == ".csv" or re.match(r"\ufeff?name,prompt", start):
        refuse(path, "a table (CSV)", _TRAINING_FILE)
    if path.suffix.lower() == ".py":
        refuse(path, "a Python program", _TRAINING_FILE)


_PAIR = re.compile(r"^\s*(?:- )?[\"']?[\w.-]+[\"']?\s*:(?:\s|$)")


def is_yaml(path: Path, text: str) -> bool:
    """Whether a text is in the form of YAML: most of its lines are ``key: value``."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pairs = sum(_PAIR.match(line) is not None for line in lines)
    return (
        len(lines) > 1 and pairs > len(lines) / 2 and not any("=" in line.split(":")[0] for line in lines[:3])
    )


_YAML: tuple[tuple[str, str, str], ...] = (
    (
        r"^job:\s*['\"]?extension|^\s*-?\s*type:\s*['\"]?sd_trainer|^process:",
        "a job of ai-toolkit (YAML)",
        _TO_TOML,
    ),
    (
        r"^compute_environment:",
        "a configuration of accelerate (YAML)",
        "give the TOML of the training itself",
    ),
    (r"^(_base_|tokenizer_pt|unet:)\b", "a configuration of HCP-Diffusion (YAML)", _TO_TOML),
    (r"^model_family:", "a configuration of SimpleTuner (YAML)", _TO_TOML),
)


def refuse_yaml(path: Path, text: str) -> None:
    for pattern, what, hint in _YAML:
        if re.search(pattern, text, re.MULTILINE):
            refuse(path, what, hint)
    raise ConfigError(f"{shown(path)} is YAML", "write it as TOML: key = value, and texts in quotes")
