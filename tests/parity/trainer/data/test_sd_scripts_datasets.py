"""Datasets as sd-scripts makes them: batches, buckets, captions of metadata files, random crops, colours.

The values in tests/data/sd_scripts_datasets.json were recorded by running sd-scripts 48d368f (February 2026): batches
and metadata by ``config_util.BlueprintGenerator`` and ``generate_dataset_group_by_blueprint`` on the folders that
``folders`` draws here (``buckets_indices`` of each dataset: its place, width, height and images of a batch), buckets by
``BucketManager.select_bucket`` over ``SIDES``, crops by 20,000 calls of ``trim_and_resize_if_required(True, …)`` of an
image whose pixels are their coordinates, colours by ``AugHelper.color_aug`` with fixed draws, captions by
``BaseDataset.process_caption``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
from PIL import Image

from trainer.config import TrainConfig
from trainer.data import Dataset, assign_buckets, epoch_batches, read_training_data, tag_frequency
from trainer.data.augment import Colour, drawn_colour, drawn_crop
from trainer.data.buckets import Bucket, BucketRules, Fit
from trainer.data.captions import CaptionRules, Moment
from trainer.data.dataset import Item
from trainer.data.subsets import read_dataset_file

RECORDED = json.loads((Path(__file__).parents[3] / "data" / "sd_scripts_datasets.json").read_text())
SIZES = {
    "a": [(512, 512), (640, 512), (512, 768), (768, 512), (900, 600)],
    "b": [(300, 700), (512, 512), (256, 256), (1024, 1024)],
}
SIDES = [(width, height) for width in range(65, 2200, 61) for height in range(70, 2200, 67)]
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 1024}
KOHYA = TrainConfig(
    enable_bucket=False, max_bucket_reso=1024, bucket_no_upscale=False, train_batch_size=1, resolution=512
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for folder, sizes in SIZES.items():
        (root / folder).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (number * 20, len(folder) * 100, ord(folder[0]))).save(
                root / folder / f"{number}.png"
            )
            (root / folder / f"{number}.txt").write_text(f"tag {number}, x")
    return root


def sub(folder: str, **values: Any) -> dict[str, Any]:
    return {"image_dir": folder, **values}


DATASETS: dict[str, dict[str, Any]] = {
    "agreeing": {
        "general": {"resolution": 512, "batch_size": 2, **BUCKETS},
        "datasets": [{"subsets": [sub("a", num_repeats=2)]}, {"subsets": [sub("b")]}],
    },
    "one dataset": {
        "general": {"resolution": 512, "batch_size": 2, **BUCKETS},
        "datasets": [{"subsets": [sub("a", num_repeats=2), sub("b")]}],
    },
    "two resolutions": {
        "general": BUCKETS,
        "datasets": [
            {"resolution": 512, "batch_size": 3, "subsets": [sub("a")]},
            {"resolution": 768, "batch_size": 1, "subsets": [sub("a"), sub("b")]},
        ],
    },
    "not square": {
        "datasets": [{"resolution": [512, 768], "batch_size": 3, **BUCKETS, "subsets": [sub("a"), sub("b")]}]
    },
    "not square, own sizes": {
        "general": {"bucket_no_upscale": True},
        "datasets": [{"resolution": [512, 768], "batch_size": 3, **BUCKETS, "subsets": [sub("a"), sub("b")]}],
    },
    "not square, no buckets": {
        "datasets": [{"resolution": [512, 768], "batch_size": 3, "subsets": [sub("a"), sub("b")]}]
    },
    "a folder twice": {
        "general": {"resolution": 512, "batch_size": 2, **BUCKETS},
        "datasets": [
            {"subsets": [sub("a", num_repeats=2), sub("a", num_repeats=5), sub("b", num_repeats=0)]}
        ],
    },
    "dataset_repeats": {
        "general": {"resolution": 512, "batch_size": 2, **BUCKETS},
        "datasets": [{"subsets": [sub("a"), sub("b", num_repeats=2)]}],
    },
    "regularisation": {
        "general": BUCKETS,
        "datasets": [
            {"resolution": 512, "batch_size": 2, "subsets": [sub("a", num_repeats=2), sub("b", is_reg=True)]},
            {"resolution": 256, "batch_size": 4, "subsets": [sub("b")]},
        ],
    },
}


def read(
    root: Path, table: dict[str, Any], config: TrainConfig, ending: str = ".toml"
) -> tuple[Dataset, TrainConfig]:
    """The dataset of a file with these tables, whose paths are relative to ``root``."""
    table = json.loads(json.dumps(table))
    for dataset in table["datasets"]:
        for subset in dataset["subsets"]:
            for name in {"image_dir", "metadata_file"} & set(subset):
                subset[name] = str(root / subset[name])
    file = root / f"d{ending}"
    file.write_text(json.dumps(table) if ending == ".json" else tomlkit.dumps(table))
    config = config.with_values({**read_dataset_file(file).settings, "dataset_config": str(file)})
    return read_training_data(config), config


def batches(data: Dataset, config: TrainConfig, epoch: int = 0) -> list[list[int]]:
    found = epoch_batches(data, assign_buckets(data.items, config), config, epoch)
    rows = [
        (data.items[b.items[0]].dataset, b.bucket.width_px, b.bucket.height_px, len(b.items)) for b in found
    ]
    return sorted(map(list, rows))


@pytest.mark.parametrize("ending", [".toml", ".json"])
@pytest.mark.parametrize("name", DATASETS)
def test_batches_of_an_epoch_are_those_of_sd_scripts(folders: Path, name: str, ending: str) -> None:
    config = KOHYA.with_values({"dataset_repeats": 3 if name == "dataset_repeats" else 1})
    data, config = read(folders, DATASETS[name], config, ending)
    assert batches(data, config) == batches(data, config, 7) == RECORDED["batches"][name]
    if name == "a folder twice":
        assert [note for note in data.notes if "sd-scripts uses only the first" in note]
        assert [note for note in data.notes if "num_repeats = 0" in note]


def test_batches_of_several_datasets_are_shuffled_together(folders: Path) -> None:
    data, config = read(folders, DATASETS["agreeing"], KOHYA)
    found = epoch_batches(data, assign_buckets(data.items, config), config, 0)
    order = [data.items[batch.items[0]].dataset for batch in found]
    assert order not in (sorted(order), sorted(order, reverse=True))
    assert all(len({data.items[n].dataset for n in batch.items}) == 1 for batch in found)


@pytest.mark.parametrize("case", RECORDED["buckets"])
def test_buckets_of_a_resolution_that_is_no_square(case: str) -> None:
    sides, no_upscale = case.split()
    width, height = map(int, sides.split("x"))
    config = TrainConfig(
        resolution=width,
        resolution_height=height,
        max_bucket_reso=1536,
        bucket_no_upscale=no_upscale == "True",
    )
    rules = BucketRules.of(config)
    rows = []
    for size in SIDES:
        if fit := rules.fit(*size):
            bucket = (fit.bucket.width_px, fit.bucket.height_px)
            # where an image is not enlarged to fill its bucket exactly, sd-scripts may stay a pixel below it
            rows.append([*size, *bucket, fit.resized_width_px, fit.resized_height_px])
    count, digest, row = RECORDED["buckets"][case]
    assert rows[700] == row and len(rows) == count
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", ["plain", "wildcard", "semicolon"])
def test_captions_of_a_metadata_file(folders: Path, name: str) -> None:
    entries = {
        "0.png": {"caption": "a man", "tags": "hat, sea"},
        "1.png": {"tags": "one, two"},
        "2.png": {"caption": "only words", "tags": ""},
        "3.png": {"caption": "first\nsecond", "tags": "x, y"},
        str(folders / "b" / "3.png"): {"caption": "elsewhere"},
    }
    file = "meta.jsonl" if name == "semicolon" else "meta.json"
    lines = [json.dumps({"image_path": key, **entry}) for key, entry in entries.items()]
    (folders / file).write_text("\n".join(lines) if name == "semicolon" else json.dumps(entries))
    extra: dict[str, Any] = {
        "plain": {},
        "wildcard": {"enable_wildcard": True},
        "semicolon": {"caption_separator": ";"},
    }[name]
    subset = {"metadata_file": file, "image_dir": "a", "num_repeats": 2, **extra}
    table = {"datasets": [{"resolution": 512, "batch_size": 2, **BUCKETS, "subsets": [subset]}]}
    data, config = read(folders, table, KOHYA)
    found = {str(item.path.relative_to(folders)): item.caption for item in data.items}
    expected = dict(RECORDED["metadata"][name])
    if (
        name == "wildcard"
    ):  # sd-scripts loses the tags of an empty caption, and adds a separator before no tags
        assert (expected["a/1.png"], expected["a/2.png"]) == ("", "only words,")
        expected |= {"a/1.png": "one, two", "a/2.png": "only words"}
    assert found == expected
    assert tag_frequency(data) == RECORDED["metadata"][f"{name} tags"]
    assert len(batches(data, config)) == RECORDED["metadata"][f"{name} len"]
    if name == "plain":
        by_key, _ = (
            KOHYA.with_values({"in_json": str(folders / file), "train_data_dir": str(folders / "a")}),
            None,
        )
        assert {item.caption for item in read_training_data(by_key).items} == set(found.values())


def test_random_crops_are_everywhere_alike() -> None:
    item = Item(Path("x"), "", 1, 164, 100, "0", own=(("random_crop", True),))
    fit, draw = Fit(Bucket(128, 64), 164, 100), random.Random(0)
    crops = np.array([drawn_crop(item, KOHYA, fit, draw).crop_top_left for _ in range(20_000)])
    for place, name in enumerate(("top", "left")):
        low, high, mean, spread = RECORDED["random_crop"][name]
        assert (crops[:, place].min(), crops[:, place].max()) == (low, high)
        assert abs(crops[:, place].mean() - mean) < 0.4 and abs(crops[:, place].std() - spread) < 0.2


PIXELS = np.array([[
    [200, 30, 40], [10, 220, 90], [30, 60, 250], [128, 128, 128], [255, 255, 255], [0, 0, 0], [250, 240, 10],
    [90, 200, 210], [180, 60, 170], [3, 2, 1], [120, 100, 110], [255, 0, 0],
]], dtype=np.uint8)  # fmt: skip


@pytest.mark.parametrize("case", RECORDED["colour"])
def test_colours_are_changed_as_by_opencv(case: str) -> None:
    """Exactly, for gamma. Hue within OpenCV's rounding of it to 2° (both signs are equally likely; sd-scripts turns RGB
    as BGR, the other way) and of saturation."""
    kind, amount = case.split()
    colour = Colour(gamma=float(amount)) if kind == "gamma" else Colour(hue_degrees=-2 * float(amount))
    off = colour.apply(PIXELS).astype(int)[0] - np.array(RECORDED["colour"][case])
    # one step of OpenCV's hue is 1/30 of the way between two corners of the colour circle
    spread = PIXELS[0].max(axis=1).astype(int) - PIXELS[0].min(axis=1)
    assert (np.abs(off) <= (0 if kind == "gamma" else spread[:, None] / 30 * 1.5 + 1)).all(), off


def test_a_third_of_the_images_change_half_of_them_in_hue() -> None:
    item, draw = Item(Path("x"), "", 1, 8, 8, "0", own=(("color_aug", True),)), random.Random(1)
    drawn = [drawn_colour(item, KOHYA, draw) for _ in range(20_000)]
    kinds = Counter("hue" if c.hue_degrees else "gamma" if c.gamma != 1 else "same" for c in drawn)
    whole = sum(RECORDED["colour share"].values())
    for kind, count in RECORDED["colour share"].items():
        assert abs(kinds[kind] / 20_000 - count / whole) < 0.03, kind
    assert max(abs(c.hue_degrees) for c in drawn) <= 16 and {
        c.gamma for c in drawn if 0.95 <= c.gamma <= 1.05
    }
    assert drawn_colour(replace(item, own=()), KOHYA, draw) == Colour()


@pytest.mark.parametrize("row", RECORDED["captions"])
def test_captions_with_a_comma_are_those_of_sd_scripts(row: tuple[int, dict[str, Any], str]) -> None:
    step, values, expected = row
    rules = CaptionRules.of(TrainConfig(**values))
    text = rules.apply("zed man, red hat,at sea , smiling", 1, random.Random(0), Moment(step, 100))
    assert text == expected
