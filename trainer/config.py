"""TrainConfig: every setting of a training run, once, under kohya's name.

Owns the settings' names, types, units, limits and defaults, and the errors for wrong ones.  Does not own where
values come from (kohya files: ``trainer.kohya.read``; studies: ``hpo.study.config``) and never imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
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
NETWORK_TYPES = ("LoRA", "LoCon", "DoRA", "LoHa", "LoKr")
TOKEN_LENGTHS = (75, 150, 225)


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its value: carried in the dataclass field's metadata."""

    doc: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    low_is_excluded: bool = False
    only: str = ""  # "SD1.5" or "SDXL", for a setting that only one family has


def setting(default: Any, doc: str, **facts: Any) -> Any:
    """A dataclass field with its documentation and limits."""
    return field(default=default, metadata={"setting": Setting(doc, **facts)})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run.  Frozen; ``with_values`` makes a changed, validated copy.

    Names are sd-scripts' (kohya's).  Defaults are ours; a kohya file takes kohya's (``trainer.kohya.read``).
    """

    # What is trained, on what
    pretrained_model_name_or_path: str = setting(
        "mini-sd15", "base: a short name, hub id, folder or .safetensors"
    )
    train_data_dir: str = setting("", "dataset: kohya folders (10_name class), or images with .txt captions")
    dataset_config: str = setting(
        "", "dataset as a TOML file in kohya's form (datasets with subsets), instead of train_data_dir"
    )
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
    keep_tokens_separator: str = setting(
        "", "text in a caption: tags before its first and after its second occurrence stay in place"
    )
    caption_separator: str = setting(",", "what separates tags")
    secondary_separator: str = setting(
        "", "separates tags that shuffling and dropping keep together; becomes caption_separator"
    )
    caption_prefix: str = setting("", "text put before every caption, with a space")
    caption_suffix: str = setting("", "text put after every caption, with a space")
    enable_wildcard: bool = setting(
        False, "{a|b} in a caption becomes a or b each time; of several lines one is drawn"
    )
    caption_dropout_rate: float = setting(
        0.0, "share of the times that an image is trained without its caption", low=0, high=1
    )
    caption_dropout_every_n_epochs: int = setting(
        0, "every n-th epoch is trained without captions; 0 never", low=0, high=100_000
    )
    caption_tag_dropout_rate: float = setting(
        0.0, "share of tags left out each time; those that are kept in place never are", low=0, high=1
    )
    max_token_length: int | None = setting(
        None, "tokens of a caption that are read: 75, 150 or 225; unset 75", unit="tokens", low=75, high=225
    )
    token_warmup_min: int = setting(
        1, "tags that a caption begins with while token_warmup_step grows", low=0, high=75
    )
    token_warmup_step: float = setting(
        0,
        "optimizer steps until captions have all their tags, or a share of all steps if below 1; 0 at once",
        low=0,
        high=1e7,
    )
    flip_aug: bool = setting(False, "train each image mirrored about half of the times")
    validation_split: float = setting(
        0.0, "share of each folder's images that is set apart for the validation loss", low=0, high=0.9
    )
    validation_seed: int | None = setting(
        None, "decides which images validation_split sets apart; unset takes seed", low=0, high=2**63 - 1
    )
    hold_out_references: bool = setting(
        False, "set the images apart that a search would judge likeness with; held_out/ goes before it"
    )
    reg_data_dir: str = setting(
        "", "regularisation images, in kohya folders (1_class): as many as training images are trained too"
    )
    prior_loss_weight: float = setting(1.0, "weight of regularisation images in the loss", low=0, high=100)
    alpha_mask: bool = setting(False, "what is transparent in an image is left out of the loss")
    masked_loss: bool = setting(False, "weigh the loss by masks: conditioning_data_dir or alpha_mask")
    conditioning_data_dir: str = setting(
        "", "folder of masks named like the images; white is trained, black is not"
    )

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
    text_encoder_lr1: float | None = setting(
        None,
        "rate of the first text encoder (CLIP-L); unset takes text_encoder_lr",
        low=0,
        high=10,
        only="SDXL",
    )
    text_encoder_lr2: float | None = setting(
        None,
        "rate of the second text encoder (bigG); unset takes text_encoder_lr",
        low=0,
        high=10,
        only="SDXL",
    )
    network_train_unet_only: bool = setting(False, "leave the text encoders as they are")
    down_lr_weight: str = setting(
        "", "rate multipliers of the U-Net's down blocks (12 SD1.5, 9 SDXL): 0,0,0.5,… or sine, cosine+.25 …"
    )
    mid_lr_weight: str = setting("", "rate multipliers of the U-Net's middle (1 SD1.5, 3 SDXL): 0.5")
    up_lr_weight: str = setting("", "rate multipliers of the U-Net's up blocks, as down_lr_weight")
    block_lr_zero_threshold: float = setting(
        0.0, "block multipliers up to this are 0: the block gets no LoRA", low=0, high=10
    )
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
    network_type: str = setting("LoRA", "kind of adapter", choices=NETWORK_TYPES)
    network_dim: int = setting(32, "rank of the LoRA", low=1, high=1024)
    network_alpha: float = setting(
        16.0, "the LoRA is scaled by alpha / dim", low=0, high=4096, low_is_excluded=True
    )
    network_dropout: float = setting(
        0.0, "share of the values after lora_down that are dropped, each by itself", low=0, high=0.95
    )
    rank_dropout: float = setting(0.0, "share of ranks dropped, the rest scaled up", low=0, high=0.95)
    module_dropout: float = setting(0.0, "chance of a module to be left out of a step", low=0, high=0.95)
    scale_weight_norms: float | None = setting(
        None,
        "after each step, modules are scaled down to this norm; 1 is usual",
        low=0,
        high=1000,
        low_is_excluded=True,
    )
    conv_dim: int | None = setting(
        None, "rank of 3×3 convolutions (LoCon); unset trains none", low=1, high=1024
    )
    conv_alpha: float | None = setting(
        None, "alpha of 3×3 convolutions; unset takes network_alpha", low=0, high=4096, low_is_excluded=True
    )

    factor: int = setting(
        -1,
        "LoKr: the small factor that a layer's sides are split into; -1 as even as possible",
        low=-1,
        high=1024,
    )
    network_weights: str = setting("", "LoRA file that training starts from, of the same kind and rank")

    # Loss
    min_snr_gamma: float | None = setting(
        None, "min-SNR weighting; 5 is usual (arXiv 2303.09556)", low=0, high=1000, low_is_excluded=True
    )
    scale_v_pred_loss_like_noise_pred: bool = setting(
        False, "v-prediction: weigh the loss over timesteps as noise prediction does"
    )
    v_pred_like_loss: float | None = setting(
        None, "noise prediction: add this share of a loss weighted like v-prediction's", low=0, high=100
    )
    debiased_estimation_loss: bool = setting(False, "weigh the loss by 1/√SNR (arXiv 2310.08442)")
    loss_type: str = setting("l2", "error measure", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = setting(
        "snr", "how huber's threshold falls with noise", choices=("constant", "exponential", "snr")
    )
    huber_c: float = setting(0.1, "huber's threshold at the most noise", low=0, high=10, low_is_excluded=True)
    huber_scale: float = setting(
        1.0, "factor of huber's threshold (constant, exponential)", low=0, high=1000, low_is_excluded=True
    )
    v_parameterization: bool = setting(False, "the base predicts v instead of noise")
    zero_terminal_snr: bool = setting(False, "the noisiest timestep is pure noise (arXiv 2305.08891)")
    min_timestep: int | None = setting(
        None, "least noisy timestep that is trained; unset 0", unit="timesteps", low=0, high=999
    )
    max_timestep: int | None = setting(
        None, "timesteps below this are trained; unset 1000", unit="timesteps", low=1, high=1000
    )

    # Noise
    noise_offset: float = setting(0.0, "adds a random brightness to the noise; 0.05 is usual", low=0, high=1)
    noise_offset_random_strength: bool = setting(False, "noise_offset varies between 0 and its value")
    adaptive_noise_scale: float | None = setting(
        None, "adds this times the image's mean latent to noise_offset", low=-10, high=10
    )
    multires_noise_iterations: int | None = setting(
        None, "layers of coarser noise that are added; 6 to 10 is usual", low=1, high=32
    )
    multires_noise_discount: float = setting(
        0.3, "strength of each layer of coarser noise to the one before", low=0, high=1
    )
    ip_noise_gamma: float | None = setting(
        None, "noise added to the input only; 0.1 is usual (arXiv 2301.11706)", low=0, high=1
    )
    ip_noise_gamma_random_strength: bool = setting(False, "ip_noise_gamma varies between 0 and its value")

    # Text encoder
    clip_skip: int | None = setting(
        None, "SD1.5: use this text encoder layer, counted from the end", low=1, high=12, only="SD1.5"
    )

    # Machine
    mixed_precision: str = setting("auto", "compute type", choices=("auto", "no", "fp16", "bf16"))
    save_precision: str = setting("fp16", "number type in the saved LoRA", choices=("float", "fp16", "bf16"))
    no_half_vae: bool = setting(False, "run the VAE in fp32")
    gradient_checkpointing: bool = setting(
        False, "recompute activations: less memory, about 25 % slower (assumed)"
    )
    checkpoint_blocks: int | None = setting(
        None,
        "with gradient_checkpointing: recompute only so many of the U-Net's blocks, outermost first; unset all",
        low=1,
        high=64,
    )
    cpu_offload_checkpointing: bool = setting(
        False, "with gradient_checkpointing: what it keeps between forward and backward waits in RAM"
    )
    full_bf16: bool = setting(
        False, "the adapter and its gradients in bf16 too, rounded stochastically: less memory, less exact"
    )
    fp8_base: bool = setting(
        False, "the base's frozen weights as scaled fp8 numbers: half the memory of bf16, less exact"
    )
    micro_batch_size: int | None = setting(
        None,
        "images computed at once; the rest of a batch is accumulated: less memory, same result; unset all",
        low=1,
        high=1024,
    )
    text_encoder_frozen: bool = setting(
        False, "keep the text encoders' part of the LoRA as it is: set by a run that ran out of memory"
    )
    cpu_offload: bool = setting(
        False,
        "the optimizer's state, and text encoders that are not trained, stay in the computer's memory: slower",
    )
    opt_channels_last: bool = setting(False, "channels-last memory layout in the U-Net: faster convolutions")
    torch_compile: bool = setting(False, "compile the U-Net's transformer blocks; the first steps are slow")
    cache_latents_to_disk: bool = setting(True, "keep encoded images on disk for later runs")
    vae_batch_size: int = setting(4, "images encoded at once", low=1, high=256)

    # Saving, samples, log: nothing here changes what is trained
    save_every_n_epochs: int | None = setting(None, "also save the LoRA every n epochs", low=1, high=100_000)
    save_every_n_steps: int | None = setting(
        None, "also save the LoRA every n optimizer steps", low=1, high=10_000_000
    )
    save_last_n_epochs: int | None = setting(
        None, "of the files of epochs, keep the last n", low=1, high=100_000
    )
    save_last_n_steps: int | None = setting(
        None, "of the files of steps, keep those of the last n steps", low=1, high=10_000_000
    )
    sample_every_n_epochs: int | None = setting(
        None, "draw the sample prompts every n epochs", low=1, high=100_000
    )
    sample_every_n_steps: int | None = setting(
        None, "draw the sample prompts every n optimizer steps", low=1, high=10_000_000
    )
    sample_at_first: bool = setting(False, "also draw them before training")
    sample_prompts: str = setting(
        "", "file of prompts to draw, one a line, with kohya's --w --h --d --s --l --n"
    )
    logging_dir: str = setting("", "folder for TensorBoard; train.jsonl is always written")
    training_comment: str = setting("", "a remark for the file's metadata")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, check_value(f.name, getattr(self, f.name)))
        if self.max_train_epochs is None and self.max_train_steps is None:
            raise ConfigError("neither max_train_epochs nor max_train_steps is set", "set one of them")
        for broken, message, hint in self._contradictions():
            if broken:
                raise ConfigError(message, hint)

    def _contradictions(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it is so, what is wrong, what to do) of settings that cannot go together."""
        yield (
            self.min_bucket_reso > self.max_bucket_reso,
            f"min_bucket_reso {self.min_bucket_reso} is above max_bucket_reso {self.max_bucket_reso}",
            "swap or correct them",
        )
        yield (
            not self.trains_unet and not self.trains_text_encoder,
            "nothing is trained: all rates are 0",
            "set learning_rate, unet_lr or text_encoder_lr",
        )
        yield (
            self.optimizer_type == "Prodigy" and self._has_several_rates,
            "Prodigy finds one rate by itself and cannot keep the text encoders' or blocks' rates apart",
            "set text_encoder_lr equal to learning_rate (usually 1.0), or to 0; leave block rates out",
        )
        yield (
            self.max_token_length not in (None, *TOKEN_LENGTHS),
            f"max_token_length = {self.max_token_length} is not built from whole windows of 75 tokens",
            "use 75, 150 or 225",
        )
        yield (
            self.network_type == "LoCon" and self.conv_dim is None,
            "network_type = LoCon trains 3×3 convolutions, but conv_dim is not set",
            f"set conv_dim, for example to {max(1, self.network_dim // 2)}",
        )
        yield (
            self.network_type in ("LoHa", "LoKr") and self.network_dropout > 0,
            f"network_dropout is for LoRA, LoCon and DoRA: {self.network_type} has no lora_down",
            "use rank_dropout or module_dropout",
        )
        yield (self.factor == 0, "factor = 0 splits nothing", "use -1, or a whole number from 1")
        yield (
            self.first_timestep >= self.end_timestep,
            f"min_timestep {self.first_timestep} is not below max_timestep {self.end_timestep}",
            "leave at least one timestep to train",
        )
        yield (
            self.zero_terminal_snr and not self.v_parameterization,
            "zero_terminal_snr needs v_parameterization: noise cannot be predicted from pure noise",
            "set both for a v-prediction base, else neither",
        )
        yield (
            self.scale_v_pred_loss_like_noise_pred and not self.v_parameterization,
            "scale_v_pred_loss_like_noise_pred needs v_parameterization",
            "it is for v-prediction bases; leave it out",
        )
        yield (
            bool(self.v_pred_like_loss) and self.v_parameterization,
            "v_pred_like_loss is for noise prediction, but v_parameterization is set",
            "leave one of both out",
        )
        yield (
            self.adaptive_noise_scale is not None and self.noise_offset == 0,
            "adaptive_noise_scale changes noise_offset, which is 0",
            "set noise_offset, for example to 0.05",
        )
        yield (
            self.masked_loss and not self.alpha_mask and not self.conditioning_data_dir,
            "masked_loss has no masks",
            "set conditioning_data_dir to a folder of masks, or alpha_mask = true for transparent images",
        )
        yield (
            self.text_encoder_frozen and not self.trains_unet,
            "text_encoder_frozen leaves nothing to train: the U-Net's rate is 0",
            "leave it out",
        )
        yield (
            not self.caption_separator,
            "caption_separator is empty",
            'use ","',
        )
        yield (
            self.full_bf16 and self.mixed_precision in ("no", "fp16"),
            f"full_bf16 trains in bf16, but mixed_precision = {self.mixed_precision}",
            "set mixed_precision = bf16 or auto",
        )
        samples = self.sample_every_n_epochs or self.sample_every_n_steps or self.sample_at_first
        yield (
            bool(samples) and not self.sample_prompts,
            "samples are asked for, but sample_prompts is not set",
            "give a file with one prompt a line",
        )

    @property
    def _has_several_rates(self) -> bool:
        rates = {self.effective_unet_lr, *self.effective_text_encoder_lrs} - {0.0}
        blocks = self.down_lr_weight or self.mid_lr_weight or self.up_lr_weight
        return len(rates) > 1 or bool(blocks)

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
    def effective_text_encoder_lrs(self) -> tuple[float, float]:
        """The rates of SDXL's two text encoders; a base with one uses the first."""
        common = self.effective_text_encoder_lr
        if self.network_train_unet_only:
            return 0.0, 0.0
        return (
            common if self.text_encoder_lr1 is None else self.text_encoder_lr1,
            common if self.text_encoder_lr2 is None else self.text_encoder_lr2,
        )

    @property
    def trains_unet(self) -> bool:
        return self.effective_unet_lr > 0

    @property
    def trains_text_encoder(self) -> bool:
        return max(self.effective_text_encoder_lrs) > 0

    @property
    def updates_text_encoder(self) -> bool:
        """Whether text encoders get gradients: they have a LoRA, and it is not kept as it is."""
        return self.trains_text_encoder and not self.text_encoder_frozen

    @property
    def effective_batch_size(self) -> int:
        """Images of one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def images_at_once(self) -> int:
        """Images in one forward pass."""
        return min(self.train_batch_size, self.micro_batch_size or self.train_batch_size)

    @property
    def first_timestep(self) -> int:
        """The least noisy timestep that is trained (kohya: min_timestep, else 0)."""
        return 0 if self.min_timestep is None else self.min_timestep

    @property
    def end_timestep(self) -> int:
        """Timesteps below this are trained (kohya: max_timestep, else 1000)."""
        return 1000 if self.max_timestep is None else self.max_timestep

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """A copy with ``values`` replaced.  Unknown names raise ConfigError with a suggestion."""
        for name in values:
            check_name(name)
        return dataclasses.replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Setting → value, in declaration order; JSON- and TOML-ready (unset values are None)."""
        return dataclasses.asdict(self)


# Settings that change no weight: a checkpoint or a study may go on with other values.
WITHOUT_INFLUENCE = frozenset(
    {
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_last_n_epochs",
        "save_last_n_steps",
        "sample_every_n_epochs",
        "sample_every_n_steps",
        "sample_at_first",
        "sample_prompts",
        "logging_dir",
        "training_comment",
    }
)
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
