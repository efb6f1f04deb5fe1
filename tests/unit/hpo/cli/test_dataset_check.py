"""hpo dataset check: everything wrong with a folder is found in one go, and training agrees."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hpo.cli.dataset import DatasetRequest, examine
from hpo.cli.main import main
from tests.unit.trainer.data.test_dataset import add, picture
from trainer.data.dataset import read_dataset
from trainer.data.epoch import assign_buckets
from trainer.errors import ToolError

MINI = ("--for", "mini-sd15")


def photo(seed: int, side_px: int = 96) -> Image.Image:
    """A picture with large and small structure, unlike others."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side_px, side_px), Image.Resampling.BICUBIC)


def good(folder: Path, count: int = 6, side_px: int = 96) -> Path:
    """A dataset without a fault: kohya's layout, captions that differ."""
    place = folder / "10_zed man"
    place.mkdir(parents=True)
    for number in range(count):
        photo(number, side_px).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"zed man, scene {number}, light {number}")
    return place


def check(*words: str) -> Result:
    return CliRunner().invoke(
        main, ["dataset", "check", *words], env={"COLUMNS": "80"}, catch_exceptions=False
    )


def report(folder: Path, *words: str) -> dict[str, Any]:
    return json.loads(check(str(folder), *(words or MINI), "--json").stdout)


def kinds(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    return {finding["kind"]: finding for finding in report(folder, *words)["findings"]}


def test_a_good_folder_has_no_findings_and_ends_with_0(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    good(tmp_path / "data", count=10)
    result = check("data", *MINI)
    assert result.exit_code == 0 and "no problems found" in result.stdout
    assert "next: hpo search --base mini-sd15 --data data\n" in result.stdout
    found = report(tmp_path / "data")
    assert (
        found["usable"] and found["findings"] == [] and (found["trigger"], found["class"]) == ("zed", "man")
    )
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_the_arithmetic_counts_repeats_batches_and_accumulation(tmp_path: Path) -> None:
    good(tmp_path)
    steps = report(
        tmp_path, *MINI, "--set", "train_batch_size=7", "--set", "gradient_accumulation_steps=2",
        "--set", "max_train_epochs=3",
    )["steps"]  # fmt: skip
    assert (steps["samples_per_epoch"], steps["batches_per_epoch"]) == (60, 9)  # 6 × 10 in batches of 7
    assert (steps["steps_per_epoch"], steps["total_steps"], steps["buckets"]) == (5, 15, {"64×64": 60})


def test_everything_that_is_wrong_is_found_in_one_go(tmp_path: Path) -> None:
    place = good(tmp_path)
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:300])
    (place / "text.jpg").write_text("no image")
    (place / "nothing.webp").write_bytes(b"")
    (place / "away.png").symlink_to("/etc/hostname")
    add(place, "thin.png", width_px=200, height_px=5)
    add(place, "bare.png", None, width_px=64, height_px=64)
    add(place, "blank.png", " \n ", width_px=64, height_px=64)
    add(place, "bytes.png", None, width_px=64, height_px=64)
    (place / "bytes.txt").write_bytes(b"zed \xff")
    (place / "same.png").write_bytes((place / "1.png").read_bytes())
    (place / "same.txt").write_text("zed man again")
    photo(2).resize((70, 70)).save(place / "near.jpg", quality=40)
    (place / "near.txt").write_text("another man")
    (place / "old.gif").write_bytes(b"GIF89a")
    (place / "gone.txt").write_text("zed man, lost")
    (tmp_path / "no repeats").mkdir()
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "3.png").write_bytes((place / "3.png").read_bytes())
    result = check(str(tmp_path), *MINI)
    assert result.exit_code == 3 and "Traceback" not in result.output
    for name in ("cut.png", "text.jpg", "nothing.webp", "away.png"):
        assert name in result.stdout
    findings = report(tmp_path)["findings"]
    by_kind = {kind: [f for f in findings if f["kind"] == kind] for kind in {f["kind"] for f in findings}}
    refused = {kind for kind, group in by_kind.items() if group[0]["severity"] == "refused"}
    assert refused == {"corrupt", "unfit", "caption-empty", "caption-broken", "held-out"}
    assert len(by_kind["corrupt"]) == 4
    names = {kind: [Path(f).name for g in group for f in g["files"]] for kind, group in by_kind.items()}
    assert names["caption-of-folder"] == ["bare.png"]  # it is trained with “zed man”
    assert names["unfit"] == ["thin.png"] and names["caption-broken"] == ["bytes.txt"]
    assert names["duplicate"] == ["1.png", "same.png"] and names["near-duplicate"] == ["2.png", "near.jpg"]
    assert names["format"] == ["old.gif"] and names["orphan"] == ["gone.txt"]
    assert "near.jpg" in names["trigger"] and names["caption-empty"] == ["blank.png"]
    assert names["held-out"] == ["3.png"]
    assert all(finding["do"] for finding in findings)


