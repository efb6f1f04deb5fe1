"""Metadata of a LoRA file: sd-scripts' ss_* keys both ways, modelspec's, and this tool's own.

One table lists for each ss_* key its setting, how it is written and how it is read. Does not own the file
(``lorafile``) or what sd-scripts' settings mean here (``trainer.kohya``).  Loads no torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import optimizers
from trainer.config import TrainConfig
from trainer.data import Dataset, batches_per_epoch, length_of, tag_frequency, warmup_steps
from trainer.files import sha256_file
from trainer.paths import is_prompt_text

if TYPE_CHECKING:
    from trainer.bases import Base

CONFIG_KEY = "lora_hpo_config"  # every setting, as JSON
BASE_KEY = "lora_hpo_base"
DATASET_KEY = "lora_hpo_dataset"  # Dataset.content_hash of what a run of hpo train trained on
PRIVATE = "metadata.json"  # in a run's folder: what its LoRA files do not say, with no_metadata
COMMENT, STEPS, EPOCH = "ss_training_comment", "ss_steps", "ss_epoch"
RESOLUTION, BASE_NAME = "ss_resolution", "ss_sd_model_name"
FOLDERS = (
    "dataset_config",
    "in_json",
    "reg_data_dir",
    "conditioning_data_dir",
    "sample_prompts",
    "logging_dir",
    "network_weights",
    "lycoris_preset",
)
# LyCORIS' names
ALGORITHMS = {
    "DoRA": "lora",
    "LoHa": "loha",
    "LoKr": "lokr",
    "Full": "full",
    "IA3": "ia3",
    "OFT": "diag-oft",
    "BOFT": "boft",
    "GLoRA": "glora",
}
MODULES = {"DyLoRA": "networks.dylora", "LoRA-FA": "networks.lora_fa"}
_OPTIONS = (
    "full_matrix",
    "decompose_both",
    "unbalanced_factorization",
    "use_tucker",
    "use_scalar",
    "rs_lora",
    "train_norm",
    "constraint",
    "rescaled",
)

Written = Callable[["Base", TrainConfig], object]
Read = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A key of sd-scripts' metadata.

    ``setting`` is the key of its configuration file that it tells, or None if it tells several or none.
    ``written`` gives the value for a LoRA of this tool; ``read`` gives keys of a configuration file.  None
    where the key is not written or not read here.
    """

    key: str
    setting: str | None
    written: Written | None
    read: Read | None


def training_metadata(base: Base, config: TrainConfig) -> dict[str, str]:
    """sd-scripts' ss_* entries: readers choose the family by ss_base_model_version and show the rest."""
    values = {entry.key: str(entry.written(base, config)) for entry in ENTRIES if entry.written}
    return values | _vae(config)


def _vae(config: TrainConfig) -> dict[str, str]:
    """The VAE that was given, as sd-scripts writes it (train_network.py): name, and for a file both its hashes. The
    short one is that of sd-scripts' ``model_hash``: 64 KiB from 1 MiB on."""
    if not config.vae:
        return {}
    path = Path(config.vae)
    if not path.exists():
        return {"ss_vae_name": config.vae}
    if not path.is_file():
        return {"ss_vae_name": path.name}
    with path.open("rb") as file:
        file.seek(0x100000)
        short = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return {"ss_vae_name": path.name, "ss_vae_hash": short, "ss_new_vae_hash": sha256_file(path)}


@dataclass(frozen=True)
class Saved:
    """Where in a run of ``hpo train`` a file is saved: after this step, in this epoch."""

    step: int
    epoch: int


def dataset_metadata(config: TrainConfig, dataset: Dataset, saved: Saved | None = None) -> dict[str, str]:
    """sd-scripts' ss_* entries that depend on the images: how many, the run's length in steps, and how often
    each tag is in the captions of a folder.  A file saved by a run also names the folders and images.

    Training and regularisation images are counted apart, repeats included, as sd-scripts does
    (train_network.py; DreamBoothDataset in library/train_util.py).  Of the regularisation images those that
    are trained on: sd-scripts counts what their folders hold, before it repeats some or leaves them out.
    """
    batches = batches_per_epoch(config, dataset)
    run = length_of(config, batches)
    values = {
        "ss_num_train_images": _samples(dataset, is_reg=False),
        "ss_max_train_steps": run.total_steps,
        "ss_num_epochs": run.total_epochs,
        "ss_lr_warmup_steps": warmup_steps(config, run.total_steps),
        STEPS: saved.step if saved else run.total_steps,
        EPOCH: saved.epoch if saved else run.total_epochs,
        "ss_tag_frequency": json.dumps(tag_frequency(dataset), sort_keys=saved is None),
    }
    regularisation = _samples(dataset, is_reg=True)
    if regularisation or saved:
        values["ss_num_reg_images"] = regularisation
    if saved:
        values |= {
            "ss_num_batches_per_epoch": batches,
            "ss_dataset_dirs": json.dumps(_folders(dataset)),
            COMMENT: config.training_comment or "None",
            DATASET_KEY: dataset.content_hash,
        }
    return {name: str(value) for name, value in values.items()}


