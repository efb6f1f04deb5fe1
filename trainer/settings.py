"""The table of all settings of a training run, under kohya's names: type, default, limits and meaning.

Does not own rules between settings and derived values (``trainer.config``) or the validation of values
(``trainer.checks``). Never imports torch.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from trainer import arguments, optimizers, schedules
from trainer.checks import Rule, check, check_known, setting
from trainer.optimizers import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from trainer.schedules import SCHEDULER_NAMES as SCHEDULER_NAMES

NETWORK_TYPES = (
    "LoRA",
    "LoCon",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA-FA",
    "DyLoRA",
    "GLoRA",
    "IA3",
    "OFT",
    "BOFT",
    "Full",
)
# What LyCORIS calls a preset: which modules are trained.
LYCORIS_PRESETS = (
    "full",
    "full-lin",
    "attn-mlp",
    "attn-only",
    "unet-only",
    "unet-transformer-only",
    "unet-convblock-only",
    "ia3",
)
LARGEST_DIM = 1024  # of a low rank; LoKr takes a larger one as "full matrices"
TOKEN_LENGTHS = (75, 150, 225)
RESIZE_INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True)
class Settings:
    """The values of all settings, each within its limits. Names are those of sd-scripts
    (kohya), defaults are ours."""

    # Base model and dataset
    pretrained_model_name_or_path: str = setting(
        "mini-sd15", "base model: a short name, hub id, diffusers folder or .safetensors file"
    )
    train_data_dir: str = setting(
        "", "dataset: a folder with kohya folders (10_name class), or with images and captions"
    )
    dataset_config: str = setting("", "dataset config in sd-scripts' TOML format, instead of train_data_dir")
    output_name: str = setting("lora", "file name of the LoRA, without extension")
    seed: int = setting(42, "random seed", low=0, high=2**63 - 1)
    vae: str = setting(
        "", "another VAE than that of the base: a .safetensors file, a diffusers folder or a hub id"
    )

    # Images and captions
    resolution: int = setting(
        512, "training resolution; the area of an image is resolution²", unit="px", low=16, high=4096
    )
    enable_bucket: bool = setting(
        True, "aspect ratio bucketing: keep aspect ratios, with buckets of equal area"
    )
    min_bucket_reso: int = setting(256, "minimum side of a bucket", unit="px", low=16, high=4096)
    max_bucket_reso: int = setting(2048, "maximum side of a bucket", unit="px", low=16, high=8192)
    bucket_reso_steps: int = setting(
        64, "bucket sides are multiples of this value", unit="px", low=8, high=1024
    )
    bucket_no_upscale: bool = setting(True, "never upscale images to fill a bucket")
    caption_extension: str = setting(".txt", "extension of caption files")
    shuffle_caption: bool = setting(False, "shuffle the tags of a caption each time an image is used")
    keep_tokens: int = setting(
        0, "number of tags at the start of a caption that are not shuffled or dropped", low=0, high=75
    )
    keep_tokens_separator: str = setting(
        "",
        "separator text: tags before its first and after its second occurrence are not shuffled or dropped",
    )
    caption_separator: str = setting(",", "separator between tags")
    secondary_separator: str = setting(
        "", "separator inside a group of tags that stay together; replaced by caption_separator in the end"
    )
    caption_prefix: str = setting("", "text added before every caption, with a space")
    caption_suffix: str = setting("", "text added after every caption, with a space")
    enable_wildcard: bool = setting(
        False, "{a|b} in a caption becomes a or b at random; of several lines, one is chosen at random"
    )
    caption_dropout_rate: float = setting(
        0.0, "probability that an image is used without its caption", low=0, high=1
    )
    caption_dropout_every_n_epochs: int = setting(
        0, "train every n-th epoch without captions; 0: never", low=0, high=100_000
    )
    caption_tag_dropout_rate: float = setting(
        0.0, "probability that a tag is dropped; tags of keep_tokens are never dropped", low=0, high=1
    )
    max_token_length: int | None = setting(
        None, "maximum tokens of a caption: 75, 150 or 225; default 75", unit="tokens", low=75, high=225
    )
    token_warmup_min: int = setting(1, "number of tags at the start of token warm-up", low=0, high=75)
    token_warmup_step: float = setting(
        0,
        "optimizer steps until captions have all their tags, or a fraction of all steps if below 1; 0: off",
        low=0,
        high=1e7,
    )
    flip_aug: bool = setting(False, "random horizontal flip, with probability 0.5")
    validation_split: float = setting(
        0.0, "fraction of the images of each folder that is held out for the validation loss", low=0, high=0.9
    )
    validation_seed: int | None = setting(
        None, "seed for the choice of the validation images; default: seed", low=0, high=2**63 - 1
    )
    hold_out_references: bool = setting(
        False, "hold out the same reference images as a search; ignored if there is a folder held_out/"
    )
    reg_data_dir: str = setting(
        "", "regularisation images in kohya folders (1_class); as many as training images are used"
    )
    prior_loss_weight: float = setting(1.0, "loss weight of regularisation images", low=0, high=100)
    alpha_mask: bool = setting(False, "use the alpha channel of images as a loss mask")
    masked_loss: bool = setting(False, "masked loss, with masks from conditioning_data_dir or alpha_mask")
    conditioning_data_dir: str = setting(
        "", "folder of masks with the names of the images; white is trained, black is ignored"
    )
    resolution_height: int | None = setting(
        None,
        "height of a training resolution that is no square; resolution is its width then",
        unit="px",
        low=16,
        high=4096,
    )
    dataset_repeats: int = setting(
        1, "repeats of the folders of a dataset config that give no num_repeats", low=1, high=10_000
    )
    in_json: str = setting(
        "",
        "JSON or JSONL file with captions and tags of the images in train_data_dir, instead of caption files",
    )
    random_crop: bool = setting(
        False, "crop images at a random place instead of the centre; latents are encoded anew each time"
    )
    color_aug: bool = setting(
        False, "change hue or gamma of a third of the images; latents are encoded anew each time"
    )
    resize_interpolation: str | None = setting(
        None,
        "how images are resized; default: area if no side grows, else lanczos",
        choices=RESIZE_INTERPOLATIONS,
    )

    # Training length and batch size
    train_batch_size: int = setting(4, "images per micro-batch", low=1, high=1024)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", low=1, high=1024)
    max_train_epochs: int | None = setting(
        10, "epochs: passes over the dataset, including repeats", low=1, high=100_000
    )
    max_train_steps: int | None = setting(
        None, "optimizer steps; overrides max_train_epochs", low=1, high=10_000_000
    )

    # Learning rates
    learning_rate: float = setting(
        1e-4, "learning rate, unless unet_lr or text_encoder_lr is given", low=0, high=10
    )
    unet_lr: float | None = setting(
        None, "learning rate of the U-Net; 0: not trained; default: learning_rate", low=0, high=10
    )
    text_encoder_lr: float | None = setting(
        None, "learning rate of the text encoders; 0: not trained; default: learning_rate", low=0, high=10
    )
    text_encoder_lr1: float | None = setting(
        None,
        "learning rate of the first text encoder (CLIP-L); default: text_encoder_lr",
        low=0,
        high=10,
        only="SDXL",
    )
    text_encoder_lr2: float | None = setting(
        None,
        "learning rate of the second text encoder (bigG); default: text_encoder_lr",
        low=0,
        high=10,
        only="SDXL",
    )
    network_train_unet_only: bool = setting(False, "train only the U-Net")
    down_lr_weight: str = setting(
        "",
        "learning rate multipliers of down blocks (12 for SD1.5, 9 for SDXL): 0,0,0.5,… or sine, cosine+.25 …",
    )
    mid_lr_weight: str = setting(
        "", "learning rate multipliers of the middle block (1 for SD1.5, 3 for SDXL)"
    )
    up_lr_weight: str = setting("", "learning rate multipliers of up blocks, like down_lr_weight")
    block_lr_zero_threshold: float = setting(
        0.0, "blocks with a multiplier up to this value get no LoRA", low=0, high=10
    )
    lr_scheduler: str = setting("cosine", "learning rate schedule", choices=SCHEDULER_NAMES)
    lr_scheduler_num_cycles: int = setting(
        1,
        "cycles of cosine_with_restarts; half waves of cosine_with_min_lr; 0: a constant rate",
        low=0,
        high=1000,
    )
    lr_scheduler_power: float = setting(
        1.0, "exponent of the polynomial schedule; 0: a constant rate", low=0, high=10
    )
    lr_warmup_steps: float = setting(
        0, "warm-up: optimizer steps, or a fraction of all steps if below 1", low=0, high=1e7
    )
    optimizer_type: str = setting("AdamW8bit", "optimizer", choices=OPTIMIZER_NAMES)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0, high=10)
    max_grad_norm: float = setting(1.0, "gradient clipping to this norm; 0: off", low=0, high=1e6)
    optimizer_args: str = setting(
        "", "arguments of the optimizer, as betas=(0.9, 0.99) d_coef=2 or a list; see the table below"
    )
    lr_scheduler_args: str = setting(
        "", "arguments of the schedule, as gamma=0.9 T_max=500 or a list; see the table below"
    )
    lr_decay_steps: float = setting(
        0,
        "warmup_stable_decay: steps of the decay at the end, or a fraction of all steps if below 1",
        low=0,
        high=1e7,
    )
    lr_scheduler_timescale: int | None = setting(
        None,
        "inverse_sqrt: steps until the rate falls; default: lr_warmup_steps, else 10000",
        low=1,
        high=10_000_000,
    )
    lr_scheduler_min_lr_ratio: float | None = setting(
        None,
        "cosine_with_min_lr, warmup_stable_decay: lowest rate, as a fraction of the learning rate",
        low=0,
        high=1,
    )
    loraplus_lr_ratio: float | None = setting(
        None,
        "LoRA+: learning rate of lora_up, relative to that of lora_down (arXiv 2402.12354)",
        low=0,
        high=1000,
    )
    loraplus_unet_lr_ratio: float | None = setting(None, "loraplus_lr_ratio of the U-Net", low=0, high=1000)
    loraplus_text_encoder_lr_ratio: float | None = setting(
        None, "loraplus_lr_ratio of the text encoders", low=0, high=1000
    )

    # Network
    network_type: str = setting("LoRA", "type of adapter", choices=NETWORK_TYPES)
    network_dim: int = setting(
        32, "rank of the LoRA; LoKr: 10000 and more trains full matrices", low=1, high=1_000_000
    )
    network_alpha: float = setting(
        16.0, "the LoRA is scaled by alpha / dim", low=0, high=1_000_000, low_is_excluded=True
    )
    network_dropout: float = setting(
        0.0, "dropout probability of the values after lora_down", low=0, high=0.95
    )
    rank_dropout: float = setting(
        0.0, "dropout probability of each rank; the rest is scaled up", low=0, high=0.95
    )
    module_dropout: float = setting(
        0.0, "probability that a LoRA module is skipped in a step", low=0, high=0.95
    )
    scale_weight_norms: float | None = setting(
        None,
        "max norm regularisation: scale LoRA modules down to this norm after each step; usually 1",
        low=0,
        high=1000,
        low_is_excluded=True,
    )
    conv_dim: int | None = setting(
        None,
        "rank of 3×3 convolutions (LoCon); 0: of resnets only linear layers and 1×1 convolutions; default: no layer "
        "of resnets is trained, and with lycoris_preset the rank is network_dim",
        low=0,
        high=1_000_000,
    )
    conv_alpha: float | None = setting(
        None,
        "alpha of 3×3 convolutions; default: network_alpha",
        low=0,
        high=1_000_000,
        low_is_excluded=True,
    )

    factor: int = setting(
        -1,
        "LoKr: size of the smaller Kronecker factor; -1: factors as equal as possible",
        low=-1,
        high=1024,
    )
    network_weights: str = setting("", "LoRA file to continue from, with the same network_type and rank")
    lycoris_preset: str = setting(
        "",
        "which modules are trained: full, full-lin, attn-mlp, attn-only, unet-only, unet-transformer-only, "
        "unet-convblock-only, ia3, or a preset file of LyCORIS (.toml); default: those of networks.lora",
    )
    rank_dropout_rows: bool = setting(
        False, "rank_dropout as in LyCORIS: drops rows of the weight change, and the rest is not scaled up"
    )
    block_dims: str = setting(
        "",
        "rank of each U-Net block, 25 numbers for SD1.5 and 23 for SDXL: 4,4,8,…; 0: the block is not trained",
    )
    block_alphas: str = setting("", "alpha of each U-Net block; default: network_alpha")
    conv_block_dims: str = setting("", "rank of the 3×3 convolutions of each U-Net block; default: conv_dim")
    conv_block_alphas: str = setting(
        "", "alpha of the 3×3 convolutions of each U-Net block; default: conv_alpha"
    )
    dim_from_weights: bool = setting(
        False, "train the modules of network_weights, at their ranks and alphas; dim and alpha are ignored"
    )
    base_weights: str = setting(
        "", "LoRA files that are merged into the base before training; several with ; between them"
    )
    base_weights_multiplier: str = setting("", "strength of each file of base_weights: 1,0.5; default: 1")
    full_matrix: bool = setting(False, "LoKr: neither factor is decomposed, whatever network_dim")
    decompose_both: bool = setting(False, "LoKr: the smaller factor is decomposed too")
    unbalanced_factorization: bool = setting(False, "LoKr: the outputs are divided the other way round")
    use_tucker: bool = setting(
        False, "3×3 convolutions in Tucker form (LoRA, LoCon, LoHa, LoKr): fewer weights"
    )
    use_scalar: bool = setting(
        False,
        "the weight change is multiplied by a trained number that starts at 0, and no factor starts at 0",
    )
    rs_lora: bool = setting(False, "rank-stabilised: scaled by alpha / √dim instead of alpha / dim")
    train_norm: bool = setting(False, "also train weight and bias of the norms between the trained modules")
    constraint: float = setting(
        0.0,
        "OFT, BOFT: the rotation of a module is limited to this, times its outputs; 0: not",
        low=0,
        high=1000,
    )
    rescaled: bool = setting(False, "OFT, BOFT: each output also gets a trained scale")
    oft_blocks: bool = setting(
        False,
        "OFT: network_dim is the number of blocks, as in networks.oft; default: near the size of a block",
    )
    unit: int = setting(1, "DyLoRA: ranks that are trained together", low=1, high=1024)

    # Loss
    min_snr_gamma: float | None = setting(
        None, "min-SNR loss weighting (arXiv 2303.09556); usually 5", low=0, high=1000, low_is_excluded=True
    )
    scale_v_pred_loss_like_noise_pred: bool = setting(
        False, "v-prediction: weight the loss like that of noise prediction"
    )
    v_pred_like_loss: float | None = setting(
        None, "noise prediction: add a loss weighted like v-prediction, with this factor", low=0, high=100
    )
    debiased_estimation_loss: bool = setting(False, "weight the loss by 1/√SNR (arXiv 2310.08442)")
    loss_type: str = setting("l2", "error measure", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = setting(
        "snr", "how the Huber threshold depends on the timestep", choices=("constant", "exponential", "snr")
    )
    huber_c: float = setting(
        0.1, "Huber threshold at the noisiest timestep", low=0, high=10, low_is_excluded=True
    )
    huber_scale: float = setting(
        1.0,
        "factor of the Huber threshold (for constant and exponential)",
        low=0,
        high=1000,
        low_is_excluded=True,
    )
    v_parameterization: bool = setting(False, "set for a base that predicts v instead of noise")
    zero_terminal_snr: bool = setting(
        False, "zero terminal SNR: the last timestep is pure noise (arXiv 2305.08891)"
    )
    min_timestep: int | None = setting(
        None, "first timestep that is trained; default 0", unit="timesteps", low=0, high=999
    )
    max_timestep: int | None = setting(
        None, "only timesteps below this value are trained; default 1000", unit="timesteps", low=1, high=1000
    )

    # Noise
    noise_offset: float = setting(
        0.0, "noise offset: adds a random brightness to the noise; usually 0.05", low=0, high=1
    )
    noise_offset_random_strength: bool = setting(False, "noise_offset is random between 0 and its value")
    adaptive_noise_scale: float | None = setting(
        None, "adds this value × mean of the latents to noise_offset", low=-10, high=10
    )
    multires_noise_iterations: int | None = setting(
        None, "multiresolution noise: number of coarser layers; usually 6 to 10", low=1, high=32
    )
    multires_noise_discount: float = setting(
        0.3, "multiresolution noise: strength of each layer relative to the previous one", low=0, high=1
    )
    ip_noise_gamma: float | None = setting(
        None,
        "input perturbation: extra noise in the input only (arXiv 2301.11706); usually 0.1",
        low=0,
        high=1,
    )
    ip_noise_gamma_random_strength: bool = setting(False, "ip_noise_gamma is random between 0 and its value")

    # Text encoder
    clip_skip: int | None = setting(
        None, "SD1.5: text encoder layer to use, counted from the end", low=1, high=12, only="SD1.5"
    )
    weighted_captions: bool = setting(
        False,
        "weights in captions: (word:1.2) or (word) count more, [word] less; backslashes escape brackets",
    )

    # Speed and memory
    mixed_precision: str = setting("auto", "compute type", choices=("auto", "no", "fp16", "bf16"))
    save_precision: str = setting("fp16", "precision of the saved LoRA", choices=("float", "fp16", "bf16"))
    no_half_vae: bool = setting(False, "run the VAE in fp32")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about 25 % slower (assumed)"
    )
    checkpoint_blocks: int | None = setting(
        None,
        "gradient_checkpointing: number of U-Net blocks that recompute, outermost first; default: all",
        low=1,
        high=64,
    )
    cpu_offload_checkpointing: bool = setting(
        False, "gradient_checkpointing: keep its saved activations in RAM"
    )
    full_bf16: bool = setting(
        False, "LoRA weights and gradients in bf16, with stochastic rounding: less memory, less exact"
    )
    fp8_base: bool = setting(
        False, "frozen weights of the base in scaled fp8: half the memory of bf16, less exact"
    )
    micro_batch_size: int | None = setting(
        None,
        "images computed at once; a batch is split and accumulated: less memory, same result; default: all",
        low=1,
        high=1024,
    )
    text_encoder_frozen: bool = setting(
        False, "stop training the text encoders' part of the LoRA; set by a run that ran out of memory"
    )
    cpu_offload: bool = setting(
        False,
        "optimizer state in RAM, and text encoders that are not trained on the CPU: less memory, slower",
    )
    opt_channels_last: bool = setting(False, "channels-last memory format for the U-Net: faster convolutions")
    torch_compile: bool = setting(
        False, "compile the transformer blocks of the U-Net with torch.compile; the first steps are slow"
    )
    cache_latents_to_disk: bool = setting(True, "cache latents on disk for later runs")
    vae_batch_size: int = setting(4, "batch size of the VAE when latents are cached", low=1, high=256)

    # Saving, sample images, logging: nothing here changes the trained weights
    save_every_n_epochs: int | None = setting(None, "save the LoRA every n epochs", low=1, high=10_000_000)
    save_every_n_steps: int | None = setting(
        None, "save the LoRA every n optimizer steps", low=1, high=10_000_000
    )
    save_last_n_epochs: int | None = setting(
        None, "keep only the last n files saved by epoch", low=1, high=100_000
    )
    save_last_n_steps: int | None = setting(
        None, "keep only files saved within the last n steps", low=1, high=10_000_000
    )
    sample_every_n_epochs: int | None = setting(
        None, "generate sample images every n epochs", low=1, high=10_000_000
    )
    sample_every_n_steps: int | None = setting(
        None, "generate sample images every n optimizer steps", low=1, high=10_000_000
    )
    sample_at_first: bool = setting(False, "generate sample images before training")
    sample_prompts: str = setting(
        "",
        "prompt file for sample images, one prompt per line, with kohya's --w --h --d --s --l --n; or the prompts",
    )
    logging_dir: str = setting("", "folder for TensorBoard logs; train.jsonl is always written")
    training_comment: str = setting("", "comment in the metadata of the LoRA")
    no_metadata: bool = setting(
        False, "write no tags, folders, comment or settings into LoRA files; they stay in the run's folder"
    )

    def __post_init__(self) -> None:
        for name in SETTINGS:
            object.__setattr__(self, name, check_value(name, getattr(self, name)))


# Settings that do not affect the weights: a checkpoint or a study can be resumed with other values.
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
        "no_metadata",
    }
)
# Numeric settings that can be unset: 0 means unset (TOML has no null).
ZERO_IS_UNSET = ("min_snr_gamma",)
SETTINGS: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Settings)}
SETTING_TYPES: dict[str, Any] = typing.get_type_hints(Settings)


def check_name(name: str) -> None:
    """Raise ConfigError for an unknown setting, with the most similar one."""
    check_known(name, SETTINGS, "setting", otherwise="see docs/settings.md")


def check_value(name: str, value: Any) -> Any:
    """``value`` converted to the type of the setting. Raises ConfigError with its limits.
    Whole floats become ints, and names and arguments of optimizers and schedules get one spelling."""
    check_name(name)
    found = check(name, spelled(name, value), SETTING_TYPES[name], SETTINGS[name])
    return float(found) if name in _FLOATS and found is not None else found


def spelled(name: str, value: Any) -> Any:
    """``value`` as this tool spells it: AdamW for adamw or torch.optim.AdamW, arguments as one text."""
    if name == "sample_prompts" and isinstance(value, list | tuple):
        return _lines(value)
    return _SPELLED[name](value) if name in _SPELLED and value is not None else value


_SPELLED: dict[str, Callable[[Any], Any]] = {
    "optimizer_type": optimizers.canonical,
    "lr_scheduler": schedules.canonical,
    "optimizer_args": partial(arguments.canonical, "optimizer_args"),
    "lr_scheduler_args": partial(arguments.canonical, "lr_scheduler_args"),
}
_FLOATS = frozenset(name for name, kind in SETTING_TYPES.items() if kind in (float, float | None))


def _lines(rows: Sequence[Any]) -> str:
    """A list of prompts as one text: one prompt per line, or JSON if there are tables among them."""
    if all(isinstance(row, str) for row in rows):
        return "".join(" ".join(row.split()) + "\n" for row in rows)
    return json.dumps(list(rows), default=str)
