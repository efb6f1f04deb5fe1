"""Every command says something before it imports what takes seconds, and leaves stdout alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.stored.commands import NAME, TRAIN, environment, hpo, unpack
from tests.tiny_search import draw_images

# Ends the process when a slow library is first looked for.  Its last line stands among what the command wrote.
WATCHED = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "diffusers", "transformers", "open_clip"):
            os.write(1, b"IMPORT")
            os._exit(0)

sys.meta_path.insert(0, Watch())
from hpo.cli.main import main
main(sys.argv[1:])
"""
LORA = "output/begun-step00000004.safetensors"
SEARCH = (
    "search", NAME, "--base", "mini-sd15", "--data", "images", "--definition", "tiny.toml", "--device", "cpu"
)  # fmt: skip
COMMANDS = {  # and the first line of each
    SEARCH: f"study {NAME} was begun with an earlier version and keeps its objective: the sampler is told 0 where the "
    "score is 0",
    ("confirm", NAME, "--yes"): "the search is not finished: 2 trials are left",
    (
        "transfer",
        NAME,
        "--to",
        "mini-sdxl",
        "--trials",
        "3",
    ): f"from {NAME}, trial 1, the best of the search (0.3804); unconfirmed, see hpo confirm",
    ("plan", "--base", "mini-sd15"): "predicting the memory use of mini-sd15 …",
    ("plan", "--base", "mini-sd15", "--json"): "hpo plan: loading libraries …",
    TRAIN: "hpo train: loading libraries …",
    ("evaluate", "output"): "hpo evaluate: loading libraries …",
    ("compare", LORA, LORA): "hpo compare: loading libraries …",
    ("inspect", LORA): "hpo inspect: loading libraries …",
    ("inspect", LORA, "--json"): "hpo inspect: loading libraries …",
    ("dataset", "check", "images"): "hpo dataset check: reading the images …",
    ("dataset", "check", "images", "--json"): "hpo dataset check: reading the images …",
}
# These load no slow library at all.
QUICK = (
    ("export", "kohya", "lora.toml", "exported"),
    ("dataset", "prepare", "images/1_luca figure", "prepared", "--trigger", "zed", "--class", "figure"),
    ("dataset", "demo", "style", "demo"),
    ("status", NAME),
    ("studies",),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("begun"))


def watched(place: Path, *words: str) -> str:
    """What a command writes until it looks for the first slow library."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words],
        cwd=place,
        env={**environment(), "HPO_CACHE": tempfile.mkdtemp(dir=place)},  # a stored prediction loads no torch
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_the_first_line_comes_before_the_first_slow_import(words: tuple[str, ...], place: Path) -> None:
    said = watched(place, *words)
    assert said.endswith("IMPORT") and said.partition("\n")[0] == COMMANDS[words], said


@pytest.mark.parametrize("words", QUICK, ids=lambda words: " ".join(words[:2]))
def test_commands_that_are_quick_load_no_slow_library(words: tuple[str, ...], place: Path) -> None:
    said = watched(place, *words)
    assert said and "IMPORT" not in said and "loading" not in said


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "bare"),  # nothing says what the images show, and nobody can be asked
        ("--set", "learning_rate={low=1e-7, high=1e-6, log=true}"),  # trial 0 is outside
        ("--definition", "nothing.toml"),
        ("--data", "images", "--set", "learning_rate=fast"),
    ],
    ids=str,
)
def test_a_search_finds_mistakes_in_what_was_asked_for_before_it_loads_libraries(
    words: tuple[str, ...], place: Path
) -> None:
    if not (place / "bare").exists():
        draw_images(place / "bare", count=10, size_px=64)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "search", "new", "--base", "mini-sd15", *words],
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "IMPORT" not in done.stdout and not (place / "runs" / "new").exists()


def test_what_scripts_read_is_not_disturbed(place: Path) -> None:
    words = hpo("dataset", "check", "images", "--for", "mini-sd15", "--json")
    done = subprocess.run(words, cwd=place, env=environment(), capture_output=True, check=True)
    assert json.loads(done.stdout)["usable"] is True
    assert done.stderr.decode().startswith("hpo dataset check: reading the images …\n")


def test_a_mistake_that_is_found_at_once_needs_no_line(place: Path) -> None:
    done = subprocess.run(hpo("status", "nothing"), cwd=place, env=environment(), capture_output=True)
    assert done.stderr.decode().startswith("error: no study nothing")


def test_a_resumed_command_says_once_that_it_loads_libraries(place: Path) -> None:
    row = {
        "id": "1",
        "event": "started",
        "step": "train",
        "words": TRAIN,
        "cwd": str(place),
        "time_utc": "2026-01-01",
    }
    (place / "output" / "begun.run" / "work.jsonl").write_text(json.dumps(row) + "\n")
    said = watched(place, "resume", "output/begun.run")
    assert said.startswith("resuming: hpo train") and said.endswith("IMPORT"), said
    assert said.count("loading libraries …") == 1, said
