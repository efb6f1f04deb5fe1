"""A preset of each front end, trained: stopped by Ctrl-C, resumed by the same command, and read back."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from hpo.cli.main import main
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import stop_after
from tests.tiny_search import draw_images

KOHYA_SS = {
    "LoRA_type": "LyCORIS/LoHa",
    "optimizer": "AdamW",
    "optimizer_args": "weight_decay=0.05 betas=0.9,0.95",
    "lr_scheduler": "cosine_with_restarts",
    "lr_scheduler_num_cycles": "2",
    "lr_warmup": 20,
    "learning_rate": 0.01,
    "unet_lr": 0.01,
    "text_encoder_lr": 0.005,
    "network_dim": 4,
    "network_alpha": 2,
    "conv_dim": 2,
    "conv_alpha": 1,
    "max_resolution": "64,64",
    "caption_extension": ".none-use-foldername",
    "train_batch_size": 2,
    "epoch": 2,
    "bucket_no_upscale": False,
    "min_bucket_reso": 64,
    "bucket_reso_steps": 32,
    "noise_offset": 0.05,
    "min_snr_gamma": 5,
    "mixed_precision": "no",
    "save_precision": "float",
    "output_name": "kai",
}
EASY = """
[[subsets]]
num_repeats = 2
keep_tokens = 1
caption_extension = ".txt"
shuffle_caption = true
image_dir = "images/2_zkw figure"
name = "kai"
[general_args.args]
pretrained_model_name_or_path = "base"
max_train_steps = 4
seed = 23
mixed_precision = "no"
[general_args.dataset_args]
resolution = 64
batch_size = 2
[network_args.args]
network_dim = 4
network_alpha = 4.0
[network_args.args.network_args]
algo = "lokr"
factor = 4
[optimizer_args.args]
optimizer_type = "Lion"
learning_rate = 1e-3
lr_scheduler = "cosine"
lr_scheduler_type = "LoraEasyCustomOptimizer.CosineAnnealingWarmRestarts.CosineAnnealingWarmRestarts"
lr_scheduler_num_cycles = 2
warmup_ratio = 0.1
max_grad_norm = 1.0
loss_type = "huber"
[optimizer_args.args.optimizer_args]
weight_decay = "0.1"
[optimizer_args.args.lr_scheduler_args]
gamma = "0.9"
min_lr = "1e-6"
[saving_args.args]
output_name = "kai"
save_precision = "float"
save_model_as = "safetensors"
[bucket_args.dataset_args]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
bucket_reso_steps = 32
"""
LORA_SCRIPTS = {
    "model_train_type": "sdxl-lora",
    "resolution": "75,67",
    "enable_bucket": False,
    "caption_extension": ".txt",
    "max_train_epochs": 2,
    "train_batch_size": 2,
    "learning_rate": "1e-4",
    "unet_lr": "1e-2",
    "text_encoder_lr": "1e-3",
    "network_train_unet_only": True,
    "lr_scheduler": "polynomial",
    "lr_scheduler_power": 0,
    "optimizer_type": "DAdaptAdam",
    "network_module": "lycoris.kohya",
    "lycoris_algo": "locon",
    "network_dim": 4,
    "network_alpha": 4,
    "conv_dim": 2,
    "conv_alpha": 1,
    "enable_preview": False,
    "multires_noise_iterations": 3,
    "multires_noise_discount": 0.3,
    "mixed_precision": "no",
    "save_precision": "float",
    "output_name": "kai",
    "ui_custom_params": "",
}
# file → (its text, the family of the base, what hpo inspect says, optimizer)
PRESETS: dict[str, tuple[str, str, str, str]] = {
    "kohya_ss.json": (json.dumps(KOHYA_SS), "sd15", "LoHa", "AdamW"),
    "easy.toml": (EASY, "sd15", "LoKr", "Lion"),
    "lora-scripts.json": (json.dumps(LORA_SCRIPTS), "sdxl", "LoCon", "DAdaptAdam"),
}
STEPS = 4  # two of each epoch; stopped in the second


def hpo_(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_trained_stopped_resumed_and_read_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, family, kind, optimizer = PRESETS[name]
    torch.set_num_threads(1)
    draw_images(tmp_path / "images" / "2_zkw figure", count=2)
    save_folder(tiny_base(family), tmp_path / "base")
    (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def train(output: str) -> Result:
        data = [] if name == "easy.toml" else ["--data", "images"]
        return hpo_("train", name, "--base", "base", *data, "--output", output)

    whole = train("whole")
    assert whole.exit_code == 0 and f"trained {STEPS} steps" in whole.output, whole.output
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGINT)
        stopped = train("stopped")
    assert stopped.exit_code == 130 and not Path("stopped/kai.safetensors").exists(), stopped.output
    again = train("stopped")
    assert again.exit_code == 0 and "resuming from step 3" in again.output, again.output
    one, other = (load_file(f"{folder}/kai.safetensors") for folder in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    facts = json.loads(hpo_("inspect", "stopped/kai.safetensors", "--json").stdout)
    assert facts["kind"] == kind and facts["settings"]["optimizer_type"] == optimizer, facts["kind"]
    assert not [text for text in facts["warnings"] if "zero" in text], facts["warnings"]
