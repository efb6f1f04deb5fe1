"""Pictures for docs/images: ``hpo status``, ``confirm``, ``evaluate`` and ``compare`` in a terminal of 80×24, the sheet
of ``compare``, and a trial in the dashboard.

    python -m tests.bench.terminal_pictures WORK          makes WORK/runs first, if it is not there (about 20 minutes)

The dashboard needs Chromium; without it, its picture is left as it is.  Of the sheet, only the first rows are kept.
Paths are shown from WORK on.  The commands are real, and so is their terminal (a pseudo-terminal of 80 columns and 24
rows).  The picture shows the whole output, also what has scrolled away.  Confirm and evaluate have finished before, so
they only print their result again.  Steps that are done are not repeated.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.e2e.test_dashboard_pixels import BROWSER, browse, served
from tests.places import ROOT

NAME, COLUMNS, ROWS = "luca", 80, 24
IMAGES = ROOT / "docs" / "images"
SETTINGS = f"runs/{NAME}/transfer/mini-sdxl.toml"
OUTPUT = f"runs/{NAME}/transfer/output-mini-sdxl"
QUICK = "quick.toml"  # the study file of mini-sdxl with fewer images and steps
FEWER = {
    "train-like = 6, altered = 9": "train-like = 2, altered = 3",
    "train-like = 6, altered = 8": "train-like = 2, altered = 3",
    "seeds = [0, 1]": "seeds = [0]",
    "seeds = [1000, 1001]": "seeds = [1000]",
    "steps = 20": "steps = 10",
}
MAKE = (  # what a step leaves behind, and the command
    ("images", ("dataset", "demo", "character", "images")),
    (f"runs/{NAME}/study.db", ("search", NAME, "--base", "mini-sd15", "--data", "images", "--trials", "8")),
    (f"runs/{NAME}/confirmed.json", ("confirm", NAME, "--top", "2", "--yes")),
    (SETTINGS, ("transfer", NAME, "--to", "mini-sdxl")),
    (f"{OUTPUT}/{NAME}_mini-sdxl.safetensors", ("train", SETTINGS)),
    (f"{OUTPUT}/best.safetensors", ("evaluate", OUTPUT, "--definition", QUICK)),
)
SHEET_PX = 1150  # the height at which the sheet is cut, at the next end of a row above
SHOWN = {
    "status": ("status", NAME),
    "confirm": ("confirm", NAME, "--top", "2", "--yes"),
    "evaluate": ("evaluate", OUTPUT, "--definition", QUICK),
}
_MOVES = re.compile(r"(\n|\r|\x1b\[[0-9;?]*[A-HJKSTfhlsu]|\x1b\][^\x07]*\x07)")
_OTHER = re.compile(r"\r|\x1b\[[0-9;?]*[A-HJKSTfhlsu]|\x1b\][^\x07]*\x07")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm-256color",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": str(COLUMNS),
        "LINES": str(ROWS),
    }


def shown(work: Path, words: tuple[str, ...]) -> str:
    """What the command writes to a terminal, with its colours.  Lines that it erased again are left out."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "hpo.cli", *words]
    process = subprocess.Popen(
        command, cwd=work, stdin=theirs, stdout=theirs, stderr=theirs, env=environment()
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        written += part
        if not part:
            break
    os.close(ours)
    if process.wait():
        raise SystemExit(written.decode())
    return on_screen(written.decode().replace(f"{work}/", ""))


def on_screen(written: str) -> str:
    """The lines that stay: what was erased or overwritten by moving up is gone.  Colours are kept."""
    lines, row = [""], 0
    for part in _MOVES.split(written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and not _OTHER.fullmatch(part):
            lines[row] += part
    return "\n".join(line for line in lines if line.strip())


def picture(words: tuple[str, ...], text: str) -> str:
    """The output as SVG.  No font is loaded from elsewhere."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.assemble(("$ ", "bold green"), (f"hpo {' '.join(words)}", "bold")))
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title=f"{COLUMNS} columns")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "monospace")


def first_rows(sheet: Image.Image) -> Image.Image:
    """The sheet down to the end of a row of images, at most ``SHEET_PX`` high, with the margin that it has above."""
    filled = (np.asarray(sheet.convert("L"))[:SHEET_PX] < 250).mean(axis=1)
    images = filled > 0.6  # texts fill less
    ends = np.flatnonzero(images[:-1] & ~images[1:])
    return sheet.crop((0, 0, sheet.width, int(ends[-1]) + 1 + int(np.flatnonzero(filled)[0])))


def take_dashboard(work: Path, trial: int) -> None:
    """docs/images/dashboard.png: the page of a trial in the real dashboard."""
    with served(work, NAME) as address:
        page = f"{address}/dashboard/studies/1/trials?numbers={trial}"
        browse(work, f"--screenshot={work / 'page.png'}", page)
    Image.open(work / "page.png").convert("RGB").quantize(128).save(IMAGES / "dashboard.png", optimize=True)


def main() -> None:
    work = Path(sys.argv[1]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    quick = (ROOT / "studies" / "mini-sdxl.toml").read_text(encoding="utf-8")
    for usual, fewer in FEWER.items():
        quick = quick.replace(usual, fewer)
    (work / QUICK).write_text(quick, encoding="utf-8")
    for left, words in MAKE:
        if not (work / left).exists():
            subprocess.run([sys.executable, "-m", "hpo.cli", *words], cwd=work, env=environment(), check=True)
    winner = json.loads((work / f"runs/{NAME}/confirmed.json").read_text())["winner"]
    compare = ("compare", f"runs/{NAME}/trial_{winner:04d}", OUTPUT, "--definition", QUICK)
    subprocess.run([sys.executable, "-m", "hpo.cli", *compare], cwd=work, env=environment(), check=True)
    for name, words in {**SHOWN, "compare": compare}.items():
        (IMAGES / f"{name}.svg").write_text(picture(words, shown(work, words)), encoding="utf-8")
    (sheet,) = (work / OUTPUT).glob("*.run/evaluation/compare/*/sheet.png")
    first_rows(Image.open(sheet)).save(IMAGES / "compare.png", optimize=True)
    if BROWSER:
        take_dashboard(work, winner)


if __name__ == "__main__":
    main()
