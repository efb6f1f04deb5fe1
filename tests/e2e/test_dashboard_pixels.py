"""The real dashboard process, looked at with a real browser: every trial's images are on its page."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.search.sampled import SearchLimits
from tests.recorded import recorded
from tests.tiny_search import draw_images, make_search, tiny_bench

BROWSER = shutil.which("chromium")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_a_browser_shows_the_grid_and_the_note_of_a_trial(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "runs" / "seen", draw_images(tmp_path / "images"))
    make_search(bench, SearchLimits(2)).run()
    with served(tmp_path) as address:
        page = f"{address}/dashboard/studies/1/trials?numbers=1"
        text = browse(tmp_path, "--dump-dom", page).decode()
        assert "Trial 1" in text and "learning_rate" in text and "prompt following" in text
        browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", page)
        with urllib.request.urlopen(page) as answer:
            assert answer.status == 200
    shown = np.asarray(Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB"))
    grid = Image.open(bench.folder.trial(1).grid).convert("RGB")
    assert shows(shown, grid), "the grid is not on the page"


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_a_browser_shows_an_infeasible_trial_as_infeasible(tmp_path: Path) -> None:
    recorded(tmp_path / "runs" / "seen", 5)
    with served(tmp_path) as address:
        text = browse(tmp_path, "--dump-dom", f"{address}/dashboard/studies/1/trials?numbers=3").decode()
    chips = re.findall(r'MuiChip-label[^"]*">(\w+)</span>', text)
    assert chips.count("Infeasible") == 2, chips  # in the list, and on the page of trial 3
    assert re.search(r"Trial 3</span>.{0,400}>Infeasible</span>", text)
    assert re.search(r"Trial 2</span>.{0,400}>Complete</span>", text)


@contextlib.contextmanager
def served(place: Path, *name: str) -> Iterator[str]:
    """The address of a real dashboard process of the study in ``place``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "hpo.cli", "dashboard", *name, "--port", str(port)],
        cwd=place, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert dashboard.stdout is not None and "/dashboard/studies/1" in dashboard.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        dashboard.terminate()
        dashboard.wait()


def browse(folder: Path, what: str, page: str) -> bytes:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb",
        "--window-size=1400,1000", "--virtual-time-budget=20000", f"--user-data-dir={folder / 'browser'}", what, page,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout


def shows(page: np.ndarray, grid: Image.Image) -> bool:
    """Whether the top of the grid, with its title and score, stands on the page at some size."""
    page_HW = page.mean(-1)
    top = grid.crop((0, 0, grid.width, 160)).convert("L")
    widths = (round(1.01**step) for step in range(500, 690))  # 145 to 957 px
    return any(
        likeness(page_HW, np.asarray(top.resize((width, 160 * width // grid.width), Image.Resampling.BOX)))
        > 0.7
        for width in widths
        if width <= page_HW.shape[1]
    )


def likeness(page_HW: np.ndarray, part_hw: np.ndarray) -> float:
    """The largest correlation of the part with a piece of the page of its size (1: equal)."""
    shape = page_HW.shape
    part = part_hw - part_hw.mean()
    ones = np.ones_like(part)
    spectrum, squares = np.fft.rfft2(page_HW), np.fft.rfft2(page_HW**2)

    def sums(of: np.ndarray, by: np.ndarray) -> np.ndarray:
        found = np.fft.irfft2(of * np.conj(np.fft.rfft2(by, shape)), shape)
        return found[: shape[0] - part.shape[0] + 1, : shape[1] - part.shape[1] + 1]

    variance = sums(squares, ones) - sums(spectrum, ones) ** 2 / part.size
    scale = np.sqrt(np.maximum(variance, part.size) * (part**2).sum())
    return float((sums(spectrum, part) / scale).max())
