"""The input of ``hpo train``: every format becomes settings with their sources, and can be exported to sd-scripts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tomlkit
import torch

from tests.places import ROOT
from tests.tiny_search import draw_images
from trainer.adapters.metadata import kohya_settings
from trainer.bases.blockrates import block_rates
from trainer.config import SETTINGS, TrainConfig
from trainer.data import OWN_KEYS, RUN_KEYS, read_training_data
from trainer.data.epoch import assign_buckets, epoch_batches
from trainer.errors import ConfigError, DataError
from trainer.kohya import export as kohyaexport
from trainer.kohya import settingsdoc
from trainer.kohya.keys import KNOWN_KEYS, OURS_ALONE
from trainer.kohya.trainfile import TrainFile, read_train_file
from trainer.loop.optimizers import make

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
    steps = read(tmp_path, "network_dim = 4\n", "max_train_steps=3")
    assert steps.config.max_train_epochs is None
    assert steps.origins == {"network_dim": "file", "max_train_steps": "--set"}


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
    assert file.config.max_train_epochs is None and "max_train_epochs = 5 → ignored" in file.translated[-1]
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
    found = read_training_data(file.config)
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
    assert read_training_data(file.config).content_hash != found.content_hash


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_repeats", "num_repeat", "unknown setting num_repeat"),
        ("num_repeats = 3", "num_repeats = -1", "num_repeats = -1"),
        ("num_repeats = 3", 'num_repeats = "3"', "is a text, not a whole number"),
        ("num_repeats = 3", "num_repeats = 2.5", "is not a whole number"),
        ("num_repeats = 3", "batch_size = 3", r"batch_size belongs to \[\[datasets\]\] 1"),
        ("num_repeats = 3", 'resize_interpolation = "hamming"', "resize_interpolation"),
        (
            "num_repeats = 3",
            "custom_attributes = {diff_output_preservation = true}",
            "diff_output_preservation",
        ),
        ("resolution = 32", "resolution = [32, 64, 32]", "is not a size"),
        ("resolution = 32", 'resolution = "32x64"', "is not a size"),
        ("image_dir", "image_dirs", "unknown setting image_dirs"),
        ("[[datasets.subsets]]", "[[datasets]]\nresolution = 64\n[[datasets.subsets]]", "has no batch_size"),
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
    from trainer.kohya.read import from_kohya

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
    found = kohyaexport.to_kohya(config, "sdxl", "sdxl", tmp_path)
    kohyaexport.write(found, tmp_path)
    assert set(found.config) <= KNOWN_KEYS - OURS_ALONE
    again = read_train_file(tmp_path / "config.toml", dataset=tmp_path / "dataset.toml").require_all().config
    moved = {"pretrained_model_name_or_path", "train_data_dir", "dataset_config", "conv_alpha"}
    moved |= {"text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2"}
    before = config.as_dict() | {name: getattr(again, name) for name in OWN_KEYS}
    assert {k: v for k, v in again.as_dict().items() if k not in moved} == {
        k: v for k, v in before.items() if k not in moved
    }
    assert again.effective_text_encoder_lrs == config.effective_text_encoder_lrs
    item = read_training_data(again).items[0]
    assert {name: item.setting(again, name) for name in OWN_KEYS} == {
        name: getattr(config, name) for name in OWN_KEYS
    }
    assert item.repeats == 2 and "sdxl_train_network.py" in found.command
    assert tomlkit.parse((tmp_path / "dataset.toml").read_text())["general"]["batch_size"] == 4  # type: ignore[index]


def whole_numbers(table: Any) -> Iterator[tuple[str, Any]]:
    """Every number of a table, however deep, under its key."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from whole_numbers(value)
        elif isinstance(value, list):
            yield from (pair for entry in value if isinstance(entry, dict) for pair in whole_numbers(entry))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


@pytest.mark.parametrize(("warmup", "kind"), [(100, int), (1, int), (0.05, float)])
def test_an_exported_number_has_the_type_that_sd_scripts_acts_on(
    tmp_path: Path, data: Path, warmup: float, kind: type
) -> None:
    """sd-scripts multiplies lr_warmup_steps by the total steps if it has a decimal point."""
    steps = {
        "save_every_n_steps": 50,
        "max_train_steps": 900,
        "max_timestep": 900,
        "clip_skip": 2,
        "keep_tokens": 1,
    }
    more = {"multires_noise_iterations": 6, "lr_scheduler_num_cycles": 3, "max_token_length": 150}
    config = TrainConfig(train_data_dir=str(data), lr_warmup_steps=warmup, **steps, **more)  # type: ignore[arg-type]
    kohyaexport.write(kohyaexport.to_kohya(config, "sd15", "sd15", tmp_path), tmp_path)
    table = tomllib.loads((tmp_path / "config.toml").read_text())
    assert type(table["lr_warmup_steps"]) is kind and table["lr_warmup_steps"] == warmup
    types = get_type_hints(TrainConfig)
    numbers = [*whole_numbers(table), *whole_numbers(tomllib.loads((tmp_path / "dataset.toml").read_text()))]
    assert {*steps, *more, "resolution", "num_repeats", "batch_size"} <= {name for name, _ in numbers}
    for name, value in numbers:
        setting = RUN_KEYS.get(name, name)
        wants_int = name == "num_repeats" or int in (types[setting], *get_args(types[setting]))
        assert name == "lr_warmup_steps" or type(value) is (int if wants_int else float), name


