"""What is stored here: where it lies, the commands that began it and go on with it, and how they are started.

Every path is relative to the folder that the archive is unpacked to, so it can be unpacked anywhere.  The
device is named because a GPU computes in another number type, and a study keeps to the type that it began with.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

ARCHIVE = Path(__file__).with_name("begun-3c18213.zip")  # named after the code that began it
NAME = "begun"
SEARCH = (
    "search", "--base", "mini-sd15", "--data", "images", "--study", "tiny.toml", "--name", NAME, "--device", "cpu"
)  # fmt: skip
BEGUN_TRIALS, TRIALS = 2, 4  # the total that was asked for first, and the one it was raised to
CONFIRM = ("confirm", NAME, "--top", "1", "--seeds", "1", "--yes")
TRAIN = ("train", "lora.toml", "--output", "output", "--device", "cpu")
STEPS = 24  # of every training here


def hpo(*words: str) -> list[str]:
    """The command of this checkout, whatever its modules are called."""
    return [sys.executable, "-u", "-m", "hpo.cli", *words]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def unpack(folder: Path) -> Path:
    """What is stored, as the killed processes left it."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder
