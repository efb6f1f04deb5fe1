"""Tables of all keys in sd-scripts' configuration files and their meaning here, for ``trainer.kohya.read``.

The four classes do not overlap. Together they contain all keys that sd-scripts (48d368f, February 2026)
accepts for training a LoRA of SD1.5 or SDXL, and the keys that the GUI kohya_ss adds.
"""

from __future__ import annotations

from typing import Any

from trainer.config import SETTINGS
from trainer.data import FACE_CROP
from trainer.optimizers import OPTIMIZERS
from trainer.settings import SETTING_TYPES

# Defaults of sd-scripts that differ from ours.
KOHYA_DEFAULTS: dict[str, Any] = {
    "output_name": "last",
    "enable_bucket": False,
    "max_bucket_reso": 1024,
    "bucket_no_upscale": False,
    "caption_extension": ".caption",
    "train_batch_size": 1,
    "max_train_epochs": None,
    "max_train_steps": 1600,
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "optimizer_type": "AdamW",
    "network_dim": 4,
    "network_alpha": 1.0,
    "conv_alpha": 1.0,
    "mixed_precision": "no",
    "save_precision": "float",
    "cache_latents_to_disk": False,
    "vae_batch_size": 1,
}
# Settings without a default in sd-scripts: the base must be given, the others use our defaults.
NO_KOHYA_DEFAULT = ("pretrained_model_name_or_path", "resolution", "seed")
# Defaults of the optimizer libraries, which sd-scripts does not change.
WEIGHT_DECAY = {name: optimizer.weight_decay for name, optimizer in OPTIMIZERS.items()}

WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "the latest state is always saved during a run; to resume: hpo resume, or the same command again": (
        "save_state",
        "save_state_on_train_end",
        "save_last_n_epochs_state",
        "save_last_n_steps_state",
    ),
    "a LoRA is saved as .safetensors with its metadata": (
        "save_model_as",
        "use_safetensors",
    ),
    "metadata is written by this tool; training_comment is kept": (
        "metadata_title",
        "metadata_author",
        "metadata_description",
        "metadata_license",
        "metadata_tags",
        "metadata_usage_hint",
        "metadata_thumbnail",
        "metadata_merged_from",
        "metadata_trigger_phrase",
        "metadata_preprocessor",
        "metadata_is_negative_embedding",
    ),
    "nothing is uploaded": (
        "huggingface_repo_id",
        "huggingface_repo_type",
        "huggingface_path_in_repo",
        "huggingface_token",
        "huggingface_repo_visibility",
        "save_state_to_huggingface",
        "async_upload",
    ),
    "the log is train.jsonl, and TensorBoard with logging_dir": (
        "log_with",
        "log_prefix",
        "log_tracker_name",
        "wandb_run_name",
        "log_tracker_config",
        "wandb_api_key",
        "log_config",
        "console_log_level",
        "console_log_file",
        "console_log_simple",
    ),
    "it changes speed or memory, not the result": (
        "max_data_loader_n_workers",
        "persistent_data_loader_workers",
        "lowram",
        "highvram",
        "dynamo_backend",
        "ddp_timeout",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "disable_mmap_load_safetensors",
        "tokenizer_cache_dir",
        "skip_cache_check",
        "cache_info",
        "text_encoder_batch_size",
        "sdpa",
    ),
    "DeepSpeed divides a model among GPUs; here each GPU has all of it": (
        "deepspeed",
        "zero_stage",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "fp16_master_weights_and_gradients",
    ),
    "latents and text encoder outputs are always cached if possible": (
        "cache_latents",
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
    ),
    "it only has an effect together with a refused setting": (
        "skip_until_initial_step",
        "resume_from_huggingface",
    ),
    "the validation loss is computed after every epoch, over all validation images": (
        "validate_every_n_steps",
        "validate_every_n_epochs",
        "max_validation_steps",
    ),
    "sd-scripts does not read it for LoRA": (
        "stop_text_encoder_training",
        "train_inpainting",
        "fused_backward_pass",
    ),
    "sd-scripts does not read it; kohya_ss derives other settings from it": (
        "epoch",
        "noise_offset_type",
        "lowvram",
    ),
    FACE_CROP: ("face_crop_aug_range",),
    "command line only: it names the file of settings, which is the argument of hpo train": ("config_file",),
    "command line only: it writes a file of settings and ends; here: hpo export kohya": ("output_config",),
    "command line only: it shows the images and ends; here: hpo dataset check": ("debug_dataset",),
    "it belongs to other models": (
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "blocks_to_swap",
        "clip_l",
        "t5xxl",
    ),
}

