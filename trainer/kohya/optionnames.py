"""The options of sd-scripts that train a LoRA of SD1.5 or SDXL, by name and kind of value: what the page docs/kohya.md
accounts for.

Recorded from the argument parsers of train_network.py and sdxl_train_network.py with all that they call, from the
dataset schema of library/config_util.py, and from the network modules (sd-scripts 48d368f, February 2026; LyCORIS
f49d30d). Does not own what becomes of an option (``trainer.kohya.read``, ``trainer.data.subsets``).
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FLAGS = _words(
    """
    alpha_mask async_upload bucket_no_upscale cache_info cache_latents cache_latents_to_disk
    cache_text_encoder_outputs cache_text_encoder_outputs_to_disk color_aug console_log_simple
    cpu_offload_checkpointing ddp_gradient_as_bucket_view ddp_static_graph debiased_estimation_loss
    debug_dataset deepspeed dim_from_weights disable_mmap_load_safetensors enable_bucket enable_wildcard
    flip_aug fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16 fused_backward_pass
    gradient_checkpointing highvram ip_noise_gamma_random_strength log_config lowram masked_loss mem_eff_attn
    network_train_text_encoder_only network_train_unet_only no_half_vae no_metadata noise_offset_random_strength
    output_config persistent_data_loader_workers random_crop resume_from_huggingface sample_at_first save_state
    save_state_on_train_end save_state_to_huggingface scale_v_pred_loss_like_noise_pred sdpa shuffle_caption
    skip_cache_check skip_until_initial_step torch_compile use_8bit_adam use_lion_optimizer v2
    v_parameterization weighted_captions xformers zero3_init_flag zero3_save_16bit_model zero_terminal_snr
    """
)
WHOLE_NUMBERS = _words(
    """
    bucket_reso_steps caption_dropout_every_n_epochs clip_skip dataset_repeats ddp_timeout
    gradient_accumulation_steps initial_epoch initial_step keep_tokens lr_scheduler_num_cycles
    lr_scheduler_timescale max_bucket_reso max_data_loader_n_workers max_timestep max_token_length
    max_train_epochs max_train_steps max_validation_steps min_bucket_reso min_timestep multires_noise_iterations
    network_dim sample_every_n_epochs sample_every_n_steps save_every_n_epochs save_every_n_steps
    save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_n_epoch_ratio
    seed token_warmup_min train_batch_size vae_batch_size validate_every_n_epochs validate_every_n_steps
    validation_seed zero_stage
    """
)
NUMBERS = _words(
    """
    adaptive_noise_scale caption_dropout_rate caption_tag_dropout_rate huber_c huber_scale ip_noise_gamma
    learning_rate lr_decay_steps lr_scheduler_min_lr_ratio lr_scheduler_power lr_warmup_steps max_grad_norm
    min_snr_gamma multires_noise_discount network_alpha network_dropout noise_offset prior_loss_weight
    scale_weight_norms token_warmup_step unet_lr v_pred_like_loss validation_split
    """
)
TEXTS = _words(
    """
    caption_extension caption_extention caption_prefix caption_separator caption_suffix conditioning_data_dir
    config_file console_log_file console_log_level dataset_class dataset_config dynamo_backend
    face_crop_aug_range huber_schedule huggingface_path_in_repo huggingface_repo_id huggingface_repo_type
    huggingface_repo_visibility huggingface_token in_json keep_tokens_separator log_prefix log_tracker_config
    log_tracker_name log_with logging_dir loss_type lr_scheduler lr_scheduler_type metadata_author
    metadata_description metadata_is_negative_embedding metadata_license metadata_merged_from
    metadata_preprocessor metadata_tags metadata_thumbnail metadata_title metadata_trigger_phrase
    metadata_usage_hint mixed_precision network_module network_weights offload_optimizer_device
    offload_optimizer_nvme_path offload_param_device offload_param_nvme_path optimizer_type output_dir
    output_name pretrained_model_name_or_path reg_data_dir resize_interpolation resolution resume sample_prompts
    sample_sampler save_model_as save_precision secondary_separator tokenizer_cache_dir train_data_dir
    training_comment vae wandb_api_key wandb_run_name
    """
)
LISTS = _words(
    """
    base_weights base_weights_multiplier lr_scheduler_args network_args optimizer_args text_encoder_lr
    """
)
OPTIONS = tuple(sorted((*FLAGS, *WHOLE_NUMBERS, *NUMBERS, *TEXTS, *LISTS)))
# Options that only a command line has a use for.
COMMAND_LINE = ("config_file", "output_config", "debug_dataset")

# The dataset schema: key → what it may describe. A key of a dataset may also stand in [general].
FILE, DATASET, DREAMBOOTH, FINE_TUNING, CONTROLNET = (
    "file",
    "dataset",
    "DreamBooth",
    "fine-tuning",
    "ControlNet",
)
_SUBSETS = (DREAMBOOTH, FINE_TUNING, CONTROLNET)
_ASCENDING = _words(
    """
    color_aug face_crop_aug_range flip_aug num_repeats random_crop shuffle_caption keep_tokens keep_tokens_separator
    secondary_separator caption_separator enable_wildcard token_warmup_min token_warmup_step caption_prefix
    caption_suffix custom_attributes resize_interpolation caption_dropout_every_n_epochs caption_dropout_rate
    caption_tag_dropout_rate
    """
)
_OF_DATASET = _words(
    """
    batch_size bucket_no_upscale bucket_reso_steps enable_bucket max_bucket_reso min_bucket_reso validation_seed
    validation_split resolution network_multiplier
    """
)
DATASET_KEYS: dict[str, tuple[str, ...]] = {
    "general": (FILE,),
    "datasets": (FILE,),
    "subsets": (DATASET,),
    **dict.fromkeys(_OF_DATASET, (DATASET,)),
    **dict.fromkeys(_ASCENDING, (DATASET, *_SUBSETS)),
    "caption_extension": (DATASET, DREAMBOOTH, CONTROLNET),
    "cache_info": (DATASET, DREAMBOOTH, CONTROLNET),
    "class_tokens": (DATASET, DREAMBOOTH),
    "image_dir": _SUBSETS,
    "is_reg": (DREAMBOOTH,),
    "alpha_mask": (DREAMBOOTH, FINE_TUNING),
    "metadata_file": (FINE_TUNING,),
    "conditioning_data_dir": (CONTROLNET,),
}

# network_args: module → the arguments that it reads. deprecated_arg_dict of LyCORIS has the four old spellings.
NETWORK_ARGS: dict[str, tuple[str, ...]] = {
    "networks.lora": _words(
        """
        conv_dim conv_alpha rank_dropout module_dropout down_lr_weight mid_lr_weight up_lr_weight
        block_lr_zero_threshold block_dims block_alphas conv_block_dims conv_block_alphas loraplus_lr_ratio
        loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio
    """
    ),
    "networks.dylora": ("unit",),
    "networks.oft": ("enable_all_linear", "enable_conv"),
    "lycoris.kohya": _words(
        """
        algo preset conv_dim conv_alpha dropout rank_dropout module_dropout use_tucker use_cp use_conv_cp
        disable_conv_cp use_scalar block_size train_norm constraint constrain rescaled dora_wd wd_on_output
        full_matrix bypass_mode rs_lora unbalanced_factorization decompose_both factor train_t5xxl
        loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio
    """
    ),
}
