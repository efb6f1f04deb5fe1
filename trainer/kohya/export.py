"""Export of our settings to sd-scripts: config.toml, dataset.toml and the command line for both.

Owns the translation of our settings to sd-scripts' keys. Does not own the opposite direction; see
``trainer.kohya.read``. Settings that sd-scripts does not support are refused or reported, never dropped silently.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from trainer.bases import FAMILIES
from trainer.config import LYCORIS_PRESETS, SETTINGS, TrainConfig
from trainer.data import DRAWN_ANEW, OWN_KEYS, RUN_KEYS, Subset, parts_of, read_dataset_file
from trainer.errors import ConfigError, MissingData
from trainer.files import write_atomic
from trainer.kohya.exportrates import exported_optimizer, exported_schedule
from trainer.kohya.keys import KOHYA_DEFAULTS, LYCORIS_SETTINGS, NETWORK_ARGUMENTS, OURS_ALONE
from trainer.paths import is_prompt_text
from trainer.text import clean_text

CONFIG, DATASET, COMMAND = "config.toml", "dataset.toml", "train.sh"
# Settings in dataset.toml, and settings with a different form in sd-scripts.
_IN_DATASET = (
    *RUN_KEYS.values(), *OWN_KEYS, "train_data_dir", "dataset_config", "reg_data_dir", "in_json", "dataset_repeats",
)  # fmt: skip
_IN_SUBSETS = ("alpha_mask", "conditioning_data_dir")  # sd-scripts accepts them there only
_OTHERWISE = ("mixed_precision", "max_train_epochs", "max_train_steps", "optimizer_type")
_RATES = ("optimizer_args", "lr_scheduler", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps")
_LISTS = ("base_weights", "base_weights_multiplier")
_PLACES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json", "conditioning_data_dir")
_PATHS = ("sample_prompts", "logging_dir", "network_weights")
# Settings that sd-scripts does not have → what differs without them.
_MISSING = {
    "micro_batch_size": "sd-scripts computes the whole batch at once: more memory, the result is the same",
    "cpu_offload": "sd-scripts keeps everything on the GPU: more memory, the result is the same",
    "checkpoint_blocks": "sd-scripts recomputes all blocks: slower, the result is the same",
    "opt_channels_last": "sd-scripts does not support this layout: slower, the result is the same",
    "rank_dropout_rows": "sd-scripts drops ranks with networks.lora, LyCORIS rows of the weight change",
    "hold_out_references": "sd-scripts trains on these images too; to exclude them, move them to another folder",
}
_ALGORITHMS = {
    "DoRA": "locon",
    "LoHa": "loha",
    "LoKr": "lokr",
    "Full": "full",
    "IA3": "ia3",
    "OFT": "diag-oft",
    "BOFT": "boft",
    "GLoRA": "glora",
}
_LYCORIS_ALONE = {**_ALGORITHMS, "DyLoRA": "dylora"}  # with a preset or an option of LyCORIS
_MODULES = {"DyLoRA": "networks.dylora", "LoRA-FA": "networks.lora_fa"}


@dataclass(frozen=True)
class Export:
    """The two tables, the command line, and lines about differences."""

    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    command: str
    notes: tuple[str, ...]


def to_kohya(config: TrainConfig, family: str, base: str, folder: Path, output: str = "output") -> Export:
    """Convert ``config`` for sd-scripts. ``base`` is the model path or id for sd-scripts; the files will be
    written to ``folder``. Paths are absolute, because the command runs in another folder."""
    folder = folder.resolve()
    if Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())
    notes = _said(config, family)
    table = _settings(config, notes)
    table = {
        "pretrained_model_name_or_path": base,
        "output_dir": _full(output),
        **table,
        **_network(config, family, notes),
    }
    command = (
        f"accelerate launch --num_cpu_threads_per_process 1 {FAMILIES[family].kohya_script} "
        f"--config_file {_quoted(folder / CONFIG)} --dataset_config {_quoted(folder / DATASET)}"
    )
    return Export(table, _dataset(config), command, tuple(notes))


def write(found: Export, folder: Path) -> None:
    """Write config.toml, dataset.toml and train.sh into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, tomlkit.dumps(dict(found.config)))
    write_atomic(folder / DATASET, tomlkit.dumps(dict(found.dataset)))
    write_atomic(
        folder / COMMAND,
        f"#!/bin/sh\n# run this in the folder of sd-scripts\n{found.command}\n",
    )


