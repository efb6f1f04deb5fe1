"""What becomes of each option of sd-scripts: each is given to the reader, alone, with a value that asks for something,
and the reader's answer is its state.

Owns the values that are tried. Does not own names of options (``trainer.kohya.optionnames``) or the page
(``trainer.kohya.optionsdoc``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import SETTINGS
from trainer.data import PLACE_KEYS, RUN_KEYS, DatasetFile, read_dataset_file
from trainer.errors import ConfigError
from trainer.kohya import optionnames
from trainer.kohya.read import KohyaFile, from_kohya
from trainer.tomlfile import as_text

USED, TRANSLATED, NO_EFFECT, REFUSED, UNKNOWN = "used", "translated", "no effect", "refused", "unknown"
STATES = (USED, TRANSLATED, NO_EFFECT, REFUSED, UNKNOWN)
# Usual values for each kind of option.
_USUAL: dict[str, Any] = {
    **dict.fromkeys(optionnames.FLAGS, True),
    **dict.fromkeys(optionnames.WHOLE_NUMBERS, 3),
    **dict.fromkeys(optionnames.NUMBERS, 0.25),
    **dict.fromkeys(optionnames.TEXTS, "text"),
}
# Options that need a value of their own, with what they need beside it.
_VALUES: dict[str, Any] = {
    "base_weights": ["other.safetensors"],
    "base_weights_multiplier": [0.5],
    "bucket_reso_steps": 32,
    "caption_extention": ".txt",
    "datasets": [{"subsets": [{"image_dir": "images"}]}],
    "dynamo_backend": "eager",
    "face_crop_aug_range": "2.0,4.0",
    "keep_tokens_separator": "|||",
    "loss_type": "huber",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": ["step_size=10", "gamma=0.5"],
    "lr_scheduler_type": "torch.optim.lr_scheduler.StepLR",
    "max_bucket_reso": 1536,
    "max_token_length": 225,
    "max_train_epochs": 5,
    "min_bucket_reso": 128,
    "mixed_precision": "bf16",
    "network_args": ["conv_dim=4"],
    "network_module": "lycoris.kohya",
    "optimizer_args": ["betas=0.9,0.99"],
    "optimizer_type": "Lion",
    "resize_interpolation": "nearest",
    "resolution": "512,768",
    "sample_sampler": "euler_a",
    "save_precision": "fp16",
    "huber_schedule": "constant",
    "text_encoder_lr": [1e-5, 1e-5],
}
_BESIDE: dict[str, dict[str, Any]] = {
    "dim_from_weights": {"network_weights": "begun.safetensors"},
    "masked_loss": {"alpha_mask": True},
    "lr_scheduler_type": {"lr_scheduler_args": ["step_size=10"]},
    "scale_v_pred_loss_like_noise_pred": {"v_parameterization": True},
    "zero_terminal_snr": {"v_parameterization": True},
    "adaptive_noise_scale": {"noise_offset": 0.1},
    "base_weights_multiplier": {"base_weights": ["other.safetensors"]},
    "lr_scheduler_args": {
        "lr_scheduler_type": "torch.optim.lr_scheduler.StepLR",
        "lr_scheduler_args": ["step_size=10"],
    },
    "save_n_epoch_ratio": {"max_train_epochs": 10},
}
# The same for keys of dataset files …
_IN_DATASET: dict[str, Any] = {
    "cache_info": True,
    "conditioning_data_dir": "masks",
    "custom_attributes": {"diff_output_preservation": True},
    "face_crop_aug_range": [2.0, 4.0],
    "image_dir": "images",
    "is_reg": True,
    "metadata_file": "images.json",
    "network_multiplier": 0.5,
    "num_repeats": 3,
    "class_tokens": "zed girl",
    "batch_size": 2,
}
_NETWORK_SWITCHES = (
    *(
        "use_tucker",
        "use_cp",
        "use_conv_cp",
        "use_scalar",
        "train_norm",
        "rescaled",
        "dora_wd",
        "wd_on_output",
    ),
    *("full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization", "decompose_both", "train_t5xxl"),
    *("enable_all_linear", "enable_conv"),
)
# … and for arguments of networks; what is missing here is 2.
_IN_NETWORK: dict[str, str] = {
    **dict.fromkeys(("down_lr_weight", "up_lr_weight"), "cosine"),
    **dict.fromkeys(("block_dims", "conv_block_dims"), ",".join(["4"] * 25)),
    **dict.fromkeys(("block_alphas", "conv_block_alphas"), ",".join(["2"] * 25)),
    **dict.fromkeys(("rank_dropout", "module_dropout", "dropout", "mid_lr_weight"), "0.5"),
    **dict.fromkeys(("block_lr_zero_threshold", "constraint", "constrain"), "0.1"),
    **dict.fromkeys(_NETWORK_SWITCHES, "True"),
    "algo": "loha",
    "preset": "attn-mlp",
    "disable_conv_cp": "False",
}
_BESIDE_IN_NETWORK: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("block_alphas", "conv_block_dims"), (f"block_dims={','.join(['4'] * 25)}",)),
    "conv_block_alphas": (
        f"block_dims={','.join(['4'] * 25)}",
        f"conv_block_dims={','.join(['4'] * 25)}",
    ),
    "conv_alpha": ("conv_dim=4",),
    **dict.fromkeys(("factor", "full_matrix", "unbalanced_factorization", "decompose_both"), ("algo=lokr",)),
    **dict.fromkeys(("constraint", "constrain", "rescaled"), ("algo=diag-oft",)),
    **dict.fromkeys(("use_tucker", "use_cp", "use_conv_cp"), ("algo=loha",)),
    "block_size": ("algo=dylora",),
    "enable_conv": ("enable_all_linear=True",),
}
# Arguments that have an effect only beside another one, which says as much itself.
_TOGETHER_IN_NETWORK = {"wd_on_output": ("dora_wd=True",)}


@dataclass(frozen=True)
class OptionState:
    """``state`` is one of STATES; ``why`` are the reader's words, or what a used setting means; ``value`` is what was
    tried."""

    name: str
    state: str
    why: str
    value: Any = None


# Options


def option_states(names: Iterable[str] = optionnames.OPTIONS) -> tuple[OptionState, ...]:
    """The state of each option of the command line or of --config_file."""
    return tuple(_option_state(name) for name in names)


def _option_state(name: str) -> OptionState:
    value = _VALUES.get(name, _USUAL.get(name, True))
    beside = _BESIDE.get(name, {})
    file, usual = _read(beside | {name: value}), _read(beside)
    if name == "output_dir" and file.output_dir != usual.output_dir:
        return OptionState(name, USED, "the folder of the results; --out wins over it", value)
    return _state(name, value, name, file, usual)


def network_states() -> dict[str, tuple[OptionState, ...]]:
    """Network module → the state of each argument that it reads."""
    return {
        module: tuple(_argument_state(module, name) for name in names)
        for module, names in optionnames.NETWORK_ARGS.items()
    }


def _argument_state(module: str, name: str) -> OptionState:
    beside = [
        argument
        for argument in _BESIDE_IN_NETWORK.get(name, ())
        if module == "lycoris.kohya" or not argument.startswith("algo=")
    ]
    value = _IN_NETWORK.get(name, "2")
    asked = [*beside, *_TOGETHER_IN_NETWORK.get(name, ()), f"{name}={value}"]
    file, usual = (_read({"network_module": module, "network_args": given}) for given in (asked, beside))
    return _state(name, value, f"network_args {name}", file, usual)


def _read(table: Mapping[str, Any]) -> KohyaFile:
    return from_kohya(Path("options.toml"), table)


def _state(name: str, value: Any, label: str, file: KohyaFile, usual: KohyaFile) -> OptionState:
    """What the reader says in ``file`` beyond ``usual``, which is the same file without the option."""
    for state, lines, known in (
        (REFUSED, file.refused, usual.refused),
        (UNKNOWN, file.unknown, usual.unknown),
        (NO_EFFECT, file.without_effect, usual.without_effect),
    ):
        if (line := _line(lines, known, label)) is not None:
            return OptionState(name, state, line, value)
    line = _line(file.translated, usual.translated, label)
    changed = {
        setting: now
        for setting, now in file.config.as_dict().items()
        if now != getattr(usual.config, setting)
    }
    if name in changed and (line is None or label != name):
        return OptionState(name, USED, SETTINGS[name].doc, value)
    if line is None and changed:
        line = ", ".join(
            f"{setting} not set" if now in (None, "") else f"{setting} = {as_text(now)}"
            for setting, now in changed.items()
        )
    if line is not None:
        return OptionState(name, TRANSLATED, line, value)
    if (line := _line(file.differs, usual.differs, label)) is not None:
        return OptionState(name, NO_EFFECT, line, value)
    return OptionState(name, UNKNOWN, "", value)


def _line(lines: Iterable[str], known: Iterable[str], label: str) -> str | None:
    """What a new line says of an option: the words after ``label = value →``, ``label = value:`` or ``label:``."""
    for line in lines:
        if line in known:
            continue
        for mark in (" = ", ": "):
            if line.startswith(label + mark):
                rest = line.removeprefix(label)
                return rest.split(" → ", 1)[-1] if " → " in rest else rest.split(": ", 1)[-1]
    return None


# Datasets

_OF_FILE = {
    "general": "values for all datasets of the file",
    "datasets": "each has buckets and batches of its own",
    "subsets": "the folders of a dataset",
}
_SUBSETS: dict[str, dict[str, Any]] = {
    optionnames.DREAMBOOTH: {"image_dir": "images"},
    optionnames.FINE_TUNING: {"metadata_file": "images.json"},
    optionnames.CONTROLNET: {"image_dir": "images", "conditioning_data_dir": "masks"},
}


def dataset_states() -> tuple[OptionState, ...]:
    """The state of each key of a dataset file. Raises ValueError if it is not the same wherever the key may stand."""
    found = []
    for name, places in optionnames.DATASET_KEYS.items():
        if optionnames.DATASET in places and name != "subsets":
            places = (optionnames.FILE, *places)
        first, *others = (_dataset_state(name, place) for place in places)
        if any(state != first for state in others):
            raise ValueError(f"{name} is not the same everywhere: {[first, *others]}")
        found.append(first)
    return tuple(found)


def _dataset_state(name: str, place: str) -> OptionState:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset.json"
        file, usual = (_described(path, name, place, given) for given in (True, False))
    if file is None:
        return OptionState(name, UNKNOWN, "")
    for state, lines, known in (
        (REFUSED, file.refused, usual.refused if usual else ()),
        (NO_EFFECT, file.without_effect, usual.without_effect if usual else ()),
    ):
        if (line := _line(lines, known, name)) is not None:
            return OptionState(name, state, line)
    if usual is not None and (file.settings, file.subsets) == (usual.settings, usual.subsets):
        return OptionState(name, UNKNOWN, "")
    setting = RUN_KEYS.get(name, name)
    why = _OF_FILE.get(name) or PLACE_KEYS.get(name) or SETTINGS[setting].doc
    return OptionState(name, USED, why)


def _described(path: Path, name: str, place: str, is_given: bool) -> DatasetFile | None:
    """A dataset file with or without a key; None if it cannot be read."""
    subset = dict(_SUBSETS.get(place, _SUBSETS[optionnames.DREAMBOOTH]))
    subset.pop(name, None)
    table: dict[str, Any] = {"datasets": [{"subsets": [subset]}]}
    tables = {optionnames.FILE: table, optionnames.DATASET: table["datasets"][0]}
    if name in _OF_FILE:
        if name == "general":
            table["general"] = {"keep_tokens": 3}
        if not is_given:
            del tables[place][name]
    elif is_given:
        value = _IN_DATASET.get(name, _VALUES.get(name, _USUAL.get(name, True)))
        where = table.setdefault("general", {}) if place == optionnames.FILE else tables.get(place, subset)
        where[name] = value
    path.write_text(json.dumps(table), encoding="utf-8")
    try:
        return read_dataset_file(path)
    except ConfigError:
        return None
