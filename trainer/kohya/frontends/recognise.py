"""Recognise a training file by its form, and read it.

Owns the order of the questions: bytes, text, JSON, commands, YAML, TOML. Each form has a module of its own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.datasetforms import is_easy, split_dataset
from trainer.errors import ConfigError
from trainer.kohya.frontends import commandline, easy, kohya_ss, lora_scripts, others, syntax
from trainer.kohya.frontends.architectures import refuse_architecture
from trainer.kohya.frontends.found import Found, leaves, refuse, shown
from trainer.reading import MAX_SETTINGS_BYTES, open_file

SCRIPTS = (".sh", ".bat", ".cmd", ".ps1")


def recognise(path: Path, content: bytes | None = None) -> Found:
    """What a file is, and its settings. ``content`` are its bytes, if they were read already.

    Raises ConfigError for everything that is not for this tool, named, and for text that cannot be read as TOML or
    JSON, with the line.
    """
    path = Path(path)
    text = _text(path, content)
    others.refuse_text(path, text)
    suffix, start = path.suffix.lower(), text.lstrip()
    if suffix in (".json", ".ipynb") or start.startswith("{"):
        return _json(path, text)
    if suffix in SCRIPTS or start.startswith("#!"):
        return commandline.read_command(path, text)
    if suffix in (".yaml", ".yml"):
        others.refuse_yaml(path, text)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        return _not_toml(path, text, error)
    return _toml(path, table)


def _text(path: Path, content: bytes | None) -> str:
    try:
        if content is None:
            with open_file(path) as file:
                head = file.read(4096)
                others.refuse_bytes(path, head)
                content = head + file.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {shown(path)}: {error.strerror}", "check the path") from error
    others.refuse_bytes(path, content[:4096])
    if len(content) > MAX_SETTINGS_BYTES:
        raise ConfigError(f"{shown(path)} is larger than 1 MB", "give a TOML file with settings")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shown(path)} is not UTF-8 text (byte {error.start})", "save it as UTF-8"
        ) from error


def _not_toml(path: Path, text: str, error: Exception) -> Found:
    if commandline.is_command(text):
        return commandline.read_command(path, text)
    if others.is_yaml(path, text):
        others.refuse_yaml(path, text)
    what, hint = syntax.toml_mistake(text, error)
    raise ConfigError(
        f"{shown(path)}: {what}" if what.startswith("line") else f"{shown(path)} {what}", hint
    ) from error


def _toml(path: Path, table: Mapping[str, Any]) -> Found:
    _refuse_broken_paths(path, table)
    refuse_architecture(path, table)
    if is_easy(table):
        return easy.read_easy(path, table)
    if lora_scripts.is_lora_scripts(table):
        return lora_scripts.read_lora_scripts(path, table)
    others.refuse_toml(path, table)
    settings, dataset = split_dataset(table)
    others.refuse_unknown(path, settings, "TOML")
    form = (
        "a dataset file of sd-scripts" if dataset is not None and not settings else "a TOML file of settings"
    )
    return Found(form, settings, dataset)


def _json(path: Path, text: str) -> Found:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what, hint = syntax.json_mistake(text, error.msg, error.lineno)
        raise ConfigError(f"{shown(path)}: {what}", hint) from error
    except (ValueError, RecursionError):
        refuse(path, "not valid JSON", "give a TOML file with settings")
    if isinstance(value, dict):
        refuse_architecture(path, value)
        if kohya_ss.is_preset(value):
            return _preset(value)
        if is_easy(value):
            return easy.read_easy(path, value)
        if lora_scripts.is_lora_scripts(value):
            return lora_scripts.read_lora_scripts(path, value)
        if isinstance(value.get("train"), dict) and "values" in value:
            refuse(path, "the record of a trial (params.json)", "give the folder of the trial")
    if not (isinstance(value, dict) and "network_module" in value):
        others.refuse_json(path, value)
    if not value:
        refuse(path, "JSON without settings", "give a training file: a table of settings")
    settings, dataset = split_dataset({name: entry for name, entry in value.items() if entry is not None})
    others.refuse_unknown(path, settings, "JSON")
    form = (
        "a dataset file of sd-scripts (JSON)"
        if dataset is not None and not settings
        else "a JSON file of settings"
    )
    return Found(form, settings, dataset)


def _preset(value: Mapping[str, Any]) -> Found:
    settings, notes = kohya_ss.settings_of(value)
    saved = kohya_ss.was_saved_beside_a_lora(value)
    form = (
        "settings that kohya_ss saved beside a LoRA (JSON)"
        if saved
        else "a preset of kohya_ss' window (JSON)"
    )
    return Found(form, settings, notes=notes, is_translated=True)


def _refuse_broken_paths(path: Path, table: Mapping[str, Any]) -> None:
    for name, value in leaves(table):
        if (written := syntax.broken_path(value)) is not None:
            raise ConfigError(
                f"{name} in {shown(path)} is not the path it looks like: {written[:160]}",
                "write it in single quotes, or with /: a backslash in double quotes has a meaning of its own",
            )