FROM_THE_START = (
    "training starts at the beginning; an interrupted run goes on by itself (hpo resume), and to go on from a LoRA "
    "set network_weights and the epochs that are left"
)
# key → (values without an effect, why all other values are refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "v2": ((False,), "SD 2.x bases are not supported"),
    "dataset_class": ((), "external code is not run"),
    "resume": ((), "a training state of sd-scripts cannot be resumed"),
    "initial_epoch": ((0, 1), FROM_THE_START),
    "initial_step": ((0,), FROM_THE_START),
}

NO_EFFECT_REASON = {key: reason for reason, keys in WITHOUT_EFFECT.items() for key in keys}
# Keys that a method of _SettingsReading translates.
TRANSLATED = frozenset(
    {
        "caption_extention",
        "use_8bit_adam",
        "use_lion_optimizer",
        "lr_scheduler_type",
        "network_module",
        "network_args",
        "full_fp16",
        "fp8_base_unet",
        "xformers",
        "mem_eff_attn",
        "network_train_text_encoder_only",
        "output_dir",
        "sample_sampler",
        "save_n_epoch_ratio",
        "datasets",
    }
)
# Keys for which 0 means "not set" in sd-scripts or its GUIs.
ZERO_IS_UNSET = (
    "min_snr_gamma",
    "scale_weight_norms",
    "multires_noise_iterations",
    "ip_noise_gamma",
    "v_pred_like_loss",
    "adaptive_noise_scale",
    "lr_scheduler_timescale",
    "save_every_n_epochs",
    "save_every_n_steps",
    "save_last_n_epochs",
    "save_last_n_steps",
    "sample_every_n_epochs",
    "sample_every_n_steps",
)
# network_args of sd-scripts' networks.lora, used under the same name here.
NETWORK_ARGUMENTS = (
    "conv_dim",
    "conv_alpha",
    "rank_dropout",
    "module_dropout",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "factor",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)
# LyCORIS' algo → our network_type.
# network_args that GUIs also write beside it, where sd-scripts does not read them.
LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
LYCORIS_TYPES = {
    "lora": "LoRA",
    "locon": "LoCon",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "Full",
    "ia3": "IA3",
    "diag-oft": "OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
    "dylora": "DyLoRA",
}
# Settings that are arguments of LyCORIS and other network modules.
LYCORIS_SETTINGS = (
    "full_matrix",
    "decompose_both",
    "unbalanced_factorization",
    "use_tucker",
    "use_scalar",
    "rs_lora",
    "train_norm",
    "constraint",
    "rescaled",
    "oft_blocks",
    "unit",
)
# Our settings that sd-scripts spells differently (in network_args and optimizer_args) or does not have.
OURS_ALONE = frozenset(
    {
        *NETWORK_ARGUMENTS,
        "weight_decay",
        "network_type",
        "lycoris_preset",
        "rank_dropout_rows",
        *LYCORIS_SETTINGS,
        "text_encoder_lr1",
        "text_encoder_lr2",
        "micro_batch_size",
        "text_encoder_frozen",
        "opt_channels_last",
        "cpu_offload",
        "checkpoint_blocks",
        "hold_out_references",
        "resolution_height",
    }
)
# Keys that are on or off; 0 and 1 are read as false and true, as sd-scripts' tests for truth do.
SWITCHES = frozenset(
    {
        *(name for name, kind in SETTING_TYPES.items() if kind is bool),
        *(name for name, (harmless, _) in REFUSED.items() if any(value is False for value in harmless)),
        "use_8bit_adam",
        "use_lion_optimizer",
        "full_fp16",
        "fp8_base_unet",
        "xformers",
        "mem_eff_attn",
        "network_train_text_encoder_only",
    }
)
KNOWN_KEYS = (
    (frozenset(SETTINGS) - OURS_ALONE)
    | frozenset(REFUSED)
    | frozenset(NO_EFFECT_REASON)
    | TRANSLATED
    | frozenset(LORA_PLUS)
)
