"""What ``hpo train`` is given: every form becomes settings with their sources, and goes back to sd-scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from tests.tiny_search import draw_images
from trainer import kohyaexport, settingsdoc, subsets
from trainer.blockrates import block_rates
from trainer.config import SETTINGS, TrainConfig
from trainer.dataset import assign_buckets, epoch_batches
from trainer.errors import ConfigError, DataError
from trainer.kohyakeys import KNOWN_KEYS, OURS_ALONE
from trainer.trainfile import TrainFile, kohya_settings, read_train_file

KOHYA = """
[general]
network_module = "networks.lora"
pretrained_model_name_or_path = "mini-sd15"
train_data_dir = "{data}"
output_dir = "out"
resolution = 32
learning_rate = 1e-4
network_dim = 4
network_args = ["down_lr_weight=0,0,0,0,0.5,0.5,0.5,0.5,1,1,1,1", "rank_dropout=0.1"]
max_train_epochs = 2
caption_extension = ".txt"
xformers = true
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images" / "2_zkw figure", count=5)
    return tmp_path / "images"


def read(folder: Path, text: str, *sets: str, **words: Any) -> TrainFile:
    path = folder / "file.toml"
    path.write_text(text, encoding="utf-8")
    return read_train_file(path, sets=sets, **words)


def test_a_file_of_sd_scripts_is_known_by_its_keys_and_ours_takes_our_defaults(
    tmp_path: Path, data: Path
) -> None:
    theirs = read(tmp_path, KOHYA.replace("{data}", str(data)))
    assert (theirs.defaults, theirs.output_dir) == ("sd-scripts' defaults", "out")
    assert theirs.config.network_alpha == 1.0 and theirs.config.rank_dropout == 0.1
    rates = block_rates(theirs.config, "sd15")
    assert (
        rates is not None
        and rates.down == (0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1)
        and rates.up == (1.0,) * 12
    )
    ours = read(tmp_path, "[network]\nnetwork_dim = 4\n[loss]\nloss_type = 'huber'\n")
    assert ours.config.network_alpha == TrainConfig().network_alpha and ours.config.loss_type == "huber"
    assert ours.origins == {"network_dim": "file", "loss_type": "file"}


def test_the_command_line_wins_over_the_dataset_file_and_that_over_the_file(
    tmp_path: Path, data: Path
) -> None:
    described = tmp_path / "dataset.toml"
    described.write_text(
        "[general]\nresolution = 64\nbatch_size = 3\n[[datasets]]\n[[datasets.subsets]]\n"
        f"image_dir = '{data}/2_zkw figure'\n"
    )
    text = "resolution = 32\ntrain_batch_size = 1\nmax_train_epochs = 5\n"
    file = read(tmp_path, text, "train_batch_size=2", "max_train_steps=7", dataset=described)
    assert (file.config.resolution, file.config.train_batch_size) == (64, 2)
    assert (file.origins["resolution"], file.origins["train_batch_size"]) == ("dataset file", "--set")
    assert file.config.max_train_epochs is None and "max_train_epochs = 5 → not used" in file.translated[-1]
    places = {"train_data_dir": str(data)}
    assert read(tmp_path, text, dataset=described, places=places).config.dataset_config == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat=1", "unknown setting learning_rat"),
        ("network_dim", "has no value"),
        ("network_dim=0", "outside its limits"),
        ("max_token_length=100", "max_token_length = 100"),
        ("network_type=LoCon", "conv_dim"),
        ("min_timestep=900 ", "min_timestep 900 is not below"),
        ("masked_loss=true", "masked_loss has no masks"),
    ],
)
def test_a_wrong_set_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, "max_timestep = 800", text)
    assert caught.value.hint


DATASET = """
[general]
caption_extension = "txt"
shuffle_caption = true
bucket_reso_steps = 32

[[datasets]]
resolution = 32
batch_size = 2

[[datasets.subsets]]
image_dir = "{data}/2_zkw figure"
num_repeats = 3
keep_tokens = 1
class_tokens = "zkw figure"

[[datasets.subsets]]
image_dir = "{reg}"
is_reg = true
class_tokens = "figure"
"""


@pytest.fixture
def described(tmp_path: Path, data: Path) -> Path:
    reg = draw_images(tmp_path / "reg", count=4, seed=9)
    for caption in reg.glob("*.txt"):
        caption.unlink()
    path = tmp_path / "dataset.toml"
    path.write_text(DATASET.replace("{data}", str(data)).replace("{reg}", str(reg)))
    return path


def test_a_dataset_file_is_trained_as_it_says(described: Path) -> None:
    file = read_train_file(described)
    assert (file.config.resolution, file.config.train_batch_size) == (32, 2)
    found = subsets.read_training_data(file.config)
    regular = [item for item in found.items if item.is_reg]
    assert [item.repeats for item in found.items if not item.is_reg] == [3] * 5
    assert sum(item.repeats for item in regular) == 15 and {i.caption for i in regular} == {"figure"}
    assert found.items[0].setting(file.config, "keep_tokens") == 1
    assert regular[0].setting(file.config, "shuffle_caption") is True
    assert (found.trigger, found.class_word) == ("zkw", "figure")
    batches = epoch_batches(found, assign_buckets(found.items, file.config), file.config, 0)
    assert sum(len(batch.items) for batch in batches) == 30
    text = described.read_text()
    described.write_text(text.replace("keep_tokens = 1", "keep_tokens = 2"))
    assert subsets.read_training_data(file.config).content_hash != found.content_hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_repeats", "num_repeat", "unknown setting num_repeat"),
        ("num_repeats = 3", "num_repeats = 0", "num_repeats = 0"),
        ("num_repeats = 3", "batch_size = 3", r"batch_size belongs to \[\[datasets\]\] 1"),
        ("num_repeats = 3", "color_aug = true", "color_aug = true"),
        ("resolution = 32", "resolution = [32, 64]", "only squares"),
        ("image_dir", "image_dirs", "unknown setting image_dirs"),
        ("[[datasets.subsets]]", "[[datasets]]\nresolution = 64\n[[datasets.subsets]]", "resolution of"),
    ],
)
def test_what_a_dataset_file_asks_in_vain_is_named(described: Path, old: str, new: str, message: str) -> None:
    text = described.read_text()
    place = text.rindex(old) if new.startswith("[[datasets]]\n") else text.index(old)
    described.write_text(text[:place] + new + text[place + len(old) :])
    with pytest.raises((ConfigError, DataError), match=message):
        read_train_file(described).require_all()


