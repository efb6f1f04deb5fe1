"""``--set``: the same words mean the same, and are refused alike, in every command that takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.cli.dataset import DatasetRequest
from hpo.cli.plan import PlanRequest, read_settings
from hpo.study.config import build_study
from tests.tiny_search import STUDY
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.kohya.trainfile import read_train_file
from trainer.overrides import read_override, read_setting


def searched(folder: Path, *sets: str) -> TrainConfig:
    return build_study("t", copy.deepcopy(STUDY), sets=sets).train


def trained(folder: Path, *sets: str) -> TrainConfig:
    file = folder / "file.toml"
    file.write_text('pretrained_model_name_or_path = "mini-sd15"\ncaption_suffix = "old"\n', encoding="utf-8")
    return read_train_file(file, sets=sets).config


def planned(folder: Path, *sets: str) -> TrainConfig:
    return read_settings(PlanRequest(base="mini-sd15", sets=sets))


def checked(folder: Path, *sets: str) -> TrainConfig:
    return DatasetRequest(folder, "mini-sd15", sets=sets).config


COMMANDS = pytest.mark.parametrize("command", [searched, trained, planned, checked])
Command = Callable[..., TrainConfig]


@COMMANDS
@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("conv_dim=none", "conv_dim", None),
        ("conv_dim=None", "conv_dim", None),
        ("conv_dim=", "conv_dim", None),
        ("conv_dim = 4", "conv_dim", 4),
        ("conv_dim=4.0", "conv_dim", 4),
        ("noise_offset=5e-2", "noise_offset", 0.05),
        ("flip_aug=true", "flip_aug", True),
        ("caption_suffix=none", "caption_suffix", ""),
        ("caption_suffix=", "caption_suffix", ""),
        ("caption_suffix=a b", "caption_suffix", "a b"),
        ('caption_suffix="none"', "caption_suffix", "none"),
        ('caption_suffix="a = b"', "caption_suffix", "a = b"),
        ("caption_suffix='1'", "caption_suffix", "1"),
        ("caption_suffix=1\n2", "caption_suffix", "1\n2"),
        ("caption_suffix=1\nseed = 2", "caption_suffix", "1\nseed = 2"),
        ("min_snr_gamma=0", "min_snr_gamma", None),
        ("min_snr_gamma=none", "min_snr_gamma", None),
        ("min_snr_gamma=5", "min_snr_gamma", 5.0),
        ("lr_scheduler=constant", "lr_scheduler", "constant"),
    ],
)
def test_the_same_words_mean_the_same_in_every_command(
    tmp_path: Path, command: Command, text: str, name: str, value: Any
) -> None:
    found = getattr(command(tmp_path, text), name)
    assert (found, type(found)) == (value, type(value))


@COMMANDS
@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("conv_dim", "--set 'conv_dim' has no value", "--set network_dim=16"),
        ("=4", "--set '=4' has no value", "--set network_dim=16"),
        ("conv_dims=4", "unknown setting conv_dims", "did you mean conv_dim?"),
        ("conv_dim=four", "conv_dim = 'four' is not a number", "rank of 3×3 convolutions"),
        ("conv_dim=4.5", "conv_dim = 4.5 is not a whole number", "rank of 3×3 convolutions"),
        ("conv_dim=-1", "conv_dim = -1 is outside its limits", "from 0 to 1000000"),
        ("flip_aug=True", 'flip_aug = "True" is a text, not true or false', "in lower case: flip_aug = true"),
        ("network_dim=none", "network_dim must have a value", "it is rank of the LoRA"),
        ("loss_type=l3", "loss_type = l3 is not known", "choose one of l2, l1"),
        ("noise_offset=" + "9" * 400, "--set noise_offset has a whole number beyond", "64 bits"),
        ("noise_offset=" + "9" * 5000, "is not a valid value", "write a shorter value"),
        ("noise_offset=" + "[" * 5000, "is not a valid value", "write a shorter value"),
    ],
)
def test_the_same_words_are_refused_alike_in_every_command(
    tmp_path: Path, command: Command, text: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        command(tmp_path, text)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_key_with_a_dot_is_a_section_where_there_are_any(tmp_path: Path) -> None:
    sets = ["sampling.steps=3", "study.clip=mini-clip", "train.caption_suffix=none", "prompts.seeds=[4, 5]"]
    study = build_study("t", copy.deepcopy(STUDY), sets=sets)
    assert (study.sampling.steps, study.study.clip, study.prompts.seeds) == (3, "mini-clip", (4, 5))
    for command in (trained, planned, checked):
        with pytest.raises(
            ConfigError, match=r"--set sampling\.steps: this command has no sections"
        ) as caught:
            command(tmp_path, "sampling.steps=3")
        assert "hpo search" in caught.value.hint


def test_none_leaves_a_key_of_a_section_at_its_default() -> None:
    table = {**copy.deepcopy(STUDY), "sampling": {"steps": 3, "width_px": 64}}
    study = build_study("t", table, sets=["sampling.steps=none", "sampling.width_px=none", "study.clip=none"])
    assert study == build_study(
        "t", {**copy.deepcopy(STUDY), "sampling": {}, "study": {**STUDY["study"], "clip": ""}}
    )
    with pytest.raises(ConfigError, match="unknown key stepps"):
        build_study("t", table, sets=["sampling.stepps=none"])
    again = build_study("t", study.sections)
    assert again == study, "study.json holds what it was built from"


def test_lists_and_tables_are_values_too() -> None:
    assert read_override('lr_scheduler=["cosine", "constant"]') == ("lr_scheduler", ["cosine", "constant"])
    assert read_override("learning_rate={low=1e-4,high=1}") == ("learning_rate", {"low": 1e-4, "high": 1})
    assert read_setting("network_dim = 8") == ("network_dim", 8)
