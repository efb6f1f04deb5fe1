"""The real dashboard process, looked at with a real browser: every trial's images are on its page."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.search.sampled import SearchLimits
from tests.tiny_search import draw_images, make_search, tiny_bench

BROWSER = shutil.which("chromium")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
def test_a_browser_shows_the_grid_and_the_note_of_a_trial(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "runs" / "seen", draw_images(tmp_path / "images"))
    make_search(bench, SearchLimits(2)).run()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "hpo.cli", "dashboard", "--port", str(port)],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert dashboard.stdout is not None and "/dashboard/studies/1" in dashboard.stdout.readline()
        page = f"http://127.0.0.1:{port}/dashboard/studies/1/trials?numbers=1"
        text = browse(tmp_path, "--dump-dom", page).decode()
        assert "Trial 1" in text and "learning_rate" in text and "prompt following" in text
        browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", page)
        with urllib.request.urlopen(page) as answer:
            assert answer.status == 200
    finally:
        dashboard.terminate()
        dashboard.wait()
    shown = np.asarray(Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB"))
    grid = np.asarray(Image.open(bench.folder.trial(1).grid).convert("RGB"))
    assert contains(shown, grid[:16, :32]), "the grid's pixels are not on the page"


def browse(folder: Path, what: str, page: str) -> bytes:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--force-color-profile=srgb",
        "--window-size=1400,1000", "--virtual-time-budget=20000", f"--user-data-dir={folder / 'browser'}", what, page,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether the picture holds the part, pixel by pixel up to rounding."""
    height, width = part.shape[:2]
    near = (np.abs(picture.astype(int) - part[0, 0]) <= 3).all(-1)
    for row, column in np.argwhere(near[: -height or None, : -width or None]):
        found = picture[row : row + height, column : column + width].astype(int)
        if (np.abs(found - part) <= 3).all():
            return True
    return False
