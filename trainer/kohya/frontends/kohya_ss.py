"""Presets of kohya_ss' window, and the JSON that it saves beside each LoRA: its fields as the settings that it hands to
sd-scripts.

Rules as in kohya_ss 45088f0: ``common_gui.py:update_my_data`` (older presets), ``lora_gui.py:train_model`` (the
settings written to config_lora-DATE.toml), ``common_gui.py:run_cmd_advanced_training`` (extra arguments). One
difference: kohya_ss counts the images to turn ``epoch`` into max_train_steps; here ``epoch`` becomes max_train_epochs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.kohya.frontends.commandline import flags
from trainer.kohya.frontends.found import as_number, tidy
from trainer.kohya.frontends.kohya_ss_networks import network
from trainer.text import clean_text

# Fields of the window that a preset may lack, with the window's own values (class_basic_training.py,
# class_advanced_training.py, lora_gui.py). max_train_steps is no member: presets without it are older than the field.
WINDOW: dict[str, Any] = {
    "LoRA_type": "Standard",
    "network_dim": 8,
    "network_alpha": 1,
    "text_encoder_lr": 0.0001,
    "unet_lr": 0.0001,
    "learning_rate": 0.0001,
    "train_batch_size": 1,
    "epoch": 1,
    "save_every_n_epochs": 1,
    "caption_extension": ".txt",
    "mixed_precision": "fp16",
    "save_precision": "fp16",
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_resolution": "512,512",
    "enable_bucket": True,
    "min_bucket_reso": 256,
    "max_bucket_reso": 2048,
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "max_token_length": 75,
    "max_timestep": 1000,
    "multires_noise_discount": 0.3,
    "noise_offset_type": "Original",
    "xformers": "xformers",
}
# Numbers that a preset may hold as a text, with the value for a text that is no number (update_my_data).
_NUMBERS: dict[str, Any] = {
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "max_token_length": 75,
    **dict.fromkeys(
        (
            "adaptive_noise_scale",
            "bucket_reso_steps",
            "caption_dropout_every_n_epochs",
            "caption_dropout_rate",
            "clip_skip",
            "epoch",
            "gradient_accumulation_steps",
            "huber_c",
            "huber_scale",
            "ip_noise_gamma",
            "keep_tokens",
            "learning_rate",
            "lr_warmup",
            "lr_warmup_steps",
            "max_bucket_reso",
            "max_grad_norm",
            "max_timestep",
            "max_train_epochs",
            "max_train_steps",
            "min_bucket_reso",
            "min_snr_gamma",
            "min_timestep",
            "multires_noise_discount",
            "multires_noise_iterations",
            "network_alpha",
            "network_dim",
            "network_dropout",
            "noise_offset",
            "prior_loss_weight",
            "sample_every_n_epochs",
            "sample_every_n_steps",
            "save_every_n_epochs",
            "save_every_n_steps",
            "save_last_n_epochs",
            "save_last_n_epochs_state",
            "save_last_n_steps",
            "save_last_n_steps_state",
            "scale_weight_norms",
            "seed",
            "text_encoder_lr",
            "train_batch_size",
            "unet_lr",
            "v_pred_like_loss",
            "vae_batch_size",
        ),
        0,
    ),
}
# Fields that are settings of sd-scripts under the same name.
_SAME = (
    "bucket_no_upscale",
    "bucket_reso_steps",
    "cache_latents",
    "cache_latents_to_disk",
    "caption_dropout_every_n_epochs",
    "caption_dropout_rate",
    "caption_extension",
    "clip_skip",
    "color_aug",
    "dataset_config",
    "debiased_estimation_loss",
    "dim_from_weights",
    "enable_bucket",
    "flip_aug",
    "fp8_base",
    "full_bf16",
    "full_fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "highvram",
    "huber_c",
    "huber_scale",
    "huber_schedule",
    "huggingface_repo_id",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "keep_tokens",
    "learning_rate",
    "log_tracker_config",
    "log_tracker_name",
    "log_with",
    "logging_dir",
    "loss_type",
    "lr_scheduler",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_type",
    "masked_loss",
    "max_bucket_reso",
    "max_grad_norm",
    "max_timestep",
    "max_token_length",
    "mem_eff_attn",
    "metadata_author",
    "metadata_description",
    "metadata_license",
    "metadata_tags",
    "metadata_title",
    "min_bucket_reso",
    "min_snr_gamma",
    "min_timestep",
    "mixed_precision",
    "network_alpha",
    "network_dim",
    "network_dropout",
    "network_weights",
    "output_dir",
    "output_name",
    "persistent_data_loader_workers",
    "pretrained_model_name_or_path",
    "prior_loss_weight",
    "random_crop",
    "reg_data_dir",
    "resume",
    "sample_every_n_epochs",
    "sample_every_n_steps",
    "sample_prompts",
    "sample_sampler",
    "save_every_n_epochs",
    "save_every_n_steps",
    "save_last_n_epochs",
    "save_last_n_epochs_state",
    "save_last_n_steps",
    "save_last_n_steps_state",
    "save_model_as",
    "save_precision",
    "save_state",
    "save_state_on_train_end",
    "scale_v_pred_loss_like_noise_pred",
    "scale_weight_norms",
    "seed",
    "shuffle_caption",
    "skip_cache_check",
    "train_batch_size",
    "train_data_dir",
    "train_inpainting",
    "training_comment",
    "unet_lr",
    "v2",
    "v_parameterization",
    "v_pred_like_loss",
    "vae",
    "vae_batch_size",
    "weighted_captions",
)
# Settings that mean something else if they are left out: kohya_ss writes no zeros.
_ZERO_LOST = {"max_grad_norm": 1.0, "prior_loss_weight": 1.0, "network_alpha": 1, "learning_rate": 2e-6}


def is_preset(table: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a LoRA preset of kohya_ss; the field exists in no other program."""
    return "LoRA_type" in table


