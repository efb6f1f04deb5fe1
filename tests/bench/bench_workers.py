"""Several workers of one study on one machine, against one worker: wall time until the study has its trials.

    python -m tests.bench.bench_workers --out bench/workers --workers 4 --trials 8

Each worker is a process of ``hpo search`` as a user starts it: with its own start, no variable that limits threads,
and the same command. The length of a trial is fixed, so that every trial has the same number of steps, whatever the
sampler proposes. One worker and several take turns (``--rounds``), each on a fresh study. Prints a Markdown table with
wall and CPU seconds and the ratio; every figure is in ``--out``/workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def command(name: str, runs: Path, trials: int) -> list[str]:
    """The words of one worker."""
    words = ["search", name, "--base", "mini-sd15", "--trials", str(trials), "--runs", str(runs)]
    return [sys.executable, "-m", "hpo.cli", *words, "--device", "cpu", "--set", "max_train_epochs=1"]


def measured(folder: Path, workers: int, trials: int) -> dict[str, float]:
    """Wall and CPU seconds of ``workers`` processes that share one fresh study, and the trials it has in the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {name: value for name, value in os.environ.items() if name not in THREADS}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    running = []
    for number in range(workers):
        with (folder / f"worker{number}.txt").open("w") as output:
            process = subprocess.Popen(
                command("study", folder, trials), env=own, stdout=output, stderr=subprocess.STDOUT
            )
        running.append(process)
    codes = [process.wait() for process in running]
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(codes):
        raise SystemExit(f"workers ended with {codes}; see {folder}/worker*.txt")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done = len(list((folder / "study").glob("trial_*/result.json")))
    return {"workers": workers, "wall_seconds": wall, "cpu_seconds": cpu, "trials": done}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    rows = []
    for number in range(given.rounds):
        for workers in (1, given.workers):
            row = measured(given.out / f"round{number}-{workers}", workers, given.trials)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    (given.out / "workers.json").write_text(json.dumps(rows, indent=1))
    print("| workers | trials | wall, s | CPU, s | wall against one |\n|---|---|---|---|---|")
    alone = min(row["wall_seconds"] for row in rows if row["workers"] == 1)
    for workers in (1, given.workers):
        row = min((row for row in rows if row["workers"] == workers), key=lambda row: row["wall_seconds"])
        figures = (row["workers"], row["trials"], f"{row['wall_seconds']:.0f}", f"{row['cpu_seconds']:.0f}")
        print("| " + " | ".join(map(str, figures)) + f" | {row['wall_seconds'] / alone:.2f} |")


if __name__ == "__main__":
    main()