def own_metadata(base: Base, config: TrainConfig) -> dict[str, str]:
    """The entries that modelspec 1.0.1 requires, the prediction type, and all settings in this tool's form."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.facts.kohya_architecture,
        "modelspec.implementation": base.facts.kohya_implementation,
        "modelspec.title": config.output_name,
        "modelspec.resolution": "{}x{}".format(*config.size_px),
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else base.prediction_type,
        CONFIG_KEY: json.dumps(shared_settings(config, base.name)),
        BASE_KEY: base.identity,
    }


# What sd-scripts keeps of its own keys under no_metadata (library/train_util.py: SS_METADATA_MINIMUM_KEYS).
_LEAST = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


def least(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file under no_metadata says: what its network is and which base it fits, as in sd-scripts, which keeps
    modelspec's entries too. No tags, folders, comment, settings or hashes of images and base."""
    return {name: text for name, text in metadata.items() if name in _LEAST or name.startswith("modelspec.")}


def shared_settings(config: TrainConfig, base_name: str) -> dict[str, object]:
    """The settings as stored in a LoRA file: folders of this machine by name only."""
    values = config.as_dict() | {"pretrained_model_name_or_path": base_name, "train_data_dir": ""}
    paths = [name for name in FOLDERS if values[name] and not is_prompt_text(str(values[name]))]
    if config.vae and Path(config.vae).exists():
        paths.append("vae")
    values |= {name: Path(str(values[name])).name for name in paths}
    files = [Path(part.strip()).name for part in config.base_weights.split(";") if part.strip()]
    return values | {"base_weights": ";".join(files)}


def tells_training(metadata: Mapping[str, str]) -> bool:
    """Whether sd-scripts' metadata is there at all: many pages that share LoRA files remove it."""
    return any(entry.setting and entry.key in metadata for entry in ENTRIES)


def kohya_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """sd-scripts' metadata as the keys of its configuration file."""
    settings: dict[str, Any] = {}
    for entry in ENTRIES:
        if entry.read and entry.key in metadata:
            settings |= entry.read(metadata[entry.key])
    return {name: value for name, value in settings.items() if value not in (None, "None", "")}


# What is written


def network_module(config: TrainConfig) -> str:
    """The network module of sd-scripts that trains these settings."""
    options = any(getattr(config, name) for name in _OPTIONS)
    is_lycoris = config.network_type in ALGORITHMS or bool(config.lycoris_preset) or options
    return MODULES.get(config.network_type, "lycoris.kohya" if is_lycoris else "networks.lora")


def network_args(config: TrainConfig) -> dict[str, object]:
    """What sd-scripts takes as network_args for these settings: of networks.lora, or of lycoris.kohya."""
    values: dict[str, object] = {}
    if network_module(config) == "lycoris.kohya":
        values["algo"] = ALGORITHMS.get(config.network_type, "locon")
    if config.lycoris_preset:
        values["preset"] = Path(config.lycoris_preset).name
    values |= {name: getattr(config, name) for name in _OPTIONS if getattr(config, name)}
    if config.network_type == "DyLoRA":
        values["unit"] = config.unit
    if config.network_type == "DoRA":
        values |= {"dora_wd": True, "wd_on_output": False}
    if config.network_type == "LoKr":
        values["factor"] = config.factor
    if config.conv_dim is not None:
        conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
        values |= {"conv_dim": config.conv_dim, "conv_alpha": conv_alpha}
    rates = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
    plus = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    blocks = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    names = ("rank_dropout", "module_dropout", *rates, *plus, *blocks)
    return values | {name: getattr(config, name) for name in names if getattr(config, name)}


def _text_encoder_rate(config: TrainConfig) -> object:
    first, second = config.effective_text_encoder_lrs
    return first if first == second else [first, second]


def _samples(dataset: Dataset, *, is_reg: bool) -> int:
    return sum(item.repeats for item in dataset.items if item.is_reg == is_reg)


def _folders(dataset: Dataset) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for item in dataset.items:
        entry = folders.setdefault(item.path.parent.name, {"n_repeats": item.repeats, "img_count": 0})
        entry["img_count"] += 1
    return folders


# What is read


def _value(text: str) -> Any:
    """A value as sd-scripts writes it into metadata: Python's own text form."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _rates(text: str) -> Any:
    """Rates of text encoders; sd-scripts writes an empty list where none was given."""
    rates = _value(text)
    return None if rates == [] else rates


def _sides(value: Any) -> Any:
    """A resolution as a configuration file has it."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple | list) else value


# Entries of a dataset in ss_datasets → the key of a configuration file.
_OF_DATASET = {
    "batch_size_per_device": "train_batch_size",
    "resolution": "resolution",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
}
_OF_SUBSET = ("shuffle_caption", "keep_tokens", "color_aug", "flip_aug", "random_crop")