def one_file(config: TrainConfig, family: str, base: str, head: Sequence[str], output: str = "output") -> str:
    """All settings as one file for sd-scripts' ``--config_file``: what ``to_kohya`` writes into a dataset file stands
    in it as options.  ``head``: lines for its top.  The images need not be there.  Paths are absolute."""
    notes = _said(config, family)
    if Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())
    table = {
        "pretrained_model_name_or_path": base,
        "output_dir": _full(output),
        **_of_images(config),
        **_settings(config, notes),
        **_network(config, family, notes),
    }
    if _is_plain(config):
        notes.append(
            "sd-scripts finds no images with this file: train_data_dir needs folders named like '10_name class'; "
            "for a dataset file instead: hpo export kohya"
        )
    lines = [f"# {line}" for text in (*head, *notes) for line in textwrap.wrap(clean_text(text), 100)]
    return "\n".join([*lines, "", tomlkit.dumps(table)])


def _is_plain(config: TrainConfig) -> bool:
    """Whether the images lie in a folder without the subfolders (repeats, name) that sd-scripts looks for."""
    root = Path(config.train_data_dir)
    if config.dataset_config or config.in_json or not config.train_data_dir or not root.is_dir():
        return False
    return not any(place.is_dir() and place.name.partition("_")[0].isdecimal() for place in root.iterdir())


def _of_images(config: TrainConfig) -> dict[str, Any]:
    """The settings of a dataset file as options of sd-scripts' command line."""
    table: dict[str, Any] = {}
    for name in _IN_DATASET:
        value = getattr(config, name)
        if name in OURS_ALONE or value in (None, ""):
            continue
        if name == "resolution":  # sd-scripts splits the text at its comma
            value = ",".join(map(str, config.size_px))
        elif value == KOHYA_DEFAULTS.get(name, getattr(TrainConfig(), name)):
            continue
        elif name in _PLACES:
            value = _full(value)
        table[name] = value
    if not config.validation_split:  # sd-scripts up to v0.9.1 refuses the key
        table.pop("validation_split", None)
        table.pop("validation_seed", None)
    return table


def _settings(config: TrainConfig, notes: list[str]) -> dict[str, Any]:
    """Settings that have the same name in sd-scripts but a different default."""
    table: dict[str, Any] = {}
    for name, value in config.as_dict().items():
        if name in (*_IN_DATASET, *_OTHERWISE, *_RATES, *OURS_ALONE) or name.startswith("pretrained"):
            continue
        usual = KOHYA_DEFAULTS.get(name, getattr(TrainConfig(), name))
        if value not in (None, "") and (value != usual or name in ("output_name", "seed", "learning_rate")):
            if name == "sample_prompts" and is_prompt_text(value):
                notes.append("sample_prompts are left out: sd-scripts reads them from a file")
                continue
            if name in _LISTS:
                continue
            is_path = name in _PATHS or (name == "vae" and Path(value).exists())
            table[name] = _full(value) if is_path else value
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16"
        notes.append("mixed_precision = auto → bf16; change it to fp16 for a GPU without bf16")
    length = (
        {"max_train_steps": config.max_train_steps}
        if config.max_train_steps is not None
        else {"max_train_epochs": config.max_train_epochs}
    )
    anew = any(getattr(config, name) for name in DRAWN_ANEW)  # sd-scripts refuses them with cached latents
    if anew:
        table["cache_latents_to_disk"] = False
    if config.base_weights:
        from trainer.adapters import base_weights  # loads torch

        merged = base_weights(config)
        table["base_weights"] = [_full(str(path)) for path, _ in merged]
        table["base_weights_multiplier"] = [multiplier for _, multiplier in merged]
    return {
        **table,
        **length,
        "mixed_precision": precision,
        **exported_optimizer(config, notes),
        **exported_schedule(config, notes),
        "network_dim": config.network_dim,
        "network_alpha": config.network_alpha,
        "save_model_as": "safetensors",
        **({} if anew else {"cache_latents": True}),
        "sdpa": True,
    }


