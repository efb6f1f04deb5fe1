"""The input of ``hpo train`` as settings: a file of this tool or of sd-scripts, a dataset file, or a LoRA.

Owns the detection of the format, the precedence of values (``--set``, dataset file, file, defaults) and the source
of each value. Does not own the keys of sd-scripts (``trainer.kohya.read``) or datasets (``trainer.data.subsets``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.adapters import BASE_NAME, CONFIG_KEY, kohya_settings, tells_training
from trainer.config import SETTINGS, TrainConfig, squared
from trainer.data import is_dataset_table, read_dataset_file
from trainer.errors import ConfigError, ModelFileError
from trainer.findings import piece
from trainer.kohya.keys import NO_KOHYA_DEFAULT
from trainer.kohya.read import KohyaFile, from_kohya, from_own, is_kohya
from trainer.overrides import read_setting
from trainer.text import clean_text
from trainer.tomlfile import flat, read_table

RUN_CONFIG = "config.json"  # the settings in a run's folder
OUTPUT = "output_dir"
KOHYA_FILLS, SAVED = "sd-scripts' defaults", "saved settings"
ITS_BASE = "its base was"
SAMPLES = ("sample_prompts", "sample_every_n_epochs", "sample_every_n_steps", "sample_at_first")
# Of two settings for the training length, giving one removes the other.
RIVALS = {"max_train_epochs": "max_train_steps", "max_train_steps": "max_train_epochs"}


@dataclass(frozen=True)
class TrainFile:
    """The settings of a run and their sources. ``origins`` names the source of each setting that is not a
    default; ``defaults`` says whose defaults are used for the rest. The lists contain lines for the user."""

    path: Path
    form: str
    config: TrainConfig
    origins: Mapping[str, str]
    defaults: str
    translated: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    output_dir: str | None = None

    def require_all(self) -> TrainFile:
        """Raise ConfigError if any setting was refused, because the result would differ from the request."""
        if self.refused:
            raise ConfigError(
                f"{clean_text(str(self.path))} has settings that are not supported: {'; '.join(self.refused)}",
                "remove these lines if you do not need them",
            )
        return self


def read_train_file(
    path: Path,
    *,
    dataset: Path | None = None,
    sets: Iterable[str] = (),
    places: Mapping[str, Any] | None = None,
) -> TrainFile:
    """All settings of a run, validated. ``dataset`` is a dataset file, ``sets`` are key=value texts,
    ``places`` are settings with their own command-line options (--base, --data).

    Raises ConfigError, or ModelFileError for a LoRA without training metadata.
    """
    file = _read(Path(path))
    dataset_path = dataset or (Path(file.config.dataset_config) if file.config.dataset_config else None)
    if dataset_path and "train_data_dir" not in (places or {}):
        file = _with_dataset(file, dataset_path)
    given: dict[str, tuple[Any, str]] = {}
    for text in sets:
        with piece():
            name, value = read_setting(text)
            given[name] = (value, "--set")
    given |= {name: (value, "command line") for name, value in (places or {}).items()}
    return _without_lost_prompts(_filled(_with_values(file, given)))


def _read(path: Path) -> TrainFile:
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() == ".safetensors":
        return _read_lora(path)
    table = read_table(path)
    if not is_dataset_table(table):
        return _read_settings(path, flat(path, table))
    rest = {name: value for name, value in table.items() if name not in ("general", "datasets")}
    file = (
        _read_settings(path, flat(path, rest))
        if rest
        else TrainFile(path, "a dataset file of sd-scripts", TrainConfig(), {}, "this tool's defaults")
    )
    return replace(file, config=file.config.with_values({"dataset_config": str(path)}))


def _read_settings(path: Path, settings: Mapping[str, Any]) -> TrainFile:
    if is_kohya(name for name in settings if name != OUTPUT):
        return _of_kohya(path, "a configuration of sd-scripts", from_kohya(path, settings), "file")
    own = {name: value for name, value in settings.items() if name != OUTPUT}
    config = from_own(path, own)
    output = settings.get(OUTPUT)
    return TrainFile(
        path,
        "settings of this tool",
        config,
        dict.fromkeys(own, "file"),
        "this tool's defaults",
        output_dir=output if isinstance(output, str) else None,
    )


def _of_kohya(path: Path, form: str, file: KohyaFile, origin: str) -> TrainFile:
    return TrainFile(
        path,
        form,
        file.config,
        dict.fromkeys(file.given, origin),
        KOHYA_FILLS,
        file.translated,
        file.without_effect,
        file.refused,
        file.differs,
        file.output_dir,
    )


def _read_folder(folder: Path) -> TrainFile:
    """A folder of ``hpo train`` (config.json) or of a trial (params.json)."""
    for name, inner in ((RUN_CONFIG, None), ("params.json", "train")):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                values = values if inner is None else values[inner]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"{clean_text(str(file))} cannot be read", "give a TOML file") from None
            return _from_saved(folder, "a run of this tool", values)
    raise ConfigError(
        f"{clean_text(str(folder))} has no {RUN_CONFIG} and no params.json",
        "give a TOML file, a LoRA, or the folder of a run or a trial",
    )


def _from_saved(path: Path, form: str, values: Any) -> TrainFile:
    """Settings saved by this tool, possibly by an older or newer version."""
    if not isinstance(values, dict):
        raise ConfigError(f"the settings in {clean_text(str(path))} are not a table", "give a TOML file")
    known = {name: value for name, value in values.items() if name in SETTINGS}
    unknown = tuple(
        f"{clean_text(str(name))[:80]} = {clean_text(str(value))[:80]}: this version has no such setting"
        for name, value in values.items()
        if name not in SETTINGS
    )
    usual = TrainConfig().as_dict()
    config = TrainConfig().with_values(known)
    origins = {name: SAVED for name, value in config.as_dict().items() if value != usual[name]}
    return TrainFile(path, form, config, origins, "this tool's defaults", refused=unknown)


def _with_dataset(file: TrainFile, path: Path) -> TrainFile:
    """Apply the settings in a dataset file; they override those of the file."""
    found = read_dataset_file(path)
    values = {**found.settings, "dataset_config": str(path)}
    return replace(
        file,
        config=file.config.with_values(values),
        origins={**file.origins, **dict.fromkeys(values, "dataset file")},
        without_effect=(*file.without_effect, *found.without_effect),
        refused=(*file.refused, *found.refused),
    )


def _with_values(file: TrainFile, given: Mapping[str, tuple[Any, str]]) -> TrainFile:
    values = {name: value for name, (value, _) in given.items()}
    origins = {**file.origins, **{name: origin for name, (_, origin) in given.items()}}
    lines = []
    for name, rival in RIVALS.items():
        if values.get(name) is not None and rival not in values and getattr(file.config, rival) is not None:
            lines.append(f"{rival} = {getattr(file.config, rival)} → ignored, because {name} is given")
            values[rival] = None
            origins.pop(rival, None)
    if "train_data_dir" in values and file.config.dataset_config:
        lines.append(
            f"dataset_config = {clean_text(file.config.dataset_config)} → ignored, because --data is given"
        )
        values["dataset_config"] = ""
        origins.pop("dataset_config", None)
    return replace(
        file,
        config=TrainConfig.of({**file.config.as_dict(), **squared(values)}),
        origins=origins,
        translated=(*file.translated, *lines),
    )


def _filled(file: TrainFile) -> TrainFile:
    """A file of sd-scripts with the settings that have no default in sd-scripts: our defaults are reported,
    the base must be given."""
    if file.defaults != KOHYA_FILLS:
        return file
    if "pretrained_model_name_or_path" not in file.origins:
        known = [line for line in file.without_effect if line.startswith(ITS_BASE)]
        hint = known[0] if known else "set pretrained_model_name_or_path, or give --base"
        with piece():
            raise ConfigError(f"{clean_text(str(file.path))} does not name a base", hint)
    lines = [
        f"{name} = unset → {getattr(file.config, name)}; sd-scripts has no default"
        for name in NO_KOHYA_DEFAULT
        if name not in file.origins
    ]
    return replace(file, translated=(*file.translated, *lines))


def _without_lost_prompts(file: TrainFile) -> TrainFile:
    """Settings from another machine, without sample images if the prompt file is missing here."""
    prompts = file.config.sample_prompts
    if file.origins.get("sample_prompts") != SAVED or Path(prompts).is_file():
        return file
    usual = TrainConfig().as_dict()
    line = f"{', '.join(SAMPLES)}: the file {clean_text(prompts)} does not exist, so no sample images are generated"
    return replace(
        file,
        config=file.config.with_values({name: usual[name] for name in SAMPLES}),
        origins={name: origin for name, origin in file.origins.items() if name not in SAMPLES},
        without_effect=(*file.without_effect, line),
    )


# LoRA files


def _read_lora(path: Path) -> TrainFile:
    """The settings in the metadata of a LoRA: those of this tool if present, else those of sd-scripts."""
    from trainer.tensorfile import read_header  # loads torch

    metadata = read_header(path).metadata
    if CONFIG_KEY in metadata:
        try:
            values = json.loads(metadata[CONFIG_KEY])
        except ValueError:
            raise ModelFileError(f"the settings in {path} are damaged", "give a TOML file") from None
        return _from_saved(path, "a LoRA of this tool", values)
    if not tells_training(metadata):
        raise ModelFileError(
            f"{path} has no metadata about its training", "its metadata was removed; give a TOML file instead"
        )
    settings = kohya_settings(metadata)
    file = _of_kohya(path, "a LoRA of sd-scripts", from_kohya(path, settings), "metadata")
    notes = [
        f"{name}: not in the metadata" for name in ("train_data_dir", "caption_extension", "save_precision")
    ]
    base = metadata.get(BASE_NAME, "None")
    if base != "None":
        notes.append(f"{ITS_BASE} {clean_text(base)[:80]}: name it with --base")
    return replace(file, without_effect=(*file.without_effect, *notes))
