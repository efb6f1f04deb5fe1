"""What ``hpo train`` is given – a file of ours, of sd-scripts, a dataset file, a LoRA – as settings.

Owns telling the forms apart, the order in which values win (``--set``, dataset file, file, defaults) and where each
value came from.  Reading sd-scripts' keys is ``trainer.kohya.read``'s, datasets are ``trainer.data.subsets``'.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import SETTINGS, TrainConfig
from trainer.data import is_dataset_table, read_dataset_file
from trainer.errors import ConfigError, ModelFileError
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
# The one of two settings that decides the length goes when the other is given.
RIVALS = {"max_train_epochs": "max_train_steps", "max_train_steps": "max_train_epochs"}


@dataclass(frozen=True)
class TrainFile:
    """The settings of a run, and where they came from.  ``origins`` names a source for each setting that no
    default decides; ``defaults`` says whose defaults fill the rest.  The lists are lines to read."""

    path: Path
    form: str
    config: TrainConfig
    origins: Mapping[str, str]
    defaults: str
    translated: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    output_dir: str | None = None

    def require_all(self) -> TrainFile:
        """Raise ConfigError if anything was refused: the result would not be what was asked for."""
        if self.refused:
            raise ConfigError(
                f"{clean_text(str(self.path))} asks for what is not built in: {'; '.join(self.refused)}",
                "remove these lines if you can do without them",
            )
        return self


def read_train_file(
    path: Path,
    *,
    dataset: Path | None = None,
    sets: Iterable[str] = (),
    places: Mapping[str, Any] | None = None,
) -> TrainFile:
    """Everything that decides a run, checked.  ``dataset`` is a dataset file, ``sets`` are key=value texts,
    ``places`` are settings that the command line has words of its own for (--base, --data).

    Raises ConfigError, or ModelFileError for a LoRA that says nothing of its training.
    """
    file = _read(Path(path))
    dataset_path = dataset or (Path(file.config.dataset_config) if file.config.dataset_config else None)
    if dataset_path and "train_data_dir" not in (places or {}):
        file = _with_dataset(file, dataset_path)
    given = {name: (value, "--set") for name, value in map(read_setting, sets)}
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
    """Settings that this tool saved, perhaps an older or newer version of it."""
    if not isinstance(values, dict):
        raise ConfigError(f"the settings in {clean_text(str(path))} are no table", "give a TOML file")
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
    """The settings of the run that a dataset file decides: they win over the file's."""
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
            lines.append(f"{rival} = {getattr(file.config, rival)} → not used, since {name} is given")
            values[rival] = None
            origins.pop(rival, None)
    if "train_data_dir" in values and file.config.dataset_config:
        lines.append(
            f"dataset_config = {clean_text(file.config.dataset_config)} → not used, since --data is given"
        )
        values["dataset_config"] = ""
        origins.pop("dataset_config", None)
    return replace(
        file,
        config=file.config.with_values(values),
        origins=origins,
        translated=(*file.translated, *lines),
    )


def _filled(file: TrainFile) -> TrainFile:
    """A file of sd-scripts with what sd-scripts has no default for: ours is said, a base must be named."""
    if file.defaults != KOHYA_FILLS:
        return file
    if "pretrained_model_name_or_path" not in file.origins:
        known = [line for line in file.without_effect if line.startswith(ITS_BASE)]
        hint = known[0] if known else "set pretrained_model_name_or_path, or give --base"
        raise ConfigError(f"{clean_text(str(file.path))} names no base", hint)
    lines = [
        f"{name} = unset → {getattr(file.config, name)}; sd-scripts has no default"
        for name in NO_KOHYA_DEFAULT
        if name not in file.origins
    ]
    return replace(file, translated=(*file.translated, *lines))


def _without_lost_prompts(file: TrainFile) -> TrainFile:
    """Settings that were saved elsewhere, without samples if their prompts are not here."""
    prompts = file.config.sample_prompts
    if file.origins.get("sample_prompts") != SAVED or Path(prompts).is_file():
        return file
    usual = TrainConfig().as_dict()
    line = f"{', '.join(SAMPLES)}: the file {clean_text(prompts)} is not here, so no samples are drawn"
    return replace(
        file,
        config=file.config.with_values({name: usual[name] for name in SAMPLES}),
        origins={name: origin for name, origin in file.origins.items() if name not in SAMPLES},
        without_effect=(*file.without_effect, line),
    )


# LoRA files

