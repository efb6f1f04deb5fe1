"""Several [[datasets]], metadata files and JSON: what a run makes of them, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tomlkit
from PIL import Image

from tests.tiny import tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.config import TrainConfig
from trainer.data import (
    Dataset,
    assign_buckets,
    cache,
    differences,
    epoch_batches,
    read_training_data,
    split_references,
)
from trainer.data.steps import batches_per_epoch
from trainer.data.subsets import read_dataset_file, sides
from trainer.errors import ConfigError, ToolError
from trainer.events import Step
from trainer.kohya.export import to_kohya
from trainer.kohya.trainfile import read_train_file
from trainer.loop import Conduct
from trainer.loop.loop import train

PLAIN = TrainConfig(resolution=64, min_bucket_reso=64)


def draw(folder: Path, count: int = 3, seed: int = 0, side: int = 96) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(seed + number).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zed {number}")
    return folder


def described(tmp_path: Path, text: str) -> tuple[Dataset, TrainConfig]:
    file = tmp_path / "d.toml"
    file.write_text(text.replace("ROOT", str(tmp_path)))
    used = tiny_config().with_values({**read_dataset_file(file).settings, "dataset_config": str(file)})
    return read_training_data(used), used


TWO = """
[general]
enable_bucket = false
[[datasets]]
resolution = 64
batch_size = 3
[[datasets.subsets]]
image_dir = "ROOT/a"
keep_tokens = 1
[[datasets]]
resolution = [96, 64]
batch_size = 1
[[datasets.subsets]]
image_dir = "ROOT/a"
"""


def test_one_folder_is_trained_at_two_resolutions(tmp_path: Path) -> None:
    draw(tmp_path / "a")
    data, config = described(tmp_path, TWO)
    assert (config.size_px, config.train_batch_size) == ((96, 64), 3), (
        "the largest, which memory is planned for"
    )
    assert len(data.items) == 6 and len({item.key for item in data.items}) == 6
    base = tiny_base("sd15")
    prepared = cache.prepare(base, data, config, tmp_path / "cache")
    shapes = sorted({tuple(latent.shape) for latent in prepared.latents.values()})
    assert shapes == [(4, 8, 8), (4, 8, 12)] and len(prepared.latents) == 6
    adapter = inject(base, config)
    events = [
        e for e in train(config, base, adapter, prepared, Conduct(rehearse=True)) if isinstance(e, Step)
    ]
    adapter.remove()
    assert len(events) == 2 * 4, "two epochs of one batch of three and three of one"
    assert cache.prepare(base, data, config, tmp_path / "cache").encoded_images == 0


def test_one_folder_can_have_other_captions_in_another_dataset(tmp_path: Path) -> None:
    draw(tmp_path / "a")
    for number in range(3):
        (tmp_path / "a" / f"{number}.caption").write_text(f"in words {number}")
    words = TWO.replace("keep_tokens = 1", 'caption_extension = ".caption"')
    data, _ = described(tmp_path, words)
    assert [item.caption for item in data.items] == [
        *(f"in words {number}" for number in range(3)),
        *(f"zed {number}" for number in range(3)),
    ]


def test_several_datasets_and_random_crops_are_exported_as_they_were_read(tmp_path: Path) -> None:
    draw(tmp_path / "a")
    data, config = described(tmp_path, TWO.replace("keep_tokens = 1", "keep_tokens = 1\nrandom_crop = true"))
    assert config.random_crop, "memory is planned with the VAE"
    assert [item.setting(config, "random_crop") for item in data.items] == [True] * 3 + [False] * 3
    found = to_kohya(config, "sd15", "sd15", tmp_path / "out")
    assert "cache_latents" not in found.config and found.config["cache_latents_to_disk"] is False
    first, second = found.dataset["datasets"]
    assert (first["resolution"], first["batch_size"]) == (64, 3)
    assert (second["resolution"], second["batch_size"]) == ([96, 64], 1)
    file = tmp_path / "again.toml"
    file.write_text(tomlkit.dumps(dict(found.dataset)))
    again = config.with_values({**read_dataset_file(file).settings, "dataset_config": str(file)})
    items = read_training_data(again).items
    assert assign_buckets(items, again) == assign_buckets(data.items, config)
    assert [i.setting(again, "random_crop") for i in items] == [True] * 3 + [False] * 3
    assert [i.setting(again, "train_batch_size") for i in items] == [3] * 3 + [1] * 3


def test_references_of_several_datasets_are_each_one_image(tmp_path: Path) -> None:
    draw(tmp_path / "a", count=10)
    data, _ = described(tmp_path, TWO)
    training, references = split_references(data)
    assert len(references.items) == 2 and len(training.items) == 16


def test_one_dataset_is_as_before_and_the_content_tells_datasets_apart(tmp_path: Path) -> None:
    """Nothing of a file with one dataset is new, so that runs begun before go on."""
    draw(tmp_path / "a")
    draw(tmp_path / "b", seed=9)
    head = "[general]\nresolution = 64\nbatch_size = 2\n[[datasets]]\n"
    subset = '[[datasets.subsets]]\nimage_dir = "ROOT/{}"\n'
    one, config = described(tmp_path, head + subset.format("a") + subset.format("b"))
    two, _ = described(tmp_path, head + subset.format("a") + "[[datasets]]\n" + subset.format("b"))
    assert {item.dataset for item in one.items} == {0} and not any(item.own for item in one.items)
    assert [item.key for item in one.items] == [item.sha256 for item in one.items]
    assert one.content_hash != two.content_hash
    assert len(epoch_batches(one, assign_buckets(one.items, config), config, 0)) == 3
    assert len(epoch_batches(two, assign_buckets(two.items, config), config, 0)) == 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (512, {"resolution": 512}),
        (512.0, {"resolution": 512}),
        ("512", {"resolution": 512}),
        ("512,768", {"resolution": 512, "resolution_height": 768}),
        (" [512, 768] ", {"resolution": 512, "resolution_height": 768}),
        ([768, 512], {"resolution": 768, "resolution_height": 512}),
        ("640,640", {"resolution": 640}),
    ],
)
def test_every_spelling_of_a_resolution(value: object, expected: dict[str, int]) -> None:
    assert sides(value) == expected
    config = TrainConfig().with_values(sides(value))
    assert config.with_values({"resolution": 256}).size_px == (256, 256), "a new side is a square"


@pytest.mark.parametrize("value", ["512x768", "a", [], [1, 2, 3], True, [512, "b"], 8, None])
def test_what_is_no_resolution_is_an_error(value: object) -> None:
    with pytest.raises(ConfigError, match="resolution"):
        sides(value)


def test_a_resolution_in_a_kohya_file_and_a_new_one_by_set(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "2_zed man")
    file = tmp_path / "k.toml"
    file.write_text(
        'pretrained_model_name_or_path = "mini-sd15"\nnetwork_module = "networks.lora"\nresolution = "64,128"\n'
        f'caption_extension = ".txt"\ntrain_data_dir = "{tmp_path / "a"}"\nmin_bucket_reso = 64\n'
    )
    read = read_train_file(file)
    assert read.config.size_px == (64, 128) and any("64 × 128" in line for line in read.translated)
    data = read_training_data(read.config)
    assert {str(b) for b in assign_buckets(data.items, read.config).values()} == {"64×128"}
    assert read_train_file(file, sets=["resolution=96"]).config.size_px == (96, 96)


def test_paths_of_a_dataset_file_are_what_the_user_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in (f" {tmp_path / 'a'} ", "~/a"):
        data, _ = described(tmp_path, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{written}"\n')
        assert len(data.items) == 3
    with pytest.raises(ConfigError, match="Windows path"):
        described(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'C:\\sets\\a'\n")


def test_a_json_file_is_a_dataset_file_too(tmp_path: Path) -> None:
    folder = str(draw(tmp_path / "a"))
    file = tmp_path / "d.json"
    table = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": folder, "num_repeats": 2.0}]}]}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(table).encode())
    data = read_training_data(PLAIN.with_values({"dataset_config": str(file)}))
    assert [item.repeats for item in data.items] == [2, 2, 2]
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a table"):
        read_dataset_file(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_dataset_file(file)


META: list[tuple[object, str]] = [
    ([], "not a metadata file"),
    ({"0.png": "words"}, "not a table"),
    ({"0.png": {"caption": 7}}, r"caption of 0\.png in .* is not a text"),
    ({"0.png": {}}, "1 images of .* have neither caption nor tags"),
    ({"nowhere.png": {"caption": "x"}, "1": {"caption": "y"}}, "1 images of .* are not there"),
    ({}, "names no images"),
]


@pytest.mark.parametrize(("content", "message"), META)
def test_a_metadata_file_that_cannot_be_meant_is_an_error(
    tmp_path: Path, content: object, message: str
) -> None:
    file = draw(tmp_path / "a").parent / "meta.json"
    file.write_text(json.dumps(content))
    config = PLAIN.with_values({"in_json": str(file), "train_data_dir": str(tmp_path / "a")})
    with pytest.raises(ToolError, match=message) as caught:
        read_training_data(config)
    assert caught.value.hint


def test_in_json_finds_older_names_without_an_ending(tmp_path: Path) -> None:
    file = draw(tmp_path / "a").parent / "meta.json"
    file.write_text(json.dumps({"0": {"caption": "c", "tags": "t"}, "2.png": {"tags": "u"}}))
    config = PLAIN.with_values(
        {"in_json": str(file), "train_data_dir": str(tmp_path / "a"), "dataset_repeats": 4}
    )
    data = read_training_data(config)
    assert [(i.path.name, i.caption, i.repeats) for i in data.items] == [
        ("0.png", "c,t", 4),
        ("2.png", "u", 4),
    ]
    with pytest.raises(ToolError, match="relative paths"):
        read_training_data(config.with_values({"train_data_dir": ""}))


def test_what_differs_from_sd_scripts_is_said_where_it_applies(tmp_path: Path) -> None:
    folder = draw(tmp_path / "a", count=5)
    plain = read_training_data(PLAIN.with_values({"train_data_dir": str(folder)}))
    assert differences(PLAIN, plain) == ()
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[..., 3] = np.arange(96, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    turned = Image.fromarray(pixels[..., :3] + 7)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "1.png", exif=exif)
    Image.fromarray((np.arange(96 * 96).reshape(96, 96) * 7).astype(np.uint16)).save(folder / "2.png")
    Image.fromarray(np.full((96, 96, 4), 255, np.uint8)).save(
        folder / "3.png"
    )  # an alpha channel, all opaque
    config = PLAIN.with_values({"train_data_dir": str(folder), "gradient_accumulation_steps": 2})
    data = read_training_data(config)
    lines = differences(config, data)
    for part in (
        "one image is partly transparent",
        "one image is stored on",
        "one image is 16-bit",
        "last batch",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 5 - (batches_per_epoch(config, data) % 2 == 0)
    more = config.with_values(
        {
            "caption_prefix": "x", "unet_lr": 1e-4, "text_encoder_lr": 0.0, "shuffle_caption": True,
            "random_crop": True, "caption_separator": ";", "multires_noise_iterations": 6,
            "gradient_accumulation_steps": 1,
        }
    )  # fmt: skip
    lines = differences(more, data)
    for part in ("caption_prefix", "caption_separator", "multires noise", "random_crop"):
        assert sum(part in line for line in lines) == 1, (part, lines)


@pytest.mark.parametrize(
    ("batch", "groups", "expected"),
    [
        (2, 2, ("a bucket's last batch has fewer images", "last optimizer step has 1 of 2 batches")),
        (1, 5, ()),
        (5, 1, ()),
        (1, 3, ("last optimizer step has 2 of 3 batches: it is the mean",)),
        (4, 2, ("a bucket's last batch has fewer images",)),
    ],
)
def test_how_images_weigh_in_accumulation_is_said(
    tmp_path: Path, batch: int, groups: int, expected: tuple[str, ...]
) -> None:
    config = PLAIN.with_values(
        {
            "train_data_dir": str(draw(tmp_path / "a", count=5)),
            "train_batch_size": batch,
            "gradient_accumulation_steps": groups,
        }
    )
    data = read_training_data(config)
    assert batches_per_epoch(config, data) == -(-5 // batch)
    lines = differences(config, data)
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True)), lines


def test_random_strengths_that_are_drawn_for_each_image_are_said(tmp_path: Path) -> None:
    values = {
        "train_data_dir": str(draw(tmp_path / "a")), "noise_offset": 0.1, "noise_offset_random_strength": True,
        "ip_noise_gamma_random_strength": True,
    }  # fmt: skip
    config = PLAIN.with_values(values)
    (line,) = differences(config, read_training_data(config))
    assert line.startswith("random strength of noise_offset: drawn for each image")
    both = config.with_values({"ip_noise_gamma": 0.1})
    (line,) = differences(both, read_training_data(both))
    assert line.startswith("random strength of noise_offset and ip_noise_gamma: ")
