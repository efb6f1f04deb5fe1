"""What other programs and other systems leave: litter that is no image, and captions under another spelling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hpo.cli.main import main
from hpo.study.scoring import reference_paths
from trainer.config import TrainConfig
from trainer.data import Dataset, Wish, build, read_dataset, read_training_data, survey
from trainer.data.litter import is_litter
from trainer.errors import DataError

LITTER = (
    "@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/loose.png", "._0.png", ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png", "lost+found/0.png", ".stversions/0.png",
    ".caltrash/0.png", "~$0.png", "0.thumb.jpg", "SYNOPHOTO_THUMB_S.jpg",
)  # fmt: skip
OTHERS = ("Thumbs.db", "desktop.ini", ".DS_Store", "0.npz", "9.png.part", "8.png.crdownload")


def draw(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with captions, and litter."""
    place = tmp_path / "ds" / "4_zed man"
    for number in range(6):
        draw(place / f"{number}.png", number).with_suffix(".txt").write_text(f"zed man {number}")
    for number, name in enumerate(LITTER):
        draw(place / name, 100 + number)
    for name in OTHERS:
        (place / name).write_bytes(b"x")
    return place


def names(data: Dataset) -> list[str]:
    return [item.path.name for item in data.items]


SIX = [f"{number}.png" for number in range(6)]


def test_litter_is_no_training_image_in_any_command_and_is_named_once(folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(resolution=64, min_bucket_reso=64)
    for place in (folder, folder.parent):
        data = read_dataset(place, config)
        assert names(data) == SIX
        (note,) = [note for note in data.notes if "other programs" in note]
        assert "@eaDir" in note
        assert len(data.notes) == 1, data.notes
        assert [photo.path.name for photo in survey(place, config).photos] == SIX
    file = tmp_path / "d.toml"
    file.write_text(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder}"\n')
    by_file = read_training_data(config.with_values({"dataset_config": str(file)}))
    assert names(by_file) == SIX and sum("other programs" in note for note in by_file.notes) == 1
    regular = read_dataset(folder, config.with_values({"reg_data_dir": str(folder.parent)}))
    assert names(regular) == SIX * 2

    for source in (folder, folder.parent):
        built = build(source, tmp_path / f"out of {source.name}", Wish("zed", "man"))
        assert built.images == 6
        assert sum("other programs" in note for note in built.notes) == 1
    assert len(reference_paths(folder, Dataset(folder, ()))) == 6


def test_the_check_names_litter_once(folder: Path) -> None:
    result = CliRunner().invoke(
        main,
        ["dataset", "check", str(folder.parent), "--for", "mini-sd15", "--set", "resolution=64", "--json"],
    )
    said = [row["what"] for row in json.loads(result.stdout)["findings"]]
    assert sum("other programs" in what for what in said) == 1
    assert not any("repeats in front" in what for what in said)


def test_litter_inside_held_out_is_no_reference(folder: Path) -> None:
    draw(folder.parent / "held_out" / "h.png", 50)
    draw(folder.parent / "held_out" / "._h.png", 51)
    assert [i.path.name for i in read_dataset(folder.parent, TrainConfig(resolution=64)).held_out] == [
        "h.png"
    ]


@pytest.mark.parametrize(
    "name", ["0.png", "a (Conflicted copy 2026).png", "a.sync-conflict-20260101.png", "thumb.png", "~a.png",
             "10_zed man", "my thumbs.jpg", "recycle", "a.b.png"],
)  # fmt: skip
def test_what_the_user_made_is_no_litter(name: str) -> None:
    assert not is_litter(name)


CAPTIONS = {
    "CAPS.PNG": "CAPS.TXT",
    "a.PNG": "a.Txt",
    "full.png": "full.png.txt",
    "Name.png": "name.txt",
    "b.webp": "b.WEBP.TXT",
}


@pytest.fixture
def spelled(tmp_path: Path) -> Path:
    place = tmp_path / "ds" / "1_zed man"
    for number, (image, caption) in enumerate(CAPTIONS.items()):
        draw(place / f"{number}.png", number).rename(place / image)
        (place / caption).write_text(f"own words of {image}")
    return place


def test_captions_are_found_whatever_the_case_of_their_ending(spelled: Path, tmp_path: Path) -> None:
    config = TrainConfig(resolution=64, min_bucket_reso=64)
    expected = {image: f"own words of {image}" for image in CAPTIONS}
    assert {item.path.name: item.caption for item in read_dataset(spelled.parent, config).items} == expected
    seen = survey(spelled.parent, config)
    assert {photo.path.name: photo.caption for photo in seen.photos} == expected
    assert not seen.orphans and not seen.uncaptioned
    built = build(spelled, tmp_path / "out", Wish("zed", "man"))
    written = {path.name: path.read_text() for path in built.folder.iterdir() if path.suffix == ".txt"}
    assert sorted(written.values()) == sorted(expected.values())
    assert not any("without a caption" in note for note in built.notes)


def test_a_caption_of_another_image_is_not_taken(tmp_path: Path) -> None:
    draw(tmp_path / "A.png", 0)
    draw(tmp_path / "a.png", 1).with_suffix(".txt").write_text("the small one")
    with pytest.raises(DataError, match=r"1 images have no caption.*A\.png"):
        read_dataset(tmp_path, TrainConfig(resolution=64))


def test_images_that_share_one_caption_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0)
    draw(tmp_path / "a.jpg", 1).with_suffix(".txt").write_text("one text")
    (note,) = read_dataset(tmp_path, TrainConfig(resolution=64)).notes
    assert "2 images share a caption" in note and "a.jpg" in note and "a.png" in note


def test_a_blank_first_line_is_said_because_sd_scripts_takes_it(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf\r\nzed man\r\n")
    data = read_dataset(tmp_path, TrainConfig(resolution=64))
    assert data.items[0].caption == "zed man" and "begin with a blank line" in data.notes[0]


def test_two_captions_of_one_image_are_named_and_the_setting_decides(tmp_path: Path) -> None:
    image = draw(tmp_path / "a.png", 0)
    image.with_suffix(".txt").write_text("from txt")
    image.with_suffix(".CAPTION").write_text("from caption")
    for extension, other in ((".txt", ".caption"), (".caption", ".txt")):
        data = read_dataset(tmp_path, TrainConfig(resolution=64, caption_extension=extension))
        assert data.items[0].caption == f"from {extension[1:]}"
        assert [note for note in data.notes if f"1 images have a {other} file too" in note] == list(
            data.notes
        )