def test_what_sd_scripts_does_not_have_is_said(tmp_path: Path, data: Path) -> None:
    config = TrainConfig(
        train_data_dir=str(data), hold_out_references=True, text_encoder_frozen=True, micro_batch_size=1,
        bucket_reso_steps=32, validation_split=0.2,
    )  # fmt: skip
    found = kohyaexport.to_kohya(config, "sd15", "sd15", tmp_path)
    said = "\n".join(found.notes)
    for part in ("hold_out_references is left out", "micro_batch_size is left out", "bucket_reso_steps = 32",
                 "text_encoder_frozen → text_encoder_lr = 0", "validation_split needs"):  # fmt: skip
        assert part in said
    assert found.config["text_encoder_lr"] == 0.0 and found.dataset["general"]["validation_split"] == 0.2
    plain = kohyaexport.to_kohya(TrainConfig(train_data_dir=str(data)), "sdxl", "sdxl", tmp_path)
    assert not any("left out" in note or "bucket" in note for note in plain.notes)
    assert "validation_split" not in plain.dataset["general"]
    of_sdxl = kohyaexport.to_kohya(config, "sdxl", "sdxl", tmp_path).notes
    assert not any("bucket_reso_steps" in note for note in of_sdxl)


def test_prodigy_is_exported_as_it_runs_here(tmp_path: Path, data: Path) -> None:
    for warmup, schedule in ((0, "cosine"), (10, "cosine"), (10, "constant")):
        values = {"optimizer_type": "Prodigy", "learning_rate": 1.0, "lr_warmup_steps": warmup}
        config = TrainConfig(train_data_dir=str(data), lr_scheduler=schedule, **values)  # type: ignore[arg-type]
        found = kohyaexport.to_kohya(config, "sd15", "sd15", tmp_path)
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
        ours = make(groups, config).defaults["safeguard_warmup"]
        assert f"safeguard_warmup={ours}" in found.config["optimizer_args"]


def test_every_exported_path_is_found_from_another_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    relative = data.relative_to(tmp_path)
    (tmp_path / "set.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{relative}/2_zkw figure'\n"
    )
    values = {
        "sample_prompts": "p.txt",
        "sample_at_first": True,
        "logging_dir": "log",
        "network_weights": "w",
    }
    for source in ({"dataset_config": "set.toml"}, {"train_data_dir": str(relative)}):
        config = TrainConfig(**source, **values)  # type: ignore[arg-type]
        found = kohyaexport.to_kohya(config, "sd15", "base", Path("here"))
        names = (
            "pretrained_model_name_or_path",
            "output_dir",
            "sample_prompts",
            "logging_dir",
            "network_weights",
        )
        paths = [found.config[name] for name in names]
        paths += [subset["image_dir"] for subset in found.dataset["datasets"][0]["subsets"]]
        assert all(Path(path).is_absolute() for path in paths), paths
        assert f"--config_file {tmp_path}/here/config.toml" in found.command
    assert (
        kohyaexport.to_kohya(config, "sd15", "a/b", Path("here")).config["pretrained_model_name_or_path"]
        == "a/b"
    )


def test_a_file_of_sd_scripts_must_name_its_base_and_what_it_leaves_open_is_said(
    tmp_path: Path, data: Path
) -> None:
    text = KOHYA.replace("{data}", str(data)).replace("resolution = 32\n", "")
    nameless = "\n".join(line for line in text.splitlines() if not line.startswith("pretrained"))
    with pytest.raises(ConfigError, match=r"file\.toml does not name a base") as caught:
        read(tmp_path, nameless)
    assert "--base" in caught.value.hint
    places = {"pretrained_model_name_or_path": "mini-sd15"}
    said = read(tmp_path, nameless, places=places).translated
    assert "resolution (not in the file) → 512; sd-scripts has no default" in said
    assert "seed (not in the file) → 42; sd-scripts has no default" in said
    described = tmp_path / "dataset.toml"
    described.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{data}/2_zkw figure'\n"
    )
    file = read(tmp_path, text, "seed=1", dataset=described)
    assert file.config.resolution == 64 and not any("unset" in line for line in file.translated)


def test_samples_whose_prompts_are_not_here_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    saved = TrainConfig(sample_prompts="prompts.txt", sample_every_n_steps=3, network_dim=8).as_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    file = read_train_file(tmp_path / "run")
    assert (file.config.sample_prompts, file.config.sample_every_n_steps) == ("", None)
    assert file.config.network_dim == 8 and "the file prompts.txt does not exist" in file.without_effect[0]
    (tmp_path / "p.txt").write_text("a cat")
    kept = read_train_file(tmp_path / "run", sets=[f"sample_prompts={tmp_path}/p.txt"])
    assert kept.config.sample_every_n_steps == 3 and kept.without_effect == ()


def test_two_text_encoder_rates_cannot_be_exported(tmp_path: Path, data: Path) -> None:
    config = TrainConfig(train_data_dir=str(data), text_encoder_lr1=1e-5, text_encoder_lr2=2e-5)
    with pytest.raises(ConfigError, match="one rate for both text encoders"):
        kohyaexport.to_kohya(config, "sdxl", "x", tmp_path)


@pytest.mark.parametrize(
    ("values", "family", "message"),
    [
        ({"mid_lr_weight": "0.5"}, "sdxl", "mid_lr_weight has 1 values"),
        ({"down_lr_weight": "1,x"}, "sd15", "'x' is not a multiplier"),
        (
            {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"},
            "sd15",
            "all block multipliers are 0",
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
    page = ROOT / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == made, "python -m trainer.kohya.settingsdoc > docs/settings.md"
    assert all(f"`{name}`" in made for name in SETTINGS)
