"""What every key of sd-scripts' configuration files means here: tables, read by ``trainer.kohya``.

The four classes do not overlap and together are all keys that sd-scripts (0.9, February 2026) accepts for
training a LoRA of SD1.5 or SDXL, and those that the graphical front end kohya_ss adds.
"""

from __future__ import annotations

from typing import Any

from trainer.config import SCHEDULER_NAMES, SETTINGS

# What sd-scripts takes for a setting that is not given, where that is not our own default.
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
# The libraries' own defaults, which sd-scripts leaves in place.
WEIGHT_DECAY = {"AdamW": 0.01, "AdamW8bit": 0.01, "Lion8bit": 0.0, "Adafactor": 0.0, "Prodigy": 0.0}

WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "saving is this tool's own": (
        "output_dir save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs",
        "save_last_n_steps save_last_n_epochs_state save_last_n_steps_state save_state",
        "save_state_on_train_end save_model_as use_safetensors no_metadata training_comment",
        "output_config",
    ),
    "metadata is written by this tool": (
        "metadata_title metadata_author metadata_description metadata_license metadata_tags",
        "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase",
        "metadata_preprocessor metadata_is_negative_embedding",
    ),
    "nothing is uploaded": (
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token",
        "huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload",
    ),
    "logging is this tool's own": (
        "logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config",
        "wandb_api_key log_config console_log_level console_log_file console_log_simple",
    ),
    "samples and scores are this tool's own": (
        "sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts sample_sampler",
        "validation_seed validate_every_n_steps validate_every_n_epochs",
        "max_validation_steps",
    ),
    "it changes speed or memory, not the result": (
        "max_data_loader_n_workers persistent_data_loader_workers lowram highvram torch_compile",
        "dynamo_backend ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph",
        "disable_mmap_load_safetensors tokenizer_cache_dir skip_cache_check cache_info",
        "cpu_offload_checkpointing text_encoder_batch_size deepspeed zero_stage sdpa",
        "offload_optimizer_device offload_optimizer_nvme_path offload_param_device",
        "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model",
        "fp16_master_weights_and_gradients",
    ),
    "encoded images and captions are always cached where they can be": (
        "cache_latents cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
    ),
    "it only matters together with a setting that is refused": (
        "huber_schedule huber_c huber_scale multires_noise_discount token_warmup_min prior_loss_weight",
        "conditioning_data_dir lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio",
        "dataset_repeats base_weights_multiplier",
    ),
    "sd-scripts does not read it; kohya_ss writes the settings that follow from it": (
        "epoch noise_offset_type lowvram",
    ),
    "it belongs to other models or commands": (
        "config_file debug_dataset weighting_scheme logit_mean logit_std mode_scale blocks_to_swap",
        "clip_l t5xxl",
    ),
}

