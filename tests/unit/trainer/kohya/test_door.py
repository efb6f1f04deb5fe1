"""The door: sd-scripts' files as sd-scripts reads them, the command line wins, and everything is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.findings import Findings
from trainer.kohya.keys import KNOWN_KEYS, REFUSED, SWITCHES
from trainer.kohya.trainfile import TrainFile, read_train_file

OK = """
pretrained_model_name_or_path = "sd15"
network_module = "networks.lora"
caption_extension = ".txt"
max_train_epochs = 1
"""


def read(folder: Path, text: str, *sets: str, **words: Any) -> TrainFile:
    path = folder / "file.toml"
    path.write_text(OK + text, encoding="utf-8")
    return read_train_file(path, sets=sets, **words)


def test_unknown_keys_are_listed_with_what_they_meant_and_have_no_effect(tmp_path: Path) -> None:
    text = "conv_dim = 8\nsdxl = true\nmin_snr_gama = 5\nfoo_bar = 2\n[optimizer_args]\ndecouple = true\n"
    file = read(tmp_path, text)
    assert file.config == read(tmp_path, "").config and file.refused == ()
    said = dict(line.split(" = ", 1) for line in file.unknown)
    assert set(said) == {"conv_dim", "sdxl", "min_snr_gama", "foo_bar", "decouple"}
    assert "network_args" in said["conv_dim"] and "base" in said["sdxl"]
    assert "did you mean min_snr_gamma" in said["min_snr_gama"]
    assert 'optimizer_args = ["decouple=true"]' in said["decouple"]
    with pytest.raises(ConfigError, match=r"conv_dim.*foo_bar") as caught:
        file.require_known()
    assert "--strict" in caught.value.hint


def test_of_two_values_the_later_one_is_used_and_said_unless_they_are_equal(tmp_path: Path) -> None:
    same = read(tmp_path, "[a]\nresolution = 512\n[b]\nresolution = 512\n")
    assert not any("later" in line for line in same.translated) and same.config.resolution == 512
    file = read(tmp_path, "resolution = 768\n[a]\nresolution = 512\n[b]\nresolution = 640\n")
    assert file.config.resolution == 640
    said = [line for line in file.translated if "later value" in line]
    assert len(said) == 2 and "640 in [b]" in said[1] and "512 in [a]" in said[1]


@pytest.mark.parametrize(
    ("line", "mended"),
    [
        ("network_dim = 100000000", "network_dim=16"),
        ("train_batch_size = 0", "train_batch_size=1"),
        ("min_snr_gamma = -1", "min_snr_gamma=5"),
        ("clip_skip = 13", "clip_skip=2"),
        ("max_token_length = 100", "max_token_length=75"),
        ('mixed_precision = "fp8"', "mixed_precision=bf16"),
        ('lr_scheduler = "foo"', "lr_scheduler=cosine"),
        ('optimizer_type = "FooAdam"', "optimizer_type=AdamW"),
        ('resolution = "wide"', "resolution=512"),
        ("lr_warmup_steps = -1", "lr_warmup_steps=100"),
        ("v2 = true", "v2=none"),
        ('dataset_class = "x.Y"', "dataset_class=none"),
        ("unheard_of = 1", "unheard_of=none"),
        ('network_args = ["rank_dropout=7"]', "network_args=none"),
        ('network_args = ["rank_dropout=7"]', "rank_dropout=0.1"),
    ],
)
def test_set_mends_a_file_that_is_wrong_by_itself(tmp_path: Path, line: str, mended: str) -> None:
    file = read(tmp_path, line, mended).require_all().require_known()
    name, _, value = mended.partition("=")
    if value != "none":
        assert str(getattr(file.config, name)) in (value, f"{value}.0")
        assert file.origins[name] == "--set"


def test_what_is_told_comes_at_once_and_names_the_remedies(tmp_path: Path) -> None:
    text = 'network_dim = 0\nclip_skip = 13\nmixed_precision = "fp8"\nv2 = true\noutput_dir = "C:/loras"\n'
    with pytest.raises(ConfigError, match="5 mistakes") as caught:
        read(tmp_path, text)
    for part in ("network_dim = 0", "clip_skip = 13", "fp8", "v2", "/mnt/c/loras"):
        assert part in caught.value.message
    findings = Findings()
    with findings.looking():
        read(tmp_path, text)
    assert len(findings.errors) == 4, "refused settings are told beside them"


NUMBERS = (
    "save_every_n_epochs",
    "sample_every_n_steps",
    "min_snr_gamma",
    "scale_weight_norms",
    "v_pred_like_loss",
)
TEXTS = (
    "reg_data_dir",
    "sample_prompts",
    "logging_dir",
    "network_weights",
    "dataset_config",
    "vae",
    "resume",
)


def nothing() -> list[str]:
    lines = [f"{name} = false" for name in (*NUMBERS, *TEXTS, *sorted(REFUSED))]
    lines += [f"{name} = 0" for name in sorted(SWITCHES & KNOWN_KEYS)]
    lines += ['color_aug = "false"', "face_crop_aug_range = 0", "loraplus_lr_ratio = 0", 'vae = ""']
    lines += ["initial_epoch = 0", "stop_text_encoder_training = 0", "resume = []"]
    return lines


@pytest.mark.parametrize("line", nothing())
def test_a_value_that_asks_for_nothing_is_as_good_as_absent(tmp_path: Path, line: str) -> None:
    file = read(tmp_path, line).require_all().require_known()
    assert file.config.as_dict() == read(tmp_path, "").config.as_dict()


def test_a_switch_can_be_0_or_1_and_quoted(tmp_path: Path) -> None:
    file = read(tmp_path, 'shuffle_caption = 1\nenable_bucket = "true"\n')
    assert file.config.shuffle_caption is True and file.config.enable_bucket is True
    assert any("without quotes" in line for line in file.translated)
    with pytest.raises(ConfigError, match="shuffle_caption"):
        read(tmp_path, "shuffle_caption = 2\n")


def test_paths_are_what_they_look_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = read(tmp_path, 'output_dir = " out/here"\ntrain_data_dir = "~/ds "\nlogging_dir = " logs"\n')
    assert file.output_dir == "out/here"
    assert (file.config.train_data_dir, file.config.logging_dir) == (f"{tmp_path}/ds", "logs")
    with pytest.raises(ConfigError, match="train_data_dir = C:"):
        read(tmp_path, "", "train_data_dir=C:/x")
    assert read(tmp_path, 'output_dir = "$HOME/x"\n', "output_dir=z").output_dir == "z"
