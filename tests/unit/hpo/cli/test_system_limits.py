"""What the system refuses: folders that cannot be written, too many open files, names that are too long."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hpo.cli.main import main
from tests.faults.zygote import attempt


def hpo(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 9, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a man {number}")
    return folder


def ends_in_words(result: Result) -> bool:
    return (
        isinstance(result.exception, SystemExit) and "error: " in result.output and "hint: " in result.output
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, images: Path) -> None:
    """B8 · weight 1 · The folder for results cannot be written → Said at once, with the folder and what to do."""
    closed = "/sys/lora-hpo"  # nobody can make a folder there, not even root
    file = tmp_path / "train.toml"
    file.write_text("max_train_steps = 1\n")
    words = ("--base", "mini-sd15", "--data", images, "--device", "cpu")
    for command in (
        ("search", "x", *words, "--class", "man", "--trials", "1", "--runs", closed),
        ("train", file, *words, "--output", closed),
        ("dataset", "prepare", images, f"{closed}/out", "--trigger", "luca", "--class", "man"),
    ):
        result = hpo(*command)
        assert ends_in_words(result) and result.exit_code == 5, result.output
        assert closed in result.output


def _without_files(images: Path) -> None:
    free = os.dup(0)  # the lowest free number, which is now the first forbidden one
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    result = hpo("dataset", "check", images)
    assert isinstance(result.exception, SystemExit) and result.exit_code in (3, 5), result.exception
    assert "Too many open files" in result.output or "cannot be trained on" in result.output, result.output


def test_without_free_file_handles_it_ends_in_words(images: Path) -> None:
    """B6 · weight 3 · No more files can be opened → The command ends with an error in words, and no file is damaged."""
    hpo("dataset", "check", images)  # everything is imported
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    assert attempt(_without_files, images) == 0
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ("transfer", "/tmp/" + "x" * 300, "--to", "mini-sdxl"),
        (
            "search",
            "x",
            "--base",
            "mini-sd15",
            "--trials",
            "1",
            "--device",
            "cpu",
            "--clip",
            "ViT-B-32:" + "x" * 300,
        ),
    ],
)
def test_a_name_that_is_too_long_is_a_mistake_of_the_command(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = hpo(*words)
    assert ends_in_words(result) and result.exit_code == 2 and "shorter name" in result.output


def test_a_preset_without_modules_is_named(tmp_path: Path) -> None:
    preset = tmp_path / "empty.toml"
    preset.write_text("")
    words = ("--set", f'lycoris_preset="{preset}"', "--set", 'network_type="LoCon"')
    result = hpo("plan", "--base", "mini-sd15", *words)
    assert ends_in_words(result) and result.exit_code == 2 and "names no module" in result.output
