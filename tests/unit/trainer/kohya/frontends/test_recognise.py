"""Each file is recognised by its form: read, or named with what to use instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.places import ROOT
from trainer.datasetforms import dataset_of
from trainer.errors import ConfigError
from trainer.kohya.frontends import Found, kohya_ss, recognise


def read(name: str, text: str | bytes) -> Found:
    return recognise(Path(name), text.encode() if isinstance(text, str) else text)


def test_toml_of_sd_scripts_is_handed_on_as_it_is() -> None:
    found = read(
        "a.toml", '\ufeff[network]\r\nnetwork_module = "networks.lora"\r\n[train]\r\nlearning_rate = 1e-4\r\n'
    )
    assert found.settings == {
        "network": {"network_module": "networks.lora"},
        "train": {"learning_rate": 1e-4},
    }
    assert found.dataset is None and not found.is_translated


def test_a_dataset_beside_settings_is_parted_from_them() -> None:
    found = read(
        "a.toml",
        'network_module = "networks.lora"\n[general]\nkeep_tokens = 1\n'
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n',
    )
    assert found.settings == {"network_module": "networks.lora"}
    assert found.dataset == {"general": {"keep_tokens": 1}, "datasets": [{"subsets": [{"image_dir": "a"}]}]}


def test_datasets_and_settings_in_json_are_read() -> None:
    dataset = {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", "num_repeats": 2}]}]}
    found = read("d.json", json.dumps(dataset))
    assert found.form == "a dataset file of sd-scripts (JSON)"
    assert found.dataset == dataset and not found.settings
    settings = {"network_module": "networks.lora", "seed": 1, "vae": None}
    assert read("s.json", json.dumps(settings)).settings == {"network_module": "networks.lora", "seed": 1}


EASY = """
[[subsets]]
num_repeats = 10
keep_tokens = 0
caption_extension = ".txt"
shuffle_caption = true
flip_aug = false
image_dir = "images/10_kai"
name = "kai"