def test_odd_modes_are_named_with_what_becomes_of_them(tmp_path: Path) -> None:
    place = good(tmp_path)
    rgb = photo(50)
    rgb.convert("CMYK").save(place / "a.jpg")
    rgb.rotate(90).quantize(16).save(place / "b.png")
    alpha = photo(51).convert("RGBA")
    alpha.putalpha(120)
    alpha.save(place / "c.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 65535, (96, 96), dtype=np.uint16)).save(
        place / "d.png"
    )
    exif = Image.Exif()
    exif[274] = 6
    photo(52, 128).crop((0, 0, 96, 128)).save(place / "e.jpg", exif=exif)
    photo(53).save(place / "f.webp", save_all=True, append_images=[photo(54)])
    photo(55).convert("L").save(place / "g.png")
    for letter in "abcdefg":
        (place / f"{letter}.txt").write_text(f"zed man {letter}")
    found = {tuple(Path(f).name for f in x["files"]): x for x in report(tmp_path)["findings"]}
    expected = {
        "a.jpg": "CMYK", "b.png": "palette", "c.png": "transparent", "d.png": "16-bit",
        "e.jpg": "on their side", "f.webp": "animated", "g.png": "grey",
    }  # fmt: skip
    for name, word in expected.items():
        assert word in found[(name,)]["what"], name
    assert report(tmp_path)["usable"]


def test_tokens_are_counted_by_clips_own_tokenizer(tmp_path: Path) -> None:
    place = good(tmp_path, count=10, side_px=512)
    (place / "0.txt").write_text("zed " + "man " * 74)  # 75
    (place / "1.txt").write_text("zed " + "man " * 75)  # 76
    (place / "2.txt").write_text("zed " + "man " * 225)  # 226
    findings = [f for f in report(tmp_path, "--for", "sd15")["findings"] if f["kind"] == "caption-long"]
    assert [[Path(name).name for name in f["files"]] for f in findings] == [["2.png"], ["1.png"]]
    assert "225 tokens" in findings[0]["what"] and "max_token_length = 150" in findings[1]["do"]
    longer = ("--for", "sd15", "--set", "max_token_length=150")
    assert [f["kind"] for f in report(tmp_path, *longer)["findings"]] == ["caption-long"]


def test_images_that_are_too_small_are_told_apart_from_those_that_are_enlarged(tmp_path: Path) -> None:
    place = good(tmp_path, side_px=512)
    photo(7, 400).save(place / "0.png")
    photo(8, 200).save(place / "1.png")
    found = kinds(tmp_path, "--for", "sd15")
    assert found["upscaled"]["files"][0].endswith("0.png") and "own size" in found["upscaled"]["what"]
    assert found["small"]["files"][0].endswith("1.png")
    enlarged = kinds(tmp_path, "--for", "sd15", "--set", "bucket_no_upscale=false")
    assert "enlarged up to 1.3 times" in enlarged["upscaled"]["what"]


def test_sdxl_is_warned_of_when_more_than_30_percent_are_below_768_px(tmp_path: Path) -> None:
    place = good(tmp_path, count=10, side_px=1024)
    for number in range(3):
        photo(20 + number, 760).save(place / f"{number}.png")
    assert "short-side" not in kinds(tmp_path, "--for", "sdxl")
    photo(30, 760).save(place / "3.png")
    assert kinds(tmp_path, "--for", "sdxl")["short-side"]["what"].startswith("40%")
    assert "short-side" not in kinds(tmp_path, "--for", "sd15")


def test_tags_in_every_caption_and_captions_without_the_trigger(tmp_path: Path) -> None:
    place = good(tmp_path)
    for number in range(6):
        (place / f"{number}.txt").write_text(f"zed man, solo, smile{number}")
    assert "solo" in kinds(tmp_path)["tag-everywhere"]["what"]
    assert "trigger" not in kinds(tmp_path)
    (place / "4.txt").write_text("zedder man")
    assert [Path(f).name for f in kinds(tmp_path)["trigger"]["files"]] == ["4.png"]
    assert "tag-everywhere" not in kinds(tmp_path)
    assert "trigger" not in kinds(tmp_path, *MINI, "--set", "caption_prefix=zed")


def test_a_folder_that_does_not_say_what_it_shows_is_told_which_flags_say_it(tmp_path: Path) -> None:
    place = good(tmp_path, count=10).rename(tmp_path / "photos")
    for number in range(10):
        (place / f"{number}.txt").write_text(f"a photo of luca woman in scene{number}")
    said = kinds(place)["trigger"]
    assert "no trigger word and no class word" in said["what"]
    assert "in every caption: luca, woman" in said["what"] and "--trigger and --class" in said["do"]
    assert "tag-everywhere" not in kinds(place), "the note about the trigger names them"
    assert "class" in kinds(place, *MINI, "--trigger", "luca")
    assert not {"class", "trigger"} & set(kinds(place, *MINI, "--trigger", "luca", "--class", "woman"))
    next_line = check(str(place), *MINI, "--trigger", "luca", "--class", "woman").stdout.splitlines()[-1]
    assert next_line.startswith("next: hpo search") and next_line.endswith("--trigger luca --class woman")


