"""Commands whose output goes to a pipe that is not UTF-8, as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
ENCODING = {"ascii": "ascii", "cp1252": "cp1252", "C": "ascii"}
UTF8 = {"PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "ds" / "3_zed man"
    images.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), (number * 40, 10, 200)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("zed man – hé → 日本", encoding="utf-8")
    (tmp_path / "ok.toml").write_text(
        'pretrained_model_name_or_path = "mini-sd15"\nnetwork_module = "networks.lora"\n'
        'caption_extension = ".txt"\nmax_train_epochs = 1\nresolution = 64\n',
        encoding="utf-8",
    )
    return tmp_path


def hpo(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONIO", "LC_"))}
    return subprocess.run(
        [sys.executable, "-m", "hpo.cli", *words], cwd=folder, env={**kept, **env}, capture_output=True
    )


CHECK = ("dataset", "check", "ds", "--for", "mini-sd15")
CASES = (
    ("ascii", ("train", "ok.toml", "--dry-run", "--data", "ds")),
    ("cp1252", CHECK),
    ("C", ("nosuch→",)),
)


@pytest.mark.parametrize(("form", "words"), CASES)
def test_no_command_ends_because_of_its_own_output(folder: Path, form: str, words: tuple[str, ...]) -> None:
    usual, narrow = hpo(folder, UTF8, *words), hpo(folder, NARROW[form], *words)
    assert b"Traceback" not in narrow.stderr, narrow.stderr.decode(ENCODING[form])
    assert narrow.returncode == usual.returncode
    assert narrow.stdout.decode(ENCODING[form]).count("\n") == usual.stdout.decode("utf-8").count("\n")
    narrow.stderr.decode(ENCODING[form])


def test_signs_that_cannot_be_shown_are_replaced_by_similar_ones(folder: Path) -> None:
    shown = hpo(folder, NARROW["C"], *CHECK).stdout.decode("ascii")
    assert "zed man - " in shown and "h? -> ??" in shown
    assert "x 10 epochs" in shown


def test_a_name_that_the_system_cannot_hold_is_an_error_of_two_lines(folder: Path) -> None:
    settings = (folder / "ok.toml").read_text(encoding="utf-8")
    (folder / "ok.toml").write_text(settings + 'output_name = "日本"\n', encoding="utf-8")
    found = hpo(folder, NARROW["C"], "train", "ok.toml", "--data", "ds")
    lines = found.stderr.decode("ascii").splitlines()
    assert found.returncode == 5 and "PYTHONUTF8=1" in lines[-1], lines


def test_a_service_without_standard_streams_gets_the_usual_error(folder: Path) -> None:
    """``hpo`` as a supervised command, with what cron and some services give it: nothing."""
    script = f'exec "{sys.executable}" -m hpo.cli evaluate nothing <&- >&- 2> errors.txt'
    code = subprocess.run(["bash", "-c", script], cwd=folder).returncode
    said = (folder / "errors.txt").read_text(encoding="utf-8")
    assert code == 2 and "\nerror: no run found" in said and "Traceback" not in said, said