[train_mode]
train_mode = "lora"
[noise_args]
[general_args.args]
pretrained_model_name_or_path = "base.safetensors"
sdxl = true
seed = 23
max_train_epochs = 2
[general_args.dataset_args]
resolution = [1024, 1024]
batch_size = 2
[network_args.args]
network_dim = 8
network_alpha = 4.0
[network_args.args.network_args]
algo = "locon"
conv_dim = 4
preset = ""
down_lr_weight = [1, 0.5]
[optimizer_args.args]
optimizer_type = "Came"
lr_scheduler_type = "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts"
lr_scheduler_num_cycles = 1
warmup_ratio = 0.05
[optimizer_args.args.lr_scheduler_args]
min_lr = 1e-6
d = 0.9
[optimizer_args.args.optimizer_args]
weight_decay = "0.1"
decouple = "true"
[saving_args.args]
easy_name = "kai"
output_dir = "out/${replace}"
output_name = "${replace}_v1"
save_toml = true
[bucket_args.dataset_args]
enable_bucket = true
min_bucket_reso = 256
"""


def test_a_configuration_of_lora_easy_training_scripts() -> None:
    found = read("e.toml", EASY)
    assert found.form == "a configuration of LoRA_Easy_Training_Scripts" and found.is_translated
    settings = dict(found.settings)
    assert settings["network_module"] == "lycoris.kohya"
    assert settings["network_args"] == ["algo=locon", "conv_dim=4", "down_lr_weight=1,0.5"]
    assert settings["optimizer_args"] == ["weight_decay=0.1", "decouple=True"]
    assert settings["optimizer_type"] == "LoraEasyCustomOptimizer.came.CAME"
    assert settings["lr_scheduler_args"] == ["min_lr=1e-06", "d=0.9"]
    assert settings["lr_warmup_steps"] == 0.05
    assert settings["output_dir"] == "out/kai" and settings["output_name"] == "kai_v1"
    assert not {"sdxl", "easy_name", "save_toml", "warmup_ratio"} & set(settings)
    assert found.dataset is not None
    assert found.dataset["general"] == {
        "resolution": [1024, 1024],
        "batch_size": 2,
        "enable_bucket": True,
        "min_bucket_reso": 256,
    }
    (subset,) = found.dataset["datasets"][0]["subsets"]
    assert subset == {
        "num_repeats": 10,
        "caption_extension": ".txt",
        "shuffle_caption": True,
        "image_dir": "images/10_kai",
    }


def test_the_network_of_lora_easy_training_scripts_follows_from_its_arguments() -> None:
    def module(args: str) -> object:
        return read("e.toml", f"[network_args.args]\nnetwork_dim = 4\n{args}\n").settings["network_module"]

    assert module("") == "networks.lora"
    assert module("fa = true") == "networks.lora_fa"
    assert module("[network_args.args.network_args]\nunit = 4") == "networks.dylora"


def test_a_dataset_is_found_in_every_form() -> None:
    import tomllib

    easy = dataset_of(tomllib.loads(EASY))
    assert easy is not None and easy["datasets"][0]["subsets"][0]["image_dir"] == "images/10_kai"
    assert dataset_of({"network_dim": 4}) is None


def test_fields_of_lora_scripts_window_are_arguments() -> None:
    found = read(
        "l.toml",
        'model_train_type = "sdxl-lora"\nnetwork_module = "lycoris.kohya"\nlycoris_algo = "lokr"\nconv_dim = 4\n'
        'conv_alpha = 1\ndropout = 0\nlokr_factor = 8\nlearning_rate = "1e-4"\nnoise_offset = 0\n'
        "enable_preview = true\n"
        'positive_prompts = "1girl"\nnegative_prompts = "blurry"\noptimizer_type = "Prodigy"\nprodigy_d_coef = "2.0"\n'
        'optimizer_args_custom = ["betas=0.9,0.99"]\n',
    )
    assert found.form == "a configuration of lora-scripts"
    settings = found.settings
    assert settings["network_args"] == ["conv_dim=4", "conv_alpha=1", "dropout=0", "algo=lokr", "factor=8"]
    assert settings["optimizer_args"] == [
        "decouple=True",
        "weight_decay=0.01",
        "use_bias_correction=True",
        "d_coef=2.0",
        "betas=0.9,0.99",
    ]
    assert settings["learning_rate"] == 1e-4
    assert settings["sample_prompts"] == "1girl --n blurry --w 512 --h 512 --l 7 --s 24 --d 2333"
    assert not {"noise_offset", "model_train_type", "conv_dim", "lycoris_algo"} & set(settings)


def test_samples_of_lora_scripts_are_drawn_only_if_switched_on() -> None:
    text = 'network_module = "networks.lora"\nenable_preview = false\nsample_sampler = "euler_a"\n'
    assert dict(read("l.toml", text).settings) == {"network_module": "networks.lora"}


SHELL = r"""#!/bin/bash
BASE="/models/base.safetensors"   # the base
NAME=kai
# python train_network.py --old
accelerate launch --num_cpu_threads_per_process=8 ./sd-scripts/sdxl_train_network.py \
  --pretrained_model_name_or_path="$BASE" --output_name=007 \
  --network_module=networks.lora --network_args "conv_dim=4" "conv_alpha=1" \
  --learning_rate 1e-4 --text_encoder_lr 1e-5 2e-5 --cache_latents --resolution=512,512 \
  --optimizer_args weight_decay=0.1 --train_data_dir "$NAME/images" && echo done
