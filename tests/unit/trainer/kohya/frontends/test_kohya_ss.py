"""Presets of kohya_ss' window become the settings that kohya_ss hands to sd-scripts.

Rules as in kohya_ss 45088f0, ``kohya_gui/lora_gui.py:train_model``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.kohya.frontends import Found, recognise


def preset(**fields: Any) -> Found:
    given = {"LoRA_type": "Standard", "train_data_dir": "images", **fields}
    return recognise(Path("p.json"), json.dumps(given).encode())


def test_a_short_preset_gets_the_values_of_the_window() -> None:
    found = preset(network_dim=8, optimizer="AdamW8bit")
    assert found.form == "a preset of kohya_ss' window (JSON)"
    assert found.is_translated
    settings = found.settings
    assert settings["network_module"] == "networks.lora"
    assert settings["network_dim"] == 8 and settings["optimizer_type"] == "AdamW8bit"
    assert settings["lr_scheduler"] == "cosine" and settings["lr_warmup_steps"] == 0.1
    assert settings["max_bucket_reso"] == 2048 and settings["caption_extension"] == ".txt"
    assert settings["max_train_epochs"] == 1 and "max_train_steps" not in settings
    assert any("lr_scheduler = cosine" in note for note in found.notes)


def test_the_json_beside_a_lora_is_named_as_that() -> None:
    found = preset(output_dir="out", output_name="kai", pretrained_model_name_or_path="base.safetensors")
    assert found.form == "settings that kohya_ss saved beside a LoRA (JSON)"


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("Standard", "networks.lora", []),
        ("Kohya LoCon", "networks.lora", ["conv_dim=4", "conv_alpha=2"]),
        ("LoRA-FA", "networks.lora_fa", []),
        ("Kohya DyLoRA", "networks.dylora", ["conv_dim=4", "conv_alpha=2", "unit=1"]),
        ("Kohya LoKr", "networks.lokr", ["conv_dim=4", "factor=8", "conv_alpha=2"]),
        (
            "LyCORIS/LoCon",
            "lycoris.kohya",
            [
                "preset=full",
                "conv_dim=4",
                "conv_alpha=2",
                "use_tucker=False",
                "rank_dropout=0",
                "bypass_mode=False",
                "dora_wd=False",
                "module_dropout=0",
                "use_scalar=False",
                "rank_dropout_scale=False",
                "train_norm=False",
                "algo=locon",
            ],
        ),
        (
            "LyCORIS/iA3",
            "lycoris.kohya",
            ["preset=full", "conv_dim=4", "conv_alpha=2", "train_on_input=True", "algo=ia3"],
        ),
        (
            "LyCORIS/Native Fine-Tuning",
            "lycoris.kohya",
            [
                "preset=full",
                "rank_dropout=0",
                "module_dropout=0",
                "rank_dropout_scale=False",
                "train_norm=False",
                "algo=full",
            ],
        ),
    ],
)
def test_each_type_of_lora_is_a_module_with_arguments(kind: str, module: str, arguments: list[str]) -> None:
    settings = preset(LoRA_type=kind, conv_dim=4.0, conv_alpha=2, factor=8).settings
    assert settings["network_module"] == module
    assert settings.get("network_args", []) == arguments


def test_blocks_and_lora_plus_are_arguments_of_the_network() -> None:
    settings = preset(down_lr_weight="0,0, 1", rank_dropout=0.1, loraplus_unet_lr_ratio=16).settings
    assert settings["network_args"] == [
        "down_lr_weight=0,0,1",
        "rank_dropout=0.1",
        "loraplus_unet_lr_ratio=16",
    ]


def test_numbers_saved_as_texts_are_numbers_and_empty_ones_ask_for_nothing() -> None:
    settings = preset(
        learning_rate="0.0001",
        unet_lr="1e-4",
        seed="1234",
        clip_skip="2",
        max_train_epochs="",
        lr_warmup="0",
        epoch="3",
    ).settings
    assert settings["learning_rate"] == 0.0001 and settings["unet_lr"] == 1e-4
    assert settings["seed"] == 1234 and settings["clip_skip"] == 2
    assert settings["max_train_epochs"] == 3 and "lr_warmup_steps" not in settings


def test_a_decimal_comma_is_not_another_number() -> None:
    with pytest.raises(ConfigError, match=r"network_alpha = 4,0 .* has a comma"):
        preset(network_alpha="4,0")


def test_a_rate_of_zero_freezes_that_part() -> None:
    unet_only = preset(text_encoder_lr=0, unet_lr=1e-4).settings
    assert unet_only["network_train_unet_only"] is True and "text_encoder_lr" not in unet_only
    both = preset(text_encoder_lr=5e-5, unet_lr=1e-4).settings
    assert both["text_encoder_lr"] == [5e-5, 5e-5] and "network_train_unet_only" not in both
    text_only = preset(text_encoder_lr=5e-5, unet_lr=0).settings
    assert text_only["network_train_text_encoder_only"] is True


def test_only_the_chosen_noise_is_used() -> None:
    fields = {"noise_offset": 0.05, "multires_noise_iterations": 8, "multires_noise_discount": 0.2}
    original = preset(noise_offset_type="Original", **fields).settings
    assert original["noise_offset"] == 0.05 and "multires_noise_iterations" not in original
    multires = preset(noise_offset_type="Multires", **fields).settings
    assert multires["multires_noise_iterations"] == 8 and "noise_offset" not in multires


def test_the_length_is_steps_epochs_or_the_epoch_of_the_window() -> None:
    assert preset(max_train_steps=500, epoch=4).settings["max_train_steps"] == 500
    assert preset(max_train_epochs=6, max_train_steps=500).settings["max_train_epochs"] == 6
    with_dataset = preset(dataset_config="d.toml", epoch=4, max_train_steps=0)
    assert not {"max_train_epochs", "max_train_steps"} & set(with_dataset.settings)
    assert any("1600 steps" in note for note in with_dataset.notes)
    with pytest.raises(ConfigError, match="epoch = 0"):
        preset(epoch=0)


def test_zeros_that_kohya_ss_does_not_write_are_told() -> None:
    found = preset(max_grad_norm=0)
    assert "max_grad_norm" not in found.settings
    assert any(note.startswith("max_grad_norm = 0 → 1.0") for note in found.notes)


def test_arguments_in_kohya_ss_quoting_and_extra_arguments_are_read() -> None:
    settings = preset(
        optimizer_args='"d_coef=1.0" "betas=0.9, 0.99"',
        additional_parameters='--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=1000" "eta_min=0e-0"'
        " --max_grad_norm=0.5 --alpha_mask",
    ).settings
    assert settings["optimizer_args"] == ["d_coef=1.0", "betas=0.9,0.99"]
    assert settings["lr_scheduler_type"] == "CosineAnnealingLR"
    assert settings["lr_scheduler_args"] == ["T_max=1000", "eta_min=0e-0"]
    assert settings["max_grad_norm"] == 0.5 and settings["alpha_mask"] is True


def test_older_presets_are_read() -> None:
    old = preset(
        LoRA_type="LoCon", xformers=True, use_8bit_adam=True, lora_network_weights="a.safetensors"
    ).settings
    assert old["network_module"] == "lycoris.kohya" and old["xformers"] is True
    assert old["optimizer_type"] == "AdamW8bit" and old["network_weights"] == "a.safetensors"
    assert preset().settings["optimizer_type"] == "AdamW"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"LoRA_type": "Flux1", "flux1_checkbox": True}, "FLUX.1"),
        ({"LoRA_type": "Anima"}, "Anima"),
        ({"sd3_checkbox": True}, "Stable Diffusion 3"),
        ({"LoRA_type": "Lumina", "lumina_checkbox": True}, "Lumina Image 2.0"),
        ({"LoRA_type": "HunyuanImage-2.1"}, "HunyuanImage-2.1"),
    ],
)
def test_a_preset_of_another_architecture_is_named(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"a configuration for {name}") as error:
        preset(**fields)
    assert "SD1.5 and SDXL" in error.value.hint


def test_empty_fields_of_other_architectures_do_not_make_it_one() -> None:
    assert preset(
        ae="put the path here", t5xxl="x", clip_g="", flux1_checkbox=False, guidance_scale=3.5
    ).settings