def _said(config: TrainConfig, family: str) -> list[str]:
    """Lines about settings that sd-scripts does not support."""
    usual = TrainConfig()
    lines = [
        f"{name} is left out: {why}"
        for name, why in _MISSING.items()
        if getattr(config, name) != getattr(usual, name)
    ]
    steps = FAMILIES[family].kohya_bucket_steps
    if config.enable_bucket and config.bucket_reso_steps % steps:
        lines.append(
            f"bucket_reso_steps = {config.bucket_reso_steps}: sd-scripts refuses this, it needs a multiple of {steps}"
        )
    if config.validation_split:
        lines.append("validation_split needs a version of sd-scripts after v0.9.1")
    return lines


def _network(config: TrainConfig, family: str, notes: list[str]) -> dict[str, Any]:
    """network_module and network_args."""
    arguments: list[str] = []
    usual = TrainConfig()
    for name in NETWORK_ARGUMENTS:
        value = getattr(config, name)
        if value not in (None, "") and value != getattr(usual, name):
            arguments.append(f"{name}={value}")
    if config.conv_dim is not None and config.conv_alpha is None:
        arguments.append(f"conv_alpha={config.network_alpha:g}")  # the default of sd-scripts is 1
    first, second = config.effective_text_encoder_lrs
    if len(FAMILIES[family].text_encoders) > 1 and first != second and not config.text_encoder_frozen:
        raise ConfigError(
            f"sd-scripts has one rate for both text encoders, but the settings have {first:g} and {second:g}",
            "set text_encoder_lr1 equal to text_encoder_lr2",
        )
    extra: dict[str, Any] = {}
    if config.text_encoder_lr1 is not None or config.text_encoder_lr2 is not None:
        extra["text_encoder_lr"] = first
    if config.text_encoder_frozen and config.trains_text_encoder:
        extra["text_encoder_lr"] = 0.0
        notes.append("text_encoder_frozen → text_encoder_lr = 0")
    if config.network_type == "OFT" and config.oft_blocks:
        return {**extra, **_networks_oft(config)}
    module = _MODULES.get(config.network_type, "networks.lora")
    options = [name for name in LYCORIS_SETTINGS if getattr(config, name) != getattr(usual, name)]
    is_lycoris = config.network_type in _ALGORITHMS or config.lycoris_preset or set(options) - {"unit"}
    if is_lycoris and config.network_type == "LoRA-FA":
        asked = ", ".join([*options, *(["lycoris_preset"] if config.lycoris_preset else [])])
        raise ConfigError(
            f"sd-scripts' networks.lora_fa has no {asked}", "remove them, or use another network_type"
        )
    arguments += [
        f"{'block_size' if is_lycoris and name == 'unit' else name}={getattr(config, name)}"
        for name in options
    ]
    if is_lycoris:
        module = "lycoris.kohya"
        arguments.insert(0, f"algo={_LYCORIS_ALONE.get(config.network_type, 'locon')}")
        if config.network_type == "DyLoRA" and "unit" not in options:
            arguments.append(f"block_size={config.unit}")  # the default of LyCORIS is 4
        if config.rank_dropout and not config.rank_dropout_rows:
            notes.append(
                "rank_dropout: LyCORIS drops rows of the weight change and does not scale up the rest"
            )
        if config.network_type == "DoRA":
            arguments += ["dora_wd=True", "wd_on_output=False"]
        if config.lycoris_preset:
            is_file = config.lycoris_preset not in LYCORIS_PRESETS
            arguments.append(f"preset={_full(config.lycoris_preset) if is_file else config.lycoris_preset}")
        elif config.conv_dim is None:
            arguments.append("preset=attn-mlp")
        else:
            notes.append("LyCORIS also trains conv_in, conv_out and time_embedding; this tool does not")
        notes.append(f"{config.network_type} needs LyCORIS in sd-scripts: pip install lycoris_lora")
    extra["network_module"] = module
    if arguments:
        extra["network_args"] = arguments
    return extra


