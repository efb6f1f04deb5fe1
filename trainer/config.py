"""TrainConfig: every setting of a training run, once, under kohya's name.

Owns the settings' names, types, units, limits and defaults, and the errors for wrong ones.  Does not own
where values come from (kohya files: ``trainer.kohya``; studies: ``hpo.study``) and never imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.errors import ConfigError

OPTIMIZER_NAMES = ("AdamW", "AdamW8bit", "Lion8bit", "Adafactor", "Prodigy")
SCHEDULER_NAMES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its value: carried in the dataclass field's metadata."""

    doc: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    low_is_excluded: bool = False


def setting(default: Any, doc: str, **facts: Any) -> Any:
    """A dataclass field with its documentation and limits."""
    return field(default=default, metadata={"setting": Setting(doc, **facts)})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run.  Frozen; ``with_values`` makes a changed, validated copy.

    Names are sd-scripts' (kohya's).  Defaults are ours; a kohya file takes kohya's (``trainer.kohya``).
    """

    # What is trained, on what
    pretrained_model_name_or_path: str = setting(
        "mini-sd15", "base: a short name, hub id, folder or .safetensors"
    )
    train_data_dir: str = setting("", "dataset: kohya folders (10_name class), or images with .txt captions")
    output_name: str = setting("lora", "file name of the LoRA, without ending")
    seed: int = setting(42, "seed of everything drawn at random", low=0, high=2**63 - 1)

    # Dataset
    resolution: int = setting(512, "area of a training image is resolution²", unit="px", low=16, high=4096)
    enable_bucket: bool = setting(True, "keep aspect ratios: images go to buckets of equal area")
    min_bucket_reso: int = setting(256, "shortest side of a bucket", unit="px", low=16, high=4096)
    max_bucket_reso: int = setting(2048, "longest side of a bucket", unit="px", low=16, high=8192)
    bucket_reso_steps: int = setting(64, "bucket sides are multiples of this", unit="px", low=8, high=1024)
    bucket_no_upscale: bool = setting(True, "never enlarge an image to fill a bucket")
    caption_extension: str = setting(".txt", "ending of the caption file beside an image")
    shuffle_caption: bool = setting(False, "shuffle comma-separated tags each time an image is seen")
    keep_tokens: int = setting(0, "tags at the front that shuffle_caption leaves in place", low=0, high=75)

    # How long, how much at once
    train_batch_size: int = setting(4, "images per micro-batch", low=1, high=1024)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", low=1, high=1024)
    max_train_epochs: int | None = setting(10, "passes over the dataset with repeats", low=1, high=100_000)
    max_train_steps: int | None = setting(
        None, "optimizer steps; replaces max_train_epochs", low=1, high=10_000_000
    )

    # Rates
    learning_rate: float = setting(1e-4, "rate of the U-Net, unless unet_lr is given", low=0, high=10)
    unet_lr: float | None = setting(None, "rate of the U-Net; 0 trains no U-Net", low=0, high=10)
    text_encoder_lr: float | None = setting(
        None, "rate of the text encoders; 0 trains none; unset takes learning_rate", low=0, high=10
    )
    network_train_unet_only: bool = setting(False, "leave the text encoders as they are")
    lr_scheduler: str = setting("cosine", "schedule of the rate", choices=SCHEDULER_NAMES)
    lr_scheduler_num_cycles: int = setting(1, "restarts of cosine_with_restarts", low=1, high=1000)
    lr_scheduler_power: float = setting(1.0, "exponent of polynomial", low=0, high=10, low_is_excluded=True)
    lr_warmup_steps: float = setting(
        0, "warm-up: optimizer steps, or a share of them if below 1", low=0, high=1e7
    )
    optimizer_type: str = setting("AdamW8bit", "optimizer", choices=OPTIMIZER_NAMES)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0, high=10)
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this norm; 0 turns clipping off", low=0, high=1e6
    )

    # Network
    network_dim: int = setting(32, "rank of the LoRA", low=1, high=1024)
    network_alpha: float = setting(
        16.0, "the LoRA is scaled by alpha / dim", low=0, high=4096, low_is_excluded=True
    )
    network_dropout: float = setting(0.0, "share of rank channels dropped after lora_down", low=0, high=0.95)
    conv_dim: int | None = setting(
        None, "rank of 3×3 convolutions (LoCon); unset trains none", low=1, high=1024
    )
    conv_alpha: float | None = setting(
        None, "alpha of 3×3 convolutions; unset takes network_alpha", low=0, high=4096, low_is_excluded=True
    )

    # Loss
    min_snr_gamma: float | None = setting(
        None, "min-SNR weighting; 5 is usual (arXiv 2303.09556)", low=0, high=1000, low_is_excluded=True
    )
    noise_offset: float = setting(0.0, "adds a random brightness to the noise; 0.05 is usual", low=0, high=1)
    clip_skip: int | None = setting(
        None, "SD1.5: use this text encoder layer, counted from the end", low=1, high=12
    )

    # Machine
    mixed_precision: str = setting("auto", "compute type", choices=("auto", "no", "fp16", "bf16"))
    save_precision: str = setting("fp16", "number type in the saved LoRA", choices=("float", "fp16", "bf16"))
    no_half_vae: bool = setting(False, "run the VAE in fp32")
    gradient_checkpointing: bool = setting(
        False, "recompute activations: less memory, about 25 % slower (assumed)"
    )
    cache_latents_to_disk: bool = setting(True, "keep encoded images on disk for later runs")
    vae_batch_size: int = setting(4, "images encoded at once", low=1, high=256)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, check_value(f.name, getattr(self, f.name)))
        if self.max_train_epochs is None and self.max_train_steps is None:
            raise ConfigError("neither max_train_epochs nor max_train_steps is set", "set one of them")
        if self.min_bucket_reso > self.max_bucket_reso:
            raise ConfigError(
                f"min_bucket_reso {self.min_bucket_reso} is above max_bucket_reso {self.max_bucket_reso}",
                "swap or correct them",
            )
        if not self.trains_unet and not self.trains_text_encoder:
            raise ConfigError(
                "nothing is trained: all rates are 0", "set learning_rate, unet_lr or text_encoder_lr"
            )
        if (
            self.optimizer_type == "Prodigy"
            and self.trains_unet
            and self.trains_text_encoder
            and self.effective_unet_lr != self.effective_text_encoder_lr
        ):
            raise ConfigError(
                "Prodigy finds one rate by itself and cannot keep text_encoder_lr apart from the U-Net's",
                "set text_encoder_lr equal to learning_rate (usually 1.0), or to 0",
            )

    @property
    def effective_unet_lr(self) -> float:
        """The U-Net's rate (kohya: unet_lr, else learning_rate)."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def effective_text_encoder_lr(self) -> float:
        """The text encoders' rate (kohya: text_encoder_lr, else learning_rate)."""
        if self.network_train_unet_only:
            return 0.0
        return self.learning_rate if self.text_encoder_lr is None else self.text_encoder_lr

    @property
    def trains_unet(self) -> bool:
        return self.effective_unet_lr > 0

    @property
    def trains_text_encoder(self) -> bool:
        return self.effective_text_encoder_lr > 0

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """A copy with ``values`` replaced.  Unknown names raise ConfigError with a suggestion."""
        for name in values:
            check_name(name)
        return dataclasses.replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Setting → value, in declaration order; JSON- and TOML-ready (unset values are None)."""
        return dataclasses.asdict(self)


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(TrainConfig)}
_TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean …?`` for a mistyped name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def check_name(name: str) -> None:
    """Raise ConfigError for a setting that does not exist, naming the nearest one."""
    if name not in SETTINGS:
        raise ConfigError(f"unknown setting {name}", suggestion(name, SETTINGS) or "see docs/settings.md")


def check_value(name: str, value: Any) -> Any:
    """``value`` as the setting's own type, or ConfigError with its limits.  Whole floats become ints."""
    check_name(name)
    facts = SETTINGS[name]
    wanted = _TYPES[name]
    options = [t for t in typing.get_args(wanted) if t is not type(None)] if _is_union(wanted) else [wanted]
    if value is None:
        if _is_union(wanted):
            return None
        raise ConfigError(f"{name} must have a value", f"it is {facts.doc}")
    kind = options[0]
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r} is not true or false", facts.doc)
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} = {value!r} is not a text", facts.doc)
        if facts.choices and value not in facts.choices:
            hint = suggestion(value, facts.choices) or "choose one of " + ", ".join(facts.choices)
            raise ConfigError(f"{name} = {value!r} is not known", hint)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ConfigError(f"{name} = {value!r} is not a number", facts.doc)
    if kind is int:
        if value != int(value):
            raise ConfigError(f"{name} = {value!r} is not a whole number", facts.doc)
        number: int | float = int(value)
    else:
        number = float(value)
    below = facts.low is not None and (number < facts.low or (facts.low_is_excluded and number == facts.low))
    if below or (facts.high is not None and number > facts.high):
        above = "above" if facts.low_is_excluded else "from"
        unit = f" {facts.unit}" if facts.unit else ""
        raise ConfigError(
            f"{name} = {value} is outside its limits", f"{above} {facts.low:g} to {facts.high:g}{unit}"
        )
    return number


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
