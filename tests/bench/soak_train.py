"""A tiny ``hpo train`` that is killed again and again, against one that is left alone: the same file, to the bit.

    python -m tests.bench.soak_train --out bench/soak-train --kills 20

Each kill is a SIGKILL at a random moment: of the worker, which the supervisor starts again, or of the supervisor, after
which the same command is called again.  Prints the seed, what was killed when, and the outcome; exits with 1 if
anything differs.  The commands are forks of a process that has everything imported (``tests.supervised``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from click.testing import CliRunner

from hpo.cli.main import main as hpo
from tests.faults.zygote import finish
from tests.supervised import begin, is_over, saves_every_step
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import TINY
from tests.tiny_search import draw_images
from trainer.files import read_records

SETTINGS = "learning_rate = 1e-3\ntrain_batch_size = 2\nmax_train_steps = {steps}\nsave_precision = 'float'\n"


def words(output: str) -> list[str]:
    given = ("--base", "base", "--data", "images", "--device", "cpu", "--output", output)
    return ["train", "settings.toml", *given]


def prepared(here: Path, steps: int) -> Path:
    """A folder with a base, images and settings, and the file of an undisturbed run in it."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    save_folder(tiny_base("sd15"), here / "base")
    draw_images(here / "images" / "1_zkw figure", count=4)
    (here / "settings.toml").write_text(TINY + SETTINGS.format(steps=steps))
    with contextlib.chdir(here):
        done = CliRunner().invoke(hpo, words("whole"), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return here / "whole" / "lora.safetensors"


def worker_of(supervisor: int) -> int | None:
    """The process that a supervisor has started, if there is one now."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(children[0]) if children else None
    return None


def soak(here: Path, kills: int, seed: int, slow: float) -> tuple[int, bool, str]:
    """How many kills there were, whether the file is that of an undisturbed run, and what else is left."""
    draw, done, log = random.Random(seed), 0, here / "screen"

    def prepare() -> None:
        saves_every_step()

    while True:
        process = begin(here, log, words("out"), lambda step, what: time.sleep(slow), prepare)
        while not is_over(process):
            time.sleep(draw.uniform(0.2, 1.5))
            worker = worker_of(process)
            if done == kills or worker is None:
                continue
            victim = worker if draw.random() < 0.7 else process
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                done += 1
                print(f"kill {done}: the {'worker' if victim == worker else 'supervisor'}")
            if victim == process:
                while not is_over(worker):
                    time.sleep(0.05)
        if finish(process) == 0:
            break
    one, other = (here / name / "lora.safetensors" for name in ("out", "whole"))
    rows = read_records(here / "out" / "lora.run" / "train.jsonl")
    steps = [row["step"] for row in rows if row["event"] == "step"]
    strays = [str(path) for path in here.rglob("*") if "tmp" in path.name or path.name == "checkpoints"]
    left = f"strays: {strays}" if strays else ""
    if steps != sorted(set(steps)):
        left += " a step is in train.jsonl twice"
    return done, one.read_bytes() == other.read_bytes(), left


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--slow", type=float, default=0.1, help="seconds that each step takes longer")
    given = parser.parse_args()
    torch.set_num_threads(1)
    here = given.out.absolute()
    prepared(here, given.steps)
    print(f"seed {given.seed}")
    done, equal, left = soak(here, given.kills, given.seed, given.slow)
    print(f"{done} kills; the file {'equals' if equal else 'DIFFERS FROM'} that of an undisturbed run {left}")
    raise SystemExit(0 if equal and not left and done >= given.kills else 1)


if __name__ == "__main__":
    main()
