"""Every setting of a training run, once, under kohya's name: type, default, limits and what it is for.

Owns the table.  What settings mean together, and what follows from them, is ``trainer.config``'s; how a value
is checked against its rule, ``trainer.checks``'.  Never imports torch.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from typing import Any

from trainer.checks import Rule, check, check_known, setting

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
class Settings:
    """The values of all settings, each within its own limits.  Names are sd-scripts' (kohya's), defaults are ours."""

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
        for name in SETTINGS:
            object.__setattr__(self, name, check_value(name, getattr(self, name)))


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
# Settings that can be unset, written as a number: 0 means unset (TOML has no null).
ZERO_IS_UNSET = ("min_snr_gamma",)
SETTINGS: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Settings)}
_TYPES: dict[str, Any] = typing.get_type_hints(Settings)


def check_name(name: str) -> None:
    """Raise ConfigError for a setting that does not exist, naming the nearest one."""
    check_known(name, SETTINGS, "setting", otherwise="see docs/settings.md")


def check_value(name: str, value: Any) -> Any:
    """``value`` as the setting's own type, or ConfigError with its limits.  Whole floats become ints."""
    check_name(name)
    found = check(name, value, _TYPES[name], SETTINGS[name])
    return float(found) if name in _FLOATS and found is not None else found


_FLOATS = frozenset(name for name, kind in _TYPES.items() if kind in (float, float | None))