def _networks_oft(config: TrainConfig) -> dict[str, Any]:
    """sd-scripts' networks.oft, whose network_dim is a number of blocks and whose network_alpha the constraint."""
    is_other = (
        config.lycoris_preset not in ("", "attn-only")
        or config.trains_text_encoder
        or config.train_norm
        or config.rescaled
        or config.conv_dim not in (None, config.network_dim)
        or not config.constraint
    )
    if is_other:
        raise ConfigError(
            "oft_blocks is the OFT of sd-scripts' networks.oft, which trains the U-Net's attention or all its blocks, "
            "with a constraint",
            "set network_train_unet_only = true and constraint = 0.001, and leave out lycoris_preset, train_norm and "
            "rescaled; or set oft_blocks = false",
        )
    switches = [] if config.lycoris_preset else ["enable_all_linear=True"]
    switches += ["enable_conv=True"] if config.conv_dim and not config.lycoris_preset else []
    return {
        "network_module": "networks.oft",
        "network_alpha": config.constraint,
        **({"network_args": switches} if switches else {}),
    }


def _dataset(config: TrainConfig) -> dict[str, Any]:
    """The dataset file: [general] with the run's settings, one dataset, one subset per folder."""
    general: dict[str, Any] = {}
    for key, setting in RUN_KEYS.items():
        if key == "resolution" and config.resolution_height:
            general[key] = list(config.size_px)
        elif (value := getattr(config, setting)) is not None:
            general[key] = value
    for name in OWN_KEYS:
        value = getattr(config, name)
        if value not in ("", None) and value != KOHYA_DEFAULTS.get(name, getattr(TrainConfig(), name)):
            general[name] = value
    for name in _IN_SUBSETS:
        general.pop(name, None)
    if not config.validation_split:  # sd-scripts up to v0.9.1 refuses the key
        general.pop("validation_split", None)
        general.pop("validation_seed", None)
    datasets: dict[int, dict[str, Any]] = {}
    for subset in _subsets(config):
        entry = datasets.setdefault(subset.dataset, {**_of_dataset(subset), "subsets": []})
        entry["subsets"].append(_subset(subset, config))
    return {"general": general, "datasets": list(datasets.values())}


def _of_dataset(subset: Subset) -> dict[str, Any]:
    """The settings that one of several datasets has for itself."""
    own = dict(subset.own)
    found = {key: own[setting] for key, setting in RUN_KEYS.items() if own.get(setting) is not None}
    if own.get("resolution_height"):
        found["resolution"] = [own["resolution"], own["resolution_height"]]
    return found


def _subset(subset: Subset, config: TrainConfig) -> dict[str, Any]:
    table: dict[str, Any] = {"num_repeats": subset.repeats(config)}
    for name in ("image_dir", "metadata_file"):
        if place := getattr(subset, name):
            table[name] = _full(place)
    if subset.class_tokens:
        table["class_tokens"] = subset.class_tokens
    if subset.is_reg:
        table["is_reg"] = True
    if config.masked_loss and config.conditioning_data_dir and not subset.is_reg:
        table["conditioning_data_dir"] = _full(config.conditioning_data_dir)
    if config.alpha_mask:
        table["alpha_mask"] = True
    own = {name: value for name, value in subset.own if name in OWN_KEYS}
    if own.get("conditioning_data_dir"):
        own["conditioning_data_dir"] = _full(own["conditioning_data_dir"])
    return table | own


def _full(path: str) -> str:
    return str(Path(path).resolve())


def _subsets(config: TrainConfig) -> list[Subset]:
    if config.dataset_config:
        return list(read_dataset_file(Path(config.dataset_config)).subsets)
    if config.in_json:
        return [Subset(config.train_data_dir, metadata_file=config.in_json)]
    if not config.train_data_dir:
        raise ConfigError("no training images are given", "set train_data_dir, or give --data FOLDER")
    found = _folders(Path(config.train_data_dir), is_reg=False)
    return found + (_folders(Path(config.reg_data_dir), is_reg=True) if config.reg_data_dir else [])


def _folders(root: Path, *, is_reg: bool) -> list[Subset]:
    if not root.is_dir():
        raise MissingData(f"the dataset folder {clean_text(str(root))} does not exist", "give it with --data")
    parts, _ = parts_of(root, 1)
    return [
        Subset(
            str(part.images[0].parent.resolve()),
            part.repeats,
            " ".join(word for word in (part.trigger, part.class_word) if word),
            is_reg,
        )
        for part in parts
    ]


def _quoted(path: Path) -> str:
    """A path quoted for a shell."""
    text = str(path)
    return text if all(c.isalnum() or c in "/._-" for c in text) else "'" + text.replace("'", "'\\''") + "'"


assert set(_OTHERWISE) | set(OWN_KEYS) <= set(SETTINGS)