def test_captions_that_are_all_the_same_are_a_note(tmp_path: Path) -> None:
    place = good(tmp_path, count=10)
    for number in range(4):
        (place / f"{number}.txt").write_text("zed man")
    said = kinds(tmp_path)["caption-same"]
    assert said["what"] == "4 of 10 captions are the same: 'zed man'" and said["severity"] == "note"
    (place / "0.txt").write_text("zed man in a boat")
    assert "caption-same" not in kinds(tmp_path)


def test_a_style_is_called_one(tmp_path: Path) -> None:
    good(tmp_path, count=10).rename(tmp_path / "10_vexa style")
    assert (
        report(tmp_path)["preset"] == "style" and ", style vexa style" in check(str(tmp_path), *MINI).stdout
    )


def test_too_few_images_for_a_search_are_a_note_and_no_next_step(tmp_path: Path) -> None:
    place = good(tmp_path, count=9)
    said = kinds(tmp_path)["few"]
    assert said["severity"] == "note" and "9 images: too few" in said["what"] and "held_out/" in said["do"]
    assert "next:" not in check(str(tmp_path), *MINI).stdout
    for number in (0, 1):
        (tmp_path / "held_out").mkdir(exist_ok=True)
        (place / f"{number}.png").rename(tmp_path / "held_out" / f"{number}.png")
        (place / f"{number}.txt").unlink()
    assert "few" not in kinds(tmp_path) and "few" not in kinds(place), (
        "held_out/ beside one folder of it counts"
    )
    assert report(place)["held_out"] == 2 and report(place)["usable"]


def test_images_of_one_stem_share_a_caption_and_it_is_said(tmp_path: Path) -> None:
    place = good(tmp_path)
    photo(40).save(place / "0.jpg")
    assert [Path(f).name for f in kinds(tmp_path)["shared-caption"]["files"]] == ["0.jpg", "0.png"]
    (place / "0.jpg.txt").write_text("zed man, his own")
    assert "shared-caption" not in kinds(tmp_path)


def test_different_pictures_are_no_duplicates(tmp_path: Path) -> None:
    good(tmp_path, count=40, side_px=64)
    assert "near-duplicate" not in kinds(tmp_path)


@pytest.mark.parametrize("words", [("no/such",), (".", "--set", "resolution=7")])
def test_a_wrong_command_is_an_error_of_two_lines(
    tmp_path: Path, monkeypatch: Any, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = check(*words)
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]  # the sign of life
    assert result.exit_code == 2 and len(lines) == 2
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")


def test_an_empty_folder_is_a_finding(tmp_path: Path) -> None:
    assert [f["severity"] for f in report(tmp_path)["findings"]] == ["refused"]


@pytest.mark.parametrize("seed", range(12))
def test_the_check_refuses_exactly_what_training_refuses(tmp_path: Path, seed: int) -> None:
    """Random faults, alone and together."""
    draw = random.Random(seed)
    root = tmp_path / draw.choice(["plain", "3_zed man", "0_zed man", "99999_zed"])
    place = root / draw.choice(["", "4_zed man", "0_zed man", "20240101_zed man", "words"])
    place.mkdir(parents=True)
    for number in range(draw.randint(0, 3)):
        add(
            place,
            f"{number}.png",
            draw.choice(["zed", "zed man", "zed", "", None]),
            width_px=draw.choice([64, 64, 6]),
        )
    if draw.random() < 0.3:
        (root / "held_out").mkdir(exist_ok=True)
        for path in sorted(place.glob("0.png")):
            (root / "held_out" / "x.png").write_bytes(path.read_bytes())
    if draw.random() < 0.2:
        (place / "bad.png").write_bytes(b"x")
    if draw.random() < 0.2:
        (place / "link.png").symlink_to("/nowhere")
    request = DatasetRequest(root, "mini-sd15")
    try:
        assign_buckets(read_dataset(root, request.config).items, request.config)
        taken = True
    except ToolError:
        taken = False
    assert examine(request).is_usable == taken


def test_control_characters_in_names_and_captions_are_not_printed(tmp_path: Path) -> None:
    place = good(tmp_path)
    (place / "e\x1b[31mvil.png").write_bytes(b"x")
    for number in range(6):
        (place / f"{number}.txt").write_text(f"zed man, \x1b[2Jtag, scene {number}")
    result = check(str(tmp_path), *MINI)
    assert "\x1b" not in result.output and "vil.png" in result.stdout
    assert picture().size == (20, 16)
