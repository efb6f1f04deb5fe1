"""What is not for this tool, by its name: files of other programs, and what is no training file at all.

Each has two lines: what the file is, and what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.kohya.frontends.architectures import MUSUBI, OURS
from trainer.kohya.frontends.found import leaves, refuse, shown
from trainer.text import clean_text

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
        f"{OURS}; give a LoRA preset",
    ),
    (
        _any("image_folder", "train_text_encoder", "create_buckets"),
        "a preset of kohya_ss for fine-tuning",
        f"{OURS}; give a LoRA preset",
    ),
    (
        _any("no_token_padding", "learning_rate_te1"),
        "a preset of kohya_ss for DreamBooth",
        f"{OURS}; give a LoRA preset",
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
    (
        _has("study", "space"),
        "a study file",
        "give it to hpo search; hpo train takes the settings of one LoRA",
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
        f"a dataset file of {MUSUBI}",
        f"{OURS}; write image_dir and num_repeats in [[datasets.subsets]], as sd-scripts does",
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