"""


def test_the_flags_of_a_command_line_are_settings() -> None:
    found = read("train.sh", SHELL)
    assert found.form == "a command line of sd-scripts" and found.is_translated
    assert dict(found.settings) == {
        "pretrained_model_name_or_path": "/models/base.safetensors",
        "output_name": "007",
        "network_module": "networks.lora",
        "network_args": ["conv_dim=4", "conv_alpha=1"],
        "learning_rate": 1e-4,
        "text_encoder_lr": [1e-5, 2e-5],
        "cache_latents": True,
        "resolution": "512,512",
        "optimizer_args": ["weight_decay=0.1"],
        "train_data_dir": "kai/images",
    }


def test_variables_for_one_command_are_no_part_of_it() -> None:
    command = "CUDA_VISIBLE_DEVICES=0 PYTHONPATH=. accelerate launch train_network.py --network_dim=8"
    assert read("t.sh", f"#!/bin/bash\n{command}\n").settings == {"network_dim": 8}
    assert read("t.sh", f"env {command}").settings == {"network_dim": 8}
    assert read("t.sh", f"LR=1 # a note\n{command} --unet_lr=$LR").settings == {
        "network_dim": 8,
        "unet_lr": 1,
    }


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    found = read("t.sh", "accelerate launch train_network.py --output_dir 2024 --logging_dir=7 --seed 7")
    assert found.settings == {"output_dir": "2024", "logging_dir": "7", "seed": 7}


def test_windows_command_lines_are_read() -> None:
    bat = (
        "set BASE=C:\\models\\a.safetensors\naccelerate launch train_network.py ^\n --network_dim=8 ^\n"
        ' --vae "C:\\v.pt" --pretrained_model_name_or_path="%BASE%"\n'
    )
    settings = read("t.bat", bat).settings
    assert (
        settings["vae"] == "C:\\v.pt"
        and settings["pretrained_model_name_or_path"] == "C:\\models\\a.safetensors"
    )
    shell = "$dim = 8\naccelerate launch train_network.py `\n --network_dim=$dim `\n --cache_latents\n"
    assert read("t.ps1", shell).settings == {"network_dim": 8, "cache_latents": True}


@pytest.mark.parametrize(
    ("name", "text", "what", "hint"),
    [
        ("a.sh", "python train_network.py --config_file=my.toml", "--config_file my.toml", "hpo train my.toml"),
        ("a.sh", "accelerate launch train_network.py --lr=1 ${ext[@]}", "collects its settings in ext", "TOML"),
        ("a.sh", "accelerate launch train_network.py --output_dir=$1", "value of \\$1 is not in it", "TOML"),
        ("a.sh", "python train_network.py --a\npython train_network.py --b", "2 training commands", "one of them"),
        ("a.sh", "accelerate launch flux_train_network.py --a", "a command for FLUX.1", "SD1.5 and SDXL"),
        ("a.sh", "accelerate launch train_db.py --a", "trains no LoRA", "train_network.py"),
        ("a.sh", "echo hello", "without a command of sd-scripts", "TOML"),
        ("a.yaml", "job: extension\nconfig:\n  name: x\n", "a job of ai-toolkit", "TOML"),
        ("a.yaml", "compute_environment: LOCAL_MACHINE\n", "a configuration of accelerate", "TOML"),
        ("a.toml", "learning_rate: 1e-4\nnetwork_dim: 8\n", "is YAML", "key = value"),
        ("a.json", '{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}', "OneTrainer", "TOML"),
        ("a.json", '{"--model_family": "sdxl", "--lora_rank": 4, "--seed": 1}', "SimpleTuner", "TOML"),
        ("a.json", '{"model_family": "sdxl"}', "SimpleTuner", "TOML"),
        ("a.json", '{"nodes": [], "links": []}', "ComfyUI", "training file"),
        ("a.json", '{"1": {"class_type": "KSampler", "inputs": {}}}', "ComfyUI", "training file"),
        ("a.json", '{"compute_environment": "LOCAL_MACHINE"}', "accelerate", "TOML"),
        ("a.json", '{"num_vectors_per_token": 1, "learning_rate": 1}', "textual inversion", "LoRA preset"),
        ("a.json", '{"learning_rate_te1": 1, "no_token_padding": false}', "DreamBooth", "LoRA preset"),
        ("a.json", '{"image_folder": "", "create_buckets": true}', "fine-tuning", "LoRA preset"),
        ("a.json", '{"peft_type": "LORA", "r": 4}', "PEFT", "safetensors"),
        ("a.json", '{"_class_name": "UNet2DConditionModel"}', "diffusers", "--base"),
        ("a.json", '{"ss_network_module": "networks.lora"}', "metadata of a LoRA", "safetensors"),
        ("a.json", '{"a/1.png": {"caption": "x"}, "a/2.png": {"caption": "y"}}', "captions in one JSON", "in_json"),
        ("a.json", '[{"prompt": "a"}]', "sample prompts", "sample_prompts"),
        ("a.json", '{"values": {}, "train": {}}', "params.json", "folder of the trial"),
        ("a.json", '{"a": 1, "b": 2, "c": 3}', "without a setting of sd-scripts", "docs/settings.md"),
        ("a.ipynb", '{"cells": [], "nbformat": 4}', "a notebook", "training_config.toml"),
        ("a.toml", 'network_module = "networks.lora_flux"', "FLUX.1 \\(network_module", "flux_train_network.py"),
        ("a.toml", 'network_module = "networks.lora_anima"\nqwen3 = "q"', "Anima", "anima_train_network.py"),
        ("a.toml", '[model]\nclip_g = "g"\nclip_l = "l"\nt5xxl = "t"', "Stable Diffusion 3", "sd3_train_network.py"),
        ("a.toml", "[general_args.args]\nseed = 1\n[flux_args.args]\nguidance_scale = 3.5", "FLUX.1", "flux_train"),
        ("a.toml", "[general_args.args]\nseed = 1\n[anima_args.args]\nqwen3 = 'q'", "Anima", "anima_train"),
        ("a.toml", "[study]\nname = 'a'\n[space]\nseed = [1]", "a study file", "hpo search"),
        ("a.toml", 'dit = "d"\nnetwork_module = "networks.lora"', "musubi-tuner", "musubi"),
        ("a.toml", 'model_train_type = "flux-lora"\nnetwork_module = "networks.lora_flux"', "FLUX.1", "flux_train"),
        ("a.toml", 'model_train_type = "sd-dreambooth"\nlearning_rate = 1', "lora-scripts for sd-dreambooth", "LoRAs"),
        ("a.toml", '[metadata]\nname = "x"\n[data]\nresolution = "768,768"', "template of lora-scripts", "saves"),
        ("a.toml", '[train_mode]\ntrain_mode = "ti"\n[general_args.args]\nseed = 1', "textual inversion", "LoRA"),
        ("a.toml", '[prompt]\nsteps = 1\n[[prompt.subset]]\nprompt = "a"', "sample prompts", "sample_prompts"),
        ("a.toml", "[[datasets]]\nimage_directory = 'a'", "dataset file of musubi-tuner", "image_dir"),
        ("a.toml", "enable_conv = true\nunet_target_module = ['A']", "a LyCORIS preset", "preset="),
        ("a.toml", "<!DOCTYPE html>\n<html>", "a web page", "download"),
        ("a.toml", "version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer", "git lfs pull"),
        ("a.toml", " \n", "is empty", "training file"),
        ("a.csv", "name,prompt,negative_prompt\n", "CSV", "training file"),
        ("a.py", "print(1)", "Python program", "training file"),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_named(name: str, text: str, what: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        read(name, text)
    assert hint in error.value.hint
    assert error.value.message.startswith(name)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "a picture \\(PNG\\)"),
        (b"\xff\xd8\xff\xe0\0\0", "a picture \\(JPEG\\)"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a picture \\(WebP\\)"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"a": {}}' + b" " * 60, "safetensors\\) under another name"),
        ("learning_rate = 1".encode("utf-16"), "UTF-16 text"),
        (b"PK\x03\x04\0\0", "a ZIP archive"),
        (b"SQLite format 3\0", "a database"),
        (b"a = 1\0", "no text"),
        (b"a = '\xff'", "not UTF-8 text \\(byte 5\\)"),
        (b"a = 1\n" * 200_000, "larger than 1 MB"),
    ],
)
def test_bytes_that_are_no_text_are_named(content: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read("a.toml", content)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (r'train_data_dir = "C:\Users\me\images"', "single quotes"),
        (r'train_data_dir = "D:\new\10_kai"', "single quotes"),
        ("cache_latents = True", "true in small letters"),
        ("seed = None", "remove the line"),
        ('output_name = "kai', "a quote is missing"),
        ("output_name = kai", "texts in quotes"),
        ("network_dim: 8", "YAML"),
        ("--network_dim 8", "key = value"),
        ("max_train_steps = 1,600", "without a comma"),
        ("resolution = 512,512", "without a comma"),
        ("seed =", "write a value"),
        ("output_name = “kai”", "straight quotes"),
        ("seed = 1\nseed = 2", "keep one"),
    ],
)
def test_a_line_that_is_not_toml_is_shown_with_what_to_write(line: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        read("a.toml", f'network_module = "networks.lora"\n{line}\nclip_skip = 2\n')
    assert hint in error.value.hint, error.value
    assert "line" in error.value.message or "path" in error.value.message


def test_a_windows_path_that_is_valid_toml_by_chance_is_no_surprise() -> None:
    with pytest.raises(ConfigError, match="output_dir") as error:
        read("a.toml", 'network_module = "networks.lora"\noutput_dir = "C:\\new\\tests"\n')
    assert "C:\\new\\tests" in error.value.message and "single quotes" in error.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"LoRA_type": "Standard",\n "output_dir": "C:\\loras"}', "two backslashes"),
        ('{"LoRA_type": "Standard",\n}', "remove the comma"),
        ('{"LoRA_type": "Standard",\n // a note\n "epoch": 1}', "no comments"),
        ('{"LoRA_type": "Standard",\n "sdxl": True}', "small letters"),
    ],
)
def test_a_line_that_is_not_json_is_shown_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"line [23] is not valid JSON") as error:
        read("p.json", text)
    assert hint in error.value.hint, error.value


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        recognise(tmp_path / "nothing.toml")


def test_recognising_a_file_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trainer.kohya.frontends; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


FIELDS = sorted({*kohya_ss.WINDOW, *kohya_ss._SAME, "sdxl", "additional_parameters", "lr_warmup_steps"})
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
FEW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@FEW
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(VALUES, max_size=2), max_size=8))
def test_any_preset_is_read_or_refused_in_two_lines(fields: dict[str, object]) -> None:
    try:
        found = read("p.json", json.dumps({"LoRA_type": "Standard", **fields}))
    except ConfigError as error:
        assert error.message and error.hint
    else:
        assert found.settings["network_module"]


@FEW
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_content_is_read_or_named(content: bytes) -> None:
    for name in ("a.toml", "a.json", "a.sh", "a.bat", "a.yaml"):
        try:
            read(name, content)
        except ConfigError as error:
            assert error.message.startswith(name) or error.message.startswith(("the training", "line"))


RECORDED: list[dict[str, dict[str, Any]]] = json.loads(
    (ROOT / "tests" / "data" / "lora_scripts_fields.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["fields"]["optimizer_type"])
def test_fields_of_lora_scripts_give_what_its_window_saves(case: dict[str, dict[str, Any]]) -> None:
    """``saved`` is recorded with parseParams of lora-gui-dist 6dcccc0 (lora-scripts fdefba9), run by node:
    tests.bench.write_presets --record-fields."""
    settings = dict(read("l.json", json.dumps(case["fields"])).settings)
    assert settings == dict(read("l.toml", tomlkit.dumps(case["saved"])).settings)
    window = ("model_train_type", "randomly_choice_prompt", "sample_prompts")
    kept = {name: value for name, value in case["saved"].items() if name not in window}
    prompt = (
        "positive_prompts",
        "negative_prompts",
        *(f"sample_{n}" for n in ("width", "height", "cfg", "seed", "steps")),
    )
    samples = settings.pop("sample_prompts", "")
    assert settings == {name: value for name, value in kept.items() if name not in prompt}
    if "positive_prompts" in kept:  # one prompt, as get_sample_prompts of mikazuki/app/api.py writes it
        assert samples == "zed, sitting --n blurry --w 512 --h 640 --l 7 --s 20 --d 3"