def test_a_lora_of_sd_scripts_tells_its_settings() -> None:
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "64",
        "ss_network_alpha": "32.0",
        "ss_network_args": '{"conv_dim": "8", "conv_alpha": "4"}',
        "ss_learning_rate": "0.0003",
        "ss_text_encoder_lr": "[5e-05]",
        "ss_unet_lr": "None",
        "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.999))",
        "ss_max_train_steps": "1200",
        "ss_num_epochs": "12",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "None",
        "ss_full_fp16": "False",
        "ss_v2": "False",
        "ss_datasets": json.dumps(
            [{"batch_size_per_device": 8, "resolution": [512, 512], "enable_bucket": True, "subsets": []}]
        ),
    }
    found = kohya_settings(metadata)
    assert set(found) <= KNOWN_KEYS
    from trainer.kohya import from_kohya

    file = from_kohya(Path("x.safetensors"), found).require_all()
    expected = {
        "network_dim": 64,
        "conv_dim": 8,
        "conv_alpha": 4.0,
        "text_encoder_lr": 5e-05,
        "optimizer_type": "AdamW8bit",
        "weight_decay": 0.1,
        "max_train_steps": 1200,
        "max_train_epochs": None,
        "train_batch_size": 8,
        "resolution": 512,
        "enable_bucket": True,
        "min_snr_gamma": 5.0,
    }
    assert {name: getattr(file.config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"network_type": "LoHa", "loss_type": "huber", "huber_c": 0.2, "flip_aug": True},
        {"conv_dim": 8, "conv_alpha": None, "max_train_epochs": None, "max_train_steps": 70},
        {
            "optimizer_type": "Adafactor",
            "caption_prefix": "photo of",
            "keep_tokens": 2,
            "shuffle_caption": True,
        },
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "down_lr_weight": "", "weight_decay": 0.0},
        {"down_lr_weight": "cosine+.25", "save_every_n_epochs": 2, "min_snr_gamma": 5, "alpha_mask": True},
        {
            "text_encoder_lr1": 5e-5,
            "text_encoder_lr2": 5e-5,
            "max_token_length": 225,
            "scale_weight_norms": 1,
        },
    ],
)
def test_what_is_exported_means_the_same_when_it_is_read_back(
    tmp_path: Path, data: Path, values: dict[str, Any]
) -> None:
    config = TrainConfig(train_data_dir=str(data), mixed_precision="bf16").with_values(values)
    found = kohyaexport.export(config, "sdxl", "sdxl", tmp_path)
    kohyaexport.write(found, tmp_path)
    assert set(found.config) <= KNOWN_KEYS - OURS_ALONE
    again = read_train_file(tmp_path / "config.toml", dataset=tmp_path / "dataset.toml").require_all().config
    moved = {"pretrained_model_name_or_path", "train_data_dir", "dataset_config", "conv_alpha"}
    moved |= {"text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2"}
    before = config.as_dict() | {name: getattr(again, name) for name in subsets.OWN_KEYS}
    assert {k: v for k, v in again.as_dict().items() if k not in moved} == {
        k: v for k, v in before.items() if k not in moved
    }
    assert again.effective_text_encoder_lrs == config.effective_text_encoder_lrs
    item = subsets.read_training_data(again).items[0]
    assert {name: item.setting(again, name) for name in subsets.OWN_KEYS} == {
        name: getattr(config, name) for name in subsets.OWN_KEYS
    }
    assert item.repeats == 2 and "sdxl_train_network.py" in found.command
    assert tomlkit.parse((tmp_path / "dataset.toml").read_text())["general"]["batch_size"] == 4  # type: ignore[index]


def test_two_text_encoder_rates_cannot_be_exported(tmp_path: Path, data: Path) -> None:
    config = TrainConfig(train_data_dir=str(data), text_encoder_lr1=1e-5, text_encoder_lr2=2e-5)
    with pytest.raises(ConfigError, match="one rate for both text encoders"):
        kohyaexport.export(config, "sdxl", "x", tmp_path)


@pytest.mark.parametrize(
    ("values", "family", "message"),
    [
        ({"mid_lr_weight": "0.5"}, "sdxl", "mid_lr_weight has 1 values"),
        ({"down_lr_weight": "1,x"}, "sd15", "'x' is no multiplier"),
        (
            {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"},
            "sd15",
            "all block rates are 0",
        ),
    ],
)
def test_block_rates_that_do_not_fit_the_base_are_refused(
    values: dict[str, str], family: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        block_rates(TrainConfig(**values), family)  # type: ignore[arg-type]


def test_the_settings_page_is_what_the_code_says() -> None:
    made = settingsdoc.page()
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == made, "python -m trainer.settingsdoc > docs/settings.md"
    assert all(f"`{name}`" in made for name in {*SETTINGS, *KNOWN_KEYS})