LORA_PLUS = "both halves of the LoRA are trained at one rate (no LoRA+)"
# key → (values that ask for nothing, why anything else is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "v2": ((False,), "SD 2.x bases are not supported"),
    "v_parameterization": ((False,), "v-prediction bases are not supported"),
    "zero_terminal_snr": ((False,), "v-prediction bases are not supported"),
    "scale_v_pred_loss_like_noise_pred": ((False,), "v-prediction bases are not supported"),
    "v_pred_like_loss": ((0,), "this loss weighting is not built in"),
    "debiased_estimation_loss": ((False,), "this loss weighting is not built in; min_snr_gamma is"),
    "loss_type": (("l2",), "only the squared error is built in"),
    "masked_loss": ((False,), "masked loss is not built in"),
    "alpha_mask": ((False,), "masked loss is not built in"),
    "reg_data_dir": ((), "regularisation images are not built in"),
    "multires_noise_iterations": ((0,), "multi-resolution noise is not built in; noise_offset is"),
    "ip_noise_gamma": ((0,), "input perturbation is not built in"),
    "ip_noise_gamma_random_strength": ((False,), "input perturbation is not built in"),
    "adaptive_noise_scale": ((0,), "only a fixed noise_offset is built in"),
    "noise_offset_random_strength": ((False,), "only a fixed noise_offset is built in"),
    "min_timestep": ((0,), "all 1000 timesteps are trained"),
    "max_timestep": ((1000,), "all 1000 timesteps are trained"),
    "color_aug": ((False,), "images are trained as they are"),
    "flip_aug": ((False,), "images are trained as they are; add mirrored copies to the folder"),
    "random_crop": ((False,), "images are cropped around their centre"),
    "face_crop_aug_range": ((), "images are cropped around their centre"),
    "resize_interpolation": (
        (),
        "images are shrunk by area and enlarged by Lanczos, as sd-scripts does by default",
    ),
    "caption_dropout_rate": ((0,), "captions are not dropped"),
    "caption_dropout_every_n_epochs": ((0,), "captions are not dropped"),
    "caption_tag_dropout_rate": ((0,), "tags are not dropped"),
    "token_warmup_step": ((0,), "all tags are used from the start"),
    "caption_separator": ((",",), "tags are separated by commas"),
    "secondary_separator": ((), "tags are separated by commas"),
    "keep_tokens_separator": ((), "use keep_tokens, which counts tags"),
    "enable_wildcard": ((False,), "captions are used as they are"),
    "caption_prefix": ((), "captions are used as they are"),
    "caption_suffix": ((), "captions are used as they are"),
    "weighted_captions": ((False,), "captions are used as they are"),
    "max_token_length": ((75,), "captions are read up to 75 tokens"),
    "in_json": ((), "captions come from files beside the images"),
    "dataset_class": ((), "code from elsewhere is not run"),
    "dataset_config": ((), "give the folder as train_data_dir"),
    "vae": ((), "the base's own VAE is used; save the base with the VAE you want"),
    "network_weights": ((), "training starts from a fresh LoRA"),
    "dim_from_weights": ((False,), "training starts from a fresh LoRA"),
    "base_weights": ((), "merge them into the base first"),
    "scale_weight_norms": ((0,), "weight norms are not limited"),
    "resume": ((), "a state of sd-scripts cannot be resumed"),
    "lr_scheduler_type": ((), "schedules are " + ", ".join(SCHEDULER_NAMES)),
    "lr_scheduler_args": ((), "schedules have no further arguments"),
    "validation_split": ((0,), "every image is trained; put images that judge the result into held_out/"),
    "initial_epoch": ((0, 1), "training starts at its beginning"),
    "initial_step": ((0,), "training starts at its beginning"),
    "skip_until_initial_step": ((False,), "training starts at its beginning"),
    "stop_text_encoder_training": ((0,), "the text encoders are trained to the end or not at all"),
    "train_inpainting": ((False,), "inpainting bases are not supported"),
    "loraplus_lr_ratio": ((0,), LORA_PLUS),
    "loraplus_unet_lr_ratio": ((0,), LORA_PLUS),
    "loraplus_text_encoder_lr_ratio": ((0,), LORA_PLUS),
    "fused_backward_pass": ((False,), "sd-scripts itself ignores it for LoRA; leave it out"),
}

# Optimizers that differ from ours in where their state is kept, not in what they compute.
SAME_OPTIMIZER = {"pagedadamw": "AdamW", "pagedadamw8bit": "AdamW8bit", "pagedlion8bit": "Lion8bit"}
# optimizer_args that ask for what our optimizers do anyway.
SAME_ARGUMENTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "AdamW": {"betas": ((0.9, 0.999),), "eps": (1e-8,)},
    "AdamW8bit": {"betas": ((0.9, 0.999),), "eps": (1e-8,)},
    "Lion8bit": {"betas": ((0.9, 0.99),)},
    "Adafactor": {"scale_parameter": (False,), "relative_step": (False,), "warmup_init": (False,)},
    "Prodigy": {
        "decouple": (True,),
        "betas": ((0.9, 0.999),),
        "use_bias_correction": (False,),
        "d_coef": (1,),
        "safeguard_warmup": (True,),
    },
}

NO_EFFECT_REASON = {
    key: reason for reason, lines in WITHOUT_EFFECT.items() for line in lines for key in line.split()
}
# Keys that a method of _Reading translates.
TRANSLATED = frozenset(
    {
        "caption_extention",
        "use_8bit_adam",
        "use_lion_optimizer",
        "optimizer_args",
        "network_module",
        "network_args",
        "full_fp16",
        "full_bf16",
        "fp8_base",
        "fp8_base_unet",
        "xformers",
        "mem_eff_attn",
        "network_train_text_encoder_only",
        "datasets",
    }
)
# Our settings that sd-scripts spells otherwise (inside network_args and optimizer_args).
OURS_ALONE = frozenset({"conv_dim", "conv_alpha", "weight_decay"})
KNOWN_KEYS = (
    (frozenset(SETTINGS) - OURS_ALONE) | frozenset(REFUSED) | frozenset(NO_EFFECT_REASON) | TRANSLATED
)