def was_saved_beside_a_lora(table: Mapping[str, Any]) -> bool:
    """kohya_ss saves the same fields at each start; presets to be passed on name no folders."""
    return all(table.get(name) for name in ("output_dir", "output_name", "pretrained_model_name_or_path"))


def settings_of(preset: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings that kohya_ss hands to sd-scripts for a preset, and lines about what was translated.
    Raises ConfigError for a type of LoRA that kohya_ss does not have."""
    fields, notes = _fields(preset)
    settings: dict[str, Any] = {name: fields.get(name) for name in _SAME}
    settings |= _renamed(fields)
    settings |= _rates(fields)
    settings |= _noise(fields)
    settings |= network(fields, notes)
    settings |= _length(fields, notes)
    settings |= _warmup(fields, notes)
    for name, usual in _ZERO_LOST.items():
        if fields.get(name) == 0 and name in preset:
            notes.append(f"{name} = 0 → {usual}: kohya_ss writes no zeros, so sd-scripts' default is used")
    if fields.get("stop_text_encoder_training"):
        notes.append("stop_text_encoder_training: kohya_ss does not use it")
    if "sdxl" in fields:
        notes.append(f"sdxl = {str(bool(fields['sdxl'])).lower()}: the base's file says so")
    # as kohya_ss: value not in ["", False, None]; 0 equals False in Python
    kept = {name: value for name, value in settings.items() if value not in ("", False, None, [])}
    extra = str(fields.get("additional_parameters") or "").replace('"', "").split()
    if extra:
        found = flags(extra)
        notes.append(f"additional_parameters → {', '.join(found)}")
        kept |= found
    return kept, tuple(notes)


def _fields(preset: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of the window after the preset was opened."""
    fields = dict(preset)
    notes: list[str] = []
    for old, new in (("lora_network_weights", "network_weights"), ("caption_extention", "caption_extension")):
        if (value := fields.pop(old, None)) is not None:
            fields[new] = value
    fields.setdefault("optimizer", "AdamW8bit" if fields.get("use_8bit_adam") else "AdamW")
    if isinstance(fields.get("xformers"), bool):
        fields["xformers"] = "xformers" if fields["xformers"] else "none"
    missing = [name for name in WINDOW if fields.get(name) is None]
    if missing:
        listed = ", ".join(f"{name} = {str(WINDOW[name]).lower()}" for name in missing)
        notes.append(f"not in the preset, so as in kohya_ss' window: {listed}")
    fields |= {name: WINDOW[name] for name in missing}
    for name, otherwise in _NUMBERS.items():
        if name in fields:
            _check_point(name, fields[name])
            fields[name] = tidy(as_number(fields[name], otherwise))
    return fields, notes


def _check_point(name: str, value: Any) -> None:
    """Raise ConfigError for a decimal comma, which kohya_ss reads as no number."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value):
        raise ConfigError(
            f"{name} = {clean_text(value)} in a preset of kohya_ss has a comma",
            f"write a point: {clean_text(value.strip().replace(',', '.'))}",
        )


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    is_sdxl = bool(fields.get("sdxl"))
    return {
        "optimizer_type": fields["optimizer"],
        "optimizer_args": _arguments(fields.get("optimizer_args")),
        "lr_scheduler_args": _arguments(fields.get("lr_scheduler_args")),
        "resolution": fields["max_resolution"],
        "xformers": fields["xformers"] == "xformers",
        "sdpa": fields["xformers"] == "sdpa",
        "no_half_vae": is_sdxl and fields.get("sdxl_no_half_vae"),
        "cache_text_encoder_outputs": is_sdxl and fields.get("sdxl_cache_text_encoder_outputs"),
    }


def _arguments(text: Any) -> list[str]:
    """``key=value`` texts of a field, split at spaces; a part without ``=`` belongs to the one before."""
    found: list[str] = []
    for part in str(text or "").replace('"', "").split():
        if "=" not in part and found:
            found[-1] += part
        else:
            found.append(part)
    return found


def _rates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A rate of 0 beside one that is not 0: that part is not trained (lora_gui.py:resolve_network_train_flags)."""
    text, unet = float(fields["text_encoder_lr"]), float(fields["unet_lr"])
    return {
        "text_encoder_lr": [text, text] if text > 0 else None,
        "network_train_unet_only": text == 0 and unet != 0,
        "network_train_text_encoder_only": text != 0 and unet == 0,
    }


def _noise(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Only the noise of the chosen kind is used, whatever the other fields say."""
    names: tuple[str, ...] = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    if fields["noise_offset_type"] == "Multires":
        names = ("multires_noise_iterations", "multires_noise_discount")
    return {name: fields.get(name) for name in names}


def _length(fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    epochs, steps = fields.get("max_train_epochs") or 0, fields.get("max_train_steps") or 0
    if epochs:
        return {"max_train_epochs": epochs}
    if steps:
        return {"max_train_steps": steps}
    if fields.get("dataset_config"):
        notes.append("epoch: kohya_ss does not use it with a dataset file; sd-scripts trains 1600 steps")
        return {}
    epoch = fields["epoch"]
    if epoch < 1:
        raise ConfigError(
            f"epoch = {epoch} in a preset of kohya_ss trains nothing",
            "give --set max_train_epochs=10, or the number you want",
        )
    notes.append(
        f"epoch = {epoch} → max_train_epochs = {epoch}: kohya_ss counts the images into as many steps"
    )
    return {"max_train_epochs": epoch}


def _warmup(fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Steps, or percent of all steps (common_gui.py:resolve_lr_warmup_steps)."""
    steps, percent = fields.get("lr_warmup_steps") or 0, fields.get("lr_warmup") or 0
    if steps > 0:
        return {"lr_warmup_steps": int(steps)}
    if percent and fields.get("dataset_config") and (length := fields.get("max_train_steps")):
        count = round(percent * length / 100)
        notes.append(f"lr_warmup = {percent} (percent) → lr_warmup_steps = {count}")
        return {"lr_warmup_steps": count}
    if percent:
        notes.append(f"lr_warmup = {percent} (percent) → lr_warmup_steps = {percent / 100:g} of all steps")
        return {"lr_warmup_steps": percent / 100}
    return {}
