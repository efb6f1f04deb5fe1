"""hpo dataset prepare: kohya's layout out of any folder; the source is only read, and it is all or nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpo.cli.main import main
from tests.unit.trainer.data.test_dataset import add
from trainer.config import TrainConfig
from trainer.data.dataset import read_dataset

CONFIG = TrainConfig(resolution=64, bucket_reso_steps=8, min_bucket_reso=32)


def prepare(*words: str) -> Result:
    return CliRunner().invoke(main, ["dataset", "prepare", *words], catch_exceptions=False)


def contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Every file's bytes, mode and time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def layout(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    add(place, "a.png", "luca smiles")
    add(place, "b.jpg", None)
    (place / "b.caption").write_text("luca outside")
    add(place / "trip", "c.webp", "luca on a hill")
    return place


def test_the_layout_is_what_training_reads_and_the_source_stays_as_it_is(
    source: Path, tmp_path: Path
) -> None:
    before = contents(source)
    out = tmp_path / "out"
    result = prepare(str(source), str(out), "--repeats", "7", "--trigger", "luca", "--class", "girl")
    assert result.exit_code == 0, result.output
    assert contents(source) == before
    place = "7_luca girl"
    names = [f"{place}/{name}" for name in ("a.png", "a.txt", "b.jpg", "b.txt", "c.txt", "c.webp")]
    assert layout(out) == [*names, "manifest.json"]
    data = read_dataset(out, CONFIG)
    assert (data.trigger, data.class_word) == ("luca", "girl") and not data.notes
    assert [(i.path.name, i.repeats, i.caption) for i in data.items] == [
        ("a.png", 7, "luca smiles"), ("b.jpg", 7, "luca outside"), ("c.webp", 7, "luca on a hill"),
    ]  # fmt: skip
    assert (out / place / "a.png").read_bytes() == (source / "a.png").read_bytes()
    assert result.stdout.splitlines()[-1].startswith("next: hpo dataset check ")


def test_editing_a_copy_does_not_change_the_source(source: Path, tmp_path: Path) -> None:
    prepare(str(source), str(tmp_path / "out"), "--trigger", "luca")
    copy = tmp_path / "out" / "10_luca" / "a.png"
    with copy.open("ab") as file:
        file.write(b"edited")
    assert not (source / "a.png").read_bytes().endswith(b"edited") and copy.stat().st_nlink == 1


def test_images_of_one_name_keep_their_own_captions(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    add(source, "a.png", "first")
    add(source, "a.jpg", None)
    (source / "a.jpg.txt").write_text("second")
    add(source / "x", "A.png", "third")
    add(source / "x" / "y", "a.png", "fourth")
    result = prepare(str(source), str(out), "--trigger", "luca")
    assert "renamed, because" in result.stdout
    items = read_dataset(out, CONFIG).items
    by_caption = {item.caption: hashlib.sha256(item.path.read_bytes()).hexdigest() for item in items}
    originals = {
        "third": source / "x" / "A.png",
        "fourth": source / "x" / "y" / "a.png",
        "first": source / "a.png",
    }
    assert len(items) == 4 and len({item.path.stem.lower() for item in items}) == 4
    for caption, path in originals.items():
        if caption != "first":  # a.txt belongs to a.png and, but for a.jpg.txt, to a.jpg
            assert by_caption[caption] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_images_that_cannot_be_read_are_all_named_and_nothing_is_made(source: Path, tmp_path: Path) -> None:
    (source / "bad.png").write_bytes(b"x")
    (source / "trip" / "cut.jpg").write_bytes((source / "b.jpg").read_bytes()[:200])
    out = tmp_path / "out"
    result = prepare(str(source), str(out), "--trigger", "luca")
    assert result.exit_code == 3 and "bad.png" in result.stderr and "cut.jpg" in result.stderr
    assert not out.exists() and os.listdir(tmp_path) == ["photos"]
    result = prepare(str(source), str(out), "--trigger", "luca", "--skip-corrupt")
    assert result.exit_code == 0 and "bad.png" in result.stdout and "cut.jpg" in result.stdout
    assert len(read_dataset(out, CONFIG).items) == 3


def test_images_without_a_caption_get_the_subjects_words_and_it_is_said(source: Path, tmp_path: Path) -> None:
    add(source, "bare.png", None)
    result = prepare(str(source), str(tmp_path / "out"), "--trigger", "luca", "--class", "girl")
    assert "without a caption, so 'luca girl' is written: " in result.stdout
    captions = {i.path.stem: i.caption for i in read_dataset(tmp_path / "out", CONFIG).items}
    assert captions["bare"] == "luca girl"


def test_held_out_images_are_chosen_by_content_and_never_trained_on(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(6):
        add(source, f"{number}.png", f"luca {number}", seed=number)
    prepare(str(source), str(tmp_path / "one"), "--trigger", "luca", "--held-out", "2")
    data = read_dataset(tmp_path / "one", CONFIG)
    assert (len(data.items), len(data.held_out)) == (4, 2)
    for path in sorted(source.glob("*")):
        path.rename(path.with_name("renamed" + path.name))
    prepare(str(source), str(tmp_path / "two"), "--trigger", "luca", "--held-out", "2")
    again = read_dataset(tmp_path / "two", CONFIG)
    assert {i.sha256 for i in data.held_out} == {i.sha256 for i in again.held_out}


def test_held_out_images_of_the_source_stay_held_out(source: Path, tmp_path: Path) -> None:
    add(source / "held_out", "h.png", "luca there")
    prepare(str(source), str(tmp_path / "out"), "--trigger", "luca")
    assert [item.path.name for item in read_dataset(tmp_path / "out", CONFIG).held_out] == ["h.png"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--trigger", "two words"), "cannot be a trigger word"),
        (("--trigger", "a/b"), "cannot be a trigger word"),
        (("--trigger", ".."), "cannot be a trigger word"),
        (("--trigger", "luca", "--class", "a/b"), "cannot be in a folder's name"),
        (("--trigger", "luca", "--repeats", "20000"), "--repeats 20000"),
        (("--trigger", "luca", "--held-out", "3"), "leaves none"),
    ],
)
def test_names_that_would_be_read_back_as_something_else_are_refused(
    source: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    result = prepare(str(source), str(tmp_path / "out"), *words)
    assert result.exit_code in (2, 3) and what in result.stderr and not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_never_written_to(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert prepare(str(source), str(out), "--trigger", "luca").exit_code == 0  # an empty one is taken
    before = contents(out)
    result = prepare(str(source), str(out), "--trigger", "luca")
    assert result.exit_code == 2 and "is not empty" in result.stderr and contents(out) == before
    inside = prepare(str(source), str(source / "out"), "--trigger", "luca")
    assert inside.exit_code == 2 and "lies inside" in inside.stderr and not (source / "out").exists()
    assert prepare(str(tmp_path / "no"), str(tmp_path / "new"), "--trigger", "luca").exit_code == 2


def test_a_link_out_of_the_source_is_not_copied(source: Path, tmp_path: Path) -> None:
    secret = add(tmp_path / "elsewhere", "secret.png")
    (source / "link.png").symlink_to(secret)
    result = prepare(str(source), str(tmp_path / "out"), "--trigger", "luca")
    assert result.exit_code == 3 and "link.png" in result.stderr and not (tmp_path / "out").exists()


def test_the_old_name_of_the_trigger_option_works_once_more_and_says_the_new_one(
    source: Path, tmp_path: Path
) -> None:
    for number, words in enumerate((("--name", "luca"), ("--name=luca",))):
        result = prepare(str(source), str(tmp_path / f"out{number}"), *words, "--class", "style")
        assert result.exit_code == 0 and "--name is now --trigger" in result.stderr
        assert (tmp_path / f"out{number}" / "10_luca style").is_dir()
    assert "--name" not in prepare("--help").output


def test_a_layout_without_a_class_word_says_that_a_search_needs_one(source: Path, tmp_path: Path) -> None:
    assert "--class" in prepare(str(source), str(tmp_path / "a"), "--trigger", "luca").output
    assert (
        "--class" not in prepare(str(source), str(tmp_path / "b"), "--trigger", "l", "--class", "girl").output
    )