def _first_dataset(text: str) -> dict[str, Any]:
    """Settings of the first dataset in ss_datasets."""
    try:
        datasets = json.loads(text) if text else []
    except ValueError:
        datasets = []
    if not isinstance(datasets, list) or not datasets or not isinstance(datasets[0], dict):
        return {}
    first = datasets[0]
    found = {key: first[name] for name, key in _OF_DATASET.items() if name in first}
    if "resolution" in found:
        found["resolution"] = _sides(found["resolution"])
    subsets = first.get("subsets")
    if isinstance(subsets, list) and subsets and isinstance(subsets[0], dict):
        found |= {name: subsets[0][name] for name in _OF_SUBSET if name in subsets[0]}
    return found


def _steps(text: str) -> dict[str, Any]:
    """The steps that were asked for, if any were; sd-scripts keeps the epochs they came to beside them."""
    steps = _value(text)
    return {} if steps is None else {"max_train_steps": steps, "max_train_epochs": None}


def _optimizer(text: str) -> dict[str, Any]:
    found = optimizers.read_written(text)
    if found is None:
        return {}
    name, arguments = found
    return {"optimizer_type": name} | ({"optimizer_args": arguments} if arguments else {})


def _network_args(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text and text != "None" else {}
    except ValueError:
        found = {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {"network_args": [f"{name}={value}" for name, value in pairs]}


# The table


def _written(key: str, written: Written) -> Entry:
    """A key for information only."""
    return Entry(key, None, written, None)


def _read(setting: str) -> Entry:
    """A key of a setting that this tool does not write: one that it lacks, or that is in CONFIG_KEY alone."""
    return Entry(f"ss_{setting}", setting, None, lambda text: {setting: _value(text)})


def _both(
    setting: str,
    key: str = "",
    written: Written | None = None,
    value: Callable[[str], Any] = _value,
) -> Entry:
    """A key that tells one setting both ways, by the same name and as it is unless something else is said."""
    return Entry(
        key or f"ss_{setting}",
        setting,
        written or (lambda base, config: getattr(config, setting)),
        lambda text: {setting: value(text)},
    )


ENTRIES = (
    _written("ss_base_model_version", lambda base, config: base.facts.kohya_version),
    _written(BASE_NAME, lambda base, config: base.name),
    _both("output_name", value=str),
    _both("learning_rate"),
    _both("unet_lr", written=lambda base, config: config.effective_unet_lr),
    _both(
        "text_encoder_lr",
        written=lambda base, config: _text_encoder_rate(config),
        value=_rates,
    ),
    _both("gradient_checkpointing"),
    _both("gradient_accumulation_steps"),
    _both("lr_warmup_steps"),
    _both("lr_scheduler", value=str),
    _both(
        "network_module",
        written=lambda base, config: network_module(config),
        value=str,
    ),
    _both("network_dim"),
    _both("network_alpha"),
    _both("network_dropout"),
    _both("mixed_precision", value=str),
    _read("full_fp16"),
    _both("v2", written=lambda base, config: False),
    _both("clip_skip"),
    _both("max_token_length"),
    _both("seed"),
    _read("lowram"),
    _read("cache_latents"),
    _both("noise_offset"),
    _both("noise_offset_random_strength"),
    _both("multires_noise_iterations"),
    _both("multires_noise_discount"),
    _both("adaptive_noise_scale"),
    _both("zero_terminal_snr"),
    _both("max_grad_norm"),
    _both("caption_dropout_rate"),
    _both("caption_dropout_every_n_epochs"),
    _both("caption_tag_dropout_rate"),
    _read("face_crop_aug_range"),
    _both("prior_loss_weight"),
    _both("min_snr_gamma"),
    _both("scale_weight_norms"),
    _both("ip_noise_gamma"),
    _both("ip_noise_gamma_random_strength"),
    _both("debiased_estimation_loss", "ss_debiased_estimation"),
    _both("loss_type"),
    _both("huber_schedule"),
    _both("huber_scale"),
    _both("huber_c"),
    _read("fp8_base"),
    _read("fp8_base_unet"),
    _both("training_comment", COMMENT, value=str),
    _both("train_batch_size", "ss_batch_size_per_device"),
    _both(
        "resolution",
        RESOLUTION,
        written=lambda base, config: config.size_px,
        value=lambda text: _sides(_value(text)),
    ),
    _both("enable_bucket"),
    _read("min_bucket_reso"),
    _read("max_bucket_reso"),
    _read("bucket_no_upscale"),
    _both("keep_tokens"),
    _read("keep_tokens_separator"),
    _both("shuffle_caption"),
    _read("color_aug"),
    _read("flip_aug"),
    _read("random_crop"),
    _read("resize_interpolation"),
    # several settings, or one that depends on another; a later entry wins
    Entry("ss_datasets", None, None, _first_dataset),
    Entry(
        "ss_num_epochs",
        None,
        lambda base, config: config.max_train_epochs,
        lambda text: {"max_train_epochs": _value(text)},
    ),
    Entry("ss_max_train_steps", None, lambda base, config: config.max_train_steps, _steps),
    Entry(
        "ss_optimizer",
        None,
        lambda base, config: optimizers.written(
            config.optimizer_type, config.optimizer_args, config.weight_decay
        ),
        _optimizer,
    ),
    Entry(
        "ss_network_args",
        None,
        lambda base, config: json.dumps({name: str(value) for name, value in network_args(config).items()}),
        _network_args,
    ),
)
