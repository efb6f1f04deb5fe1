"""What the supervisor of a long command costs: seconds at its start, and memory while it waits.

    python -m tests.bench.bench_supervisor --rounds 20

``hpo train`` without a file ends before any library is loaded.  It is called as a user calls it, with a supervisor, and
without one (``main.main``), in turns.  Prints medians of wall and CPU seconds, and the memory that a
supervisor alone holds (private pages, and all that are resident).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

START = "import sys; from hpo.cli.main import main; "
WAYS = {
    "with a supervisor": START + "sys.argv = ['hpo', 'train']; main()",
    "without": START + "main.main(['train'])",
}
WAITS = (
    START + "import time, hpo.train; "
    "hpo.train.train = lambda *words: time.sleep(60); sys.argv = ['hpo', 'train', 'none.toml']; main()"
)


def seconds(code: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    wall, after = time.perf_counter() - began, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def memory() -> tuple[float, float]:
    """Megabytes of a supervisor that waits: private, and resident."""
    process = subprocess.Popen([sys.executable, "-c", WAITS])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().strip():
        time.sleep(0.05)
    time.sleep(1)
    rows = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        if ": " in line
    )
    process.send_signal(signal.SIGTERM)
    process.wait()
    private = sum(int(rows[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return private / 1000, int(rows["Rss"].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, code in WAYS.items():
            found[name].append(seconds(code))
    for name, rows in found.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name}: {wall:.3f} s, {cpu:.3f} s of CPU (medians of {rounds})")
    print("memory of a supervisor that waits: {:.1f} MB private, {:.1f} MB resident".format(*memory()))


if __name__ == "__main__":
    main()
