"""What a file says, before anything is checked: a file of this tool or of sd-scripts, a folder of a run, or a LoRA.

Owns the detection of the form. Does not own what wins over a file (``trainer.kohya.trainfile``) or what the keys of
sd-scripts mean (``trainer.kohya.read``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.adapters import BASE_NAME, CONFIG_KEY, kohya_settings, tells_training
from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.findings import piece
from trainer.kohya.frontends import recognise
from trainer.kohya.keys import KNOWN_KEYS
from trainer.kohya.read import is_kohya, known_only
from trainer.kohya.sections import join
from trainer.paths import is_prompt_text, user_path
from trainer.reading import MAX_SETTINGS_BYTES, read_small
from trainer.text import clean_text
from trainer.tomlfile import flat

RUN_CONFIG = "config.json"  # the settings in a run's folder
OUTPUT = "output_dir"
HEALTH = "health"
SAVED = "saved settings"
ITS_BASE = "its base was"
# Settings that are paths, or may be one (a base can be a short name).
PATHS = frozenset(
    {
        "pretrained_model_name_or_path",
        "train_data_dir",
        "reg_data_dir",
        "conditioning_data_dir",
        "dataset_config",
        "sample_prompts",
        "network_weights",
        "logging_dir",
        "vae",
        "in_json",
        OUTPUT,
    }
)


@dataclass(frozen=True)
class Source:
    """What a file says, before anything is checked. ``values`` have kohya's names and sd-scripts' meaning if
    ``is_kohya``; ``origin`` is the source that they are shown with, ``output_dir`` that of a file of this tool.
    ``health``: the section for the command that watches the run, which is no setting of the training."""

    path: Path
    form: str
    values: Mapping[str, Any]
    origin: str = "file"
    is_kohya: bool = False
    sections: Mapping[str, str] = field(default_factory=dict)
    translated: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    output_dir: str | None = None
    health: Mapping[str, Any] = field(default_factory=dict)


# Paths


def path_of(name: str, value: Any) -> Any:
    """The value of a setting; a path that the user wrote is read as one."""
    if name not in PATHS or not isinstance(value, str) or not value:
        return value
    if name == "sample_prompts" and is_prompt_text(value):
        return value
    return user_path(value, name)


def _lost(name: str) -> contextlib.AbstractContextManager[None]:
    """Sample prompts that cannot be read end no training: ``hpo.train.promptfile`` warns."""
    return contextlib.suppress(ConfigError) if name == "sample_prompts" else contextlib.nullcontext()


def with_paths(source: Source, but: Collection[str]) -> Source:
    """The source with its paths read as a user's, but for settings that are given elsewhere."""
    if source.origin == SAVED:
        return source
    values = dict(source.values)
    for name, value in source.values.items():
        if name not in but:
            with piece(), _lost(name):
                values[name] = path_of(name, value)
    output = source.output_dir
    if output and OUTPUT not in but:
        with piece():
            output = path_of(OUTPUT, output)
    return replace(source, values=values, output_dir=output)


# Formats


def open_source(path: Path, *, either_is_kohya: bool = False) -> Source:
    """Read a file or folder. Settings that both this tool and sd-scripts have are read as those of this tool, or with
    ``either_is_kohya`` as those of sd-scripts. Raises ConfigError or ModelFileError if there are no settings."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".safetensors":
        return _open_lora(path)
    found = recognise(path)
    if found.is_translated:
        source = Source(path, found.form, dict(found.settings), is_kohya=True, translated=found.notes)
    elif found.dataset is None:
        return _open_settings(path, found.settings, either_is_kohya)
    else:
        rest = {name: value for name, value in found.settings.items() if name not in ("general", "datasets")}
        source = _open_settings(path, rest, either_is_kohya) if rest else Source(path, found.form, {})
    if found.dataset is None:
        return source
    return replace(source, values={**source.values, "dataset_config": str(path)})


def _open_settings(path: Path, table: Mapping[str, Any], either_is_kohya: bool) -> Source:
    health = table.get(HEALTH, {})
    if isinstance(health, Mapping):
        table = {name: value for name, value in table.items() if name != HEALTH}
    else:  # refused as an unknown key
        health = {}
    joined = join(table)
    names = [name for name in joined.values if name != OUTPUT]
    if is_kohya(names) or (either_is_kohya and KNOWN_KEYS.issuperset(names)):
        return Source(
            path,
            "a configuration of sd-scripts",
            joined.values,
            is_kohya=True,
            sections=joined.sections,
            translated=joined.repeated,
            health=health,
        )
    settings = flat(path, table)
    output = settings.pop(OUTPUT, None)
    return Source(
        path,
        "settings of this tool",
        known_only(path, settings),
        output_dir=output if isinstance(output, str) else None,
        health=health,
    )


def _open_folder(folder: Path) -> Source:
    """A folder of ``hpo train`` (config.json) or of a trial (params.json)."""
    for name, inner in ((RUN_CONFIG, None), ("params.json", "train")):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(read_small(file, MAX_SETTINGS_BYTES))
                values = values if inner is None else values[inner]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(f"{clean_text(str(file))} cannot be read", "give a TOML file") from None
            return _saved(folder, "a run of this tool", values)
    raise ConfigError(
        f"{clean_text(str(folder))} has no {RUN_CONFIG} and no params.json",
        "give a TOML file, a LoRA, or the folder of a run or a trial",
    )


def _saved(path: Path, form: str, values: Any) -> Source:
    """Settings saved by this tool, possibly by an older or newer version."""
    if not isinstance(values, dict):
        raise ConfigError(f"the settings in {clean_text(str(path))} are not a table", "give a TOML file")
    usual = TrainConfig().as_dict()
    known = {name: value for name, value in values.items() if name in SETTINGS and value != usual[name]}
    unknown = tuple(
        f"{clean_text(str(name))[:80]} = {clean_text(str(value))[:80]}: this version has no such setting"
        for name, value in values.items()
        if name not in SETTINGS
    )
    return Source(path, form, known, SAVED, refused=unknown)


def _open_lora(path: Path) -> Source:
    """The settings in the metadata of a LoRA: those of this tool if present, else those of sd-scripts."""
    from trainer.tensorfile import read_header  # loads torch

    metadata = read_header(path).metadata
    if CONFIG_KEY in metadata:
        try:
            values = json.loads(metadata[CONFIG_KEY])
        except ValueError:
            raise ModelFileError(f"the settings in {path} are damaged", "give a TOML file") from None
        return _saved(path, "a LoRA of this tool", values)
    if not tells_training(metadata):
        raise ModelFileError(
            f"{path} has no metadata about its training", "its metadata was removed; give a TOML file instead"
        )
    notes = [
        f"{name}: not in the metadata" for name in ("train_data_dir", "caption_extension", "save_precision")
    ]
    base = metadata.get(BASE_NAME, "None")
    if base != "None":
        notes.append(f"{ITS_BASE} {clean_text(base)[:80]}: name it with --base")
    return Source(
        path,
        "a LoRA of sd-scripts",
        kohya_settings(metadata),
        "metadata",
        is_kohya=True,
        without_effect=tuple(notes),
    )