# kohya's metadata → the key of a configuration file.
_METADATA = {
    "ss_output_name": "output_name",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "unet_lr",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_network_module": "network_module",
    "ss_network_dim": "network_dim",
    "ss_network_alpha": "network_alpha",
    "ss_network_dropout": "network_dropout",
    "ss_mixed_precision": "mixed_precision",
    "ss_full_fp16": "full_fp16",
    "ss_v2": "v2",
    "ss_clip_skip": "clip_skip",
    "ss_max_token_length": "max_token_length",
    "ss_seed": "seed",
    "ss_lowram": "lowram",
    "ss_cache_latents": "cache_latents",
    "ss_noise_offset": "noise_offset",
    "ss_noise_offset_random_strength": "noise_offset_random_strength",
    "ss_multires_noise_iterations": "multires_noise_iterations",
    "ss_multires_noise_discount": "multires_noise_discount",
    "ss_adaptive_noise_scale": "adaptive_noise_scale",
    "ss_zero_terminal_snr": "zero_terminal_snr",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_caption_dropout_rate": "caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "ss_caption_tag_dropout_rate": "caption_tag_dropout_rate",
    "ss_face_crop_aug_range": "face_crop_aug_range",
    "ss_prior_loss_weight": "prior_loss_weight",
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_scale_weight_norms": "scale_weight_norms",
    "ss_ip_noise_gamma": "ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength": "ip_noise_gamma_random_strength",
    "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_loss_type": "loss_type",
    "ss_huber_schedule": "huber_schedule",
    "ss_huber_scale": "huber_scale",
    "ss_huber_c": "huber_c",
    "ss_fp8_base": "fp8_base",
    "ss_fp8_base_unet": "fp8_base_unet",
    "ss_training_comment": "training_comment",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_resolution": "resolution",
    "ss_enable_bucket": "enable_bucket",
    "ss_min_bucket_reso": "min_bucket_reso",
    "ss_max_bucket_reso": "max_bucket_reso",
    "ss_bucket_no_upscale": "bucket_no_upscale",
    "ss_keep_tokens": "keep_tokens",
    "ss_keep_tokens_separator": "keep_tokens_separator",
    "ss_shuffle_caption": "shuffle_caption",
    "ss_color_aug": "color_aug",
    "ss_flip_aug": "flip_aug",
    "ss_random_crop": "random_crop",
}
# Entries of a dataset in ss_datasets → the key of a configuration file.
_DATASET_METADATA = {
    "batch_size_per_device": "train_batch_size",
    "resolution": "resolution",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
}
_SUBSET_METADATA = ("shuffle_caption", "keep_tokens", "color_aug", "flip_aug", "random_crop")
_TEXTS = frozenset({"output_name", "network_module", "lr_scheduler", "mixed_precision", "training_comment"})


def _read_lora(path: Path) -> TrainFile:
    """The settings in a LoRA's metadata: ours if they are there, else sd-scripts'."""
    from trainer.adapters import CONFIG_KEY  # loads torch
    from trainer.tensorfile import read_header

    metadata = read_header(path).metadata
    if CONFIG_KEY in metadata:
        try:
            values = json.loads(metadata[CONFIG_KEY])
        except ValueError:
            raise ModelFileError(f"the settings in {path} are damaged", "give a TOML file") from None
        return _from_saved(path, "a LoRA of this tool", values)
    if not any(name in metadata for name in _METADATA):
        raise ModelFileError(
            f"{path} does not say how it was trained", "its metadata was removed; write a TOML file instead"
        )
    settings = kohya_settings(metadata)
    file = _of_kohya(path, "a LoRA of sd-scripts", from_kohya(path, settings), "metadata")
    notes = [
        f"{name}: the metadata does not tell it"
        for name in ("train_data_dir", "caption_extension", "save_precision")
    ]
    base = metadata.get("ss_sd_model_name", "None")
    if base != "None":
        notes.append(f"{ITS_BASE} {clean_text(base)[:80]}: name it with --base")
    return replace(file, without_effect=(*file.without_effect, *notes))


def kohya_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """sd-scripts' metadata as the keys of its configuration file."""
    settings: dict[str, Any] = {}
    for name, key in _METADATA.items():
        if name in metadata:
            settings[key] = metadata[name] if key in _TEXTS else _value(metadata[name])
    settings |= _dataset_settings(metadata.get("ss_datasets", ""))
    settings |= _length(metadata)
    settings["optimizer_type"], arguments = _optimizer(metadata.get("ss_optimizer", ""))
    if arguments:
        settings["optimizer_args"] = arguments
    settings["network_args"] = [f"{k}={v}" for k, v in _json(metadata.get("ss_network_args", "")).items()]
    side = settings.get("resolution")
    if isinstance(side, tuple | list):
        settings["resolution"] = ",".join(str(part) for part in side)
    if settings.get("text_encoder_lr") == []:
        settings["text_encoder_lr"] = None
    return {name: value for name, value in settings.items() if value not in (None, "None", "")}


def _length(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The steps that were asked for; sd-scripts keeps the epochs they came to beside them."""
    steps = _value(metadata.get("ss_max_train_steps", "None"))
    if steps is not None:
        return {"max_train_steps": steps}
    return {"max_train_epochs": _value(metadata.get("ss_num_epochs", "None"))}


def _dataset_settings(text: str) -> dict[str, Any]:
    """Settings of the first dataset in ss_datasets."""
    try:
        datasets = json.loads(text) if text else []
    except ValueError:
        datasets = []
    if not isinstance(datasets, list) or not datasets or not isinstance(datasets[0], dict):
        return {}
    first = datasets[0]
    found = {key: first[name] for name, key in _DATASET_METADATA.items() if name in first}
    subsets = first.get("subsets")
    if isinstance(subsets, list) and subsets and isinstance(subsets[0], dict):
        found |= {name: subsets[0][name] for name in _SUBSET_METADATA if name in subsets[0]}
    return found


def _optimizer(text: str) -> tuple[str | None, list[str]]:
    """``bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))`` → its name and arguments."""
    match = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", text.strip(), re.DOTALL)
    if match is None:
        return None, []
    arguments = re.findall(r"(\w+)=((?:\([^)]*\)|\[[^]]*\]|[^,()])+)", match[2] or "")
    return match[1].rpartition(".")[2], [f"{name}={value.strip()}" for name, value in arguments]


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text and text != "None" else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _value(text: str) -> Any:
    """A value as sd-scripts writes it into metadata: Python's own text form."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
