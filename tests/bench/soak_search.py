"""A tiny ``hpo search`` with several workers that are killed again and again, against one that is left alone.

    python -m tests.bench.soak_search --out bench/soak-search --trials 40 --workers 3 --kills 40

Each kill is a SIGKILL of a worker at a random moment of a trial; the supervisor starts it again.  Afterwards every
trial is finished, each number is there once, the value in the database is that in the file, no stray file is left, and
the LoRA file of every trial equals that of the undisturbed search.  Trials are drawn at random (``sampler = random``):
their settings follow from the seed and the number, while those of TPE depend on which trials had ended before.  Prints
the seed and the outcome; exits with 1 if anything differs.
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
from typing import Any

import torch

import hpo.machine.crew
import hpo.search.trial
from hpo.night import restarts
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench
from hpo.study.folder import StudyFolder
from hpo.study.locks import holder
from tests.faults.zygote import finish, start
from tests.supervised import is_over, saves_every_step
from tests.tiny_crew import run_crew
from tests.tiny_search import STUDY, check_study, draw_images, make_search, tiny_bench
from trainer.files import read_records

SEARCH = {"search": {"sampler": "random"}}


def slowly(seconds: float) -> Any:
    """Every step takes longer, so that a trial can be met."""

    def loaded(bench: Workbench) -> None:
        note = hpo.search.trial.StepLog.write

        def write(self: Any, *words: Any, **more: Any) -> None:
            note(self, *words, **more)
            time.sleep(seconds)

        hpo.search.trial.StepLog.write = write  # type: ignore[method-assign]

    return loaded


def command(root: Path, data: Path, trials: int, workers: int, screen: Path, slow: float) -> None:
    restarts.PAUSES = (0.05, 0.05, 0.05)
    hpo.machine.crew.allowed_cores = lambda: workers  # more workers than cores are slow, not wrong
    saves_every_step()
    run_crew(root, data, trials, screen, workers, loaded=slowly(slow))


def at_work(folder: StudyFolder) -> list[int]:
    """The processes that are in a trial now."""
    return [pid for trial in folder.trial_folders() if (pid := holder(folder.trial_lock(trial.number).path))]


def loras(folder: StudyFolder) -> dict[int, bytes]:
    return {trial.number: trial.lora.read_bytes() for trial in folder.trial_folders() if trial.lora.is_file()}


def soak(folder: StudyFolder, data: Path, given: argparse.Namespace, screen: Path) -> int:
    """The search to its end under kills; how many there were."""
    draw, done = random.Random(given.seed), 0
    words = (folder.root, data, given.trials, given.workers, screen, given.slow)
    process = start(command, *words)
    while not is_over(process):
        time.sleep(draw.uniform(0.1, 2 * given.every))
        found = at_work(folder)
        if done < given.kills and found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(found), signal.SIGKILL)
                done += 1
    code = finish(process)
    if code:
        raise SystemExit(f"the search ended with {code}; see {screen}")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--slow", type=float, default=0.15, help="seconds that each step takes longer")
    parser.add_argument("--every", type=float, default=0.7, help="mean seconds between two kills")
    given = parser.parse_args()
    torch.set_num_threads(1)
    STUDY.update(SEARCH)
    here = given.out.absolute()
    shutil.rmtree(here, ignore_errors=True)
    data = draw_images(here / "images")
    make_search(tiny_bench(here / "warm", data), SearchLimits(1)).run()
    print(f"seed {given.seed}")
    whole, disturbed = (StudyFolder(here / name / "runs" / "study") for name in ("whole", "disturbed"))
    for folder in (whole, disturbed):
        folder.root.parent.mkdir(parents=True)
    code = finish(start(command, whole.root, data, given.trials, given.workers, here / "screen-whole", 0.0))
    if code:
        raise SystemExit(f"the undisturbed search ended with {code}; see {here / 'screen-whole'}")
    done = soak(disturbed, data, given, here / "screen")
    check_study(disturbed, given.trials)
    equal = loras(disturbed) == loras(whole)
    deaths = read_records(disturbed.root / "night.jsonl")
    print(
        f"{done} kills, {len(deaths)} deaths noted; {given.trials} trials finished, each once; the LoRA files "
        f"{'equal' if equal else 'DIFFER FROM'} those of an undisturbed search"
    )
    raise SystemExit(0 if equal and done >= given.kills else 1)


if __name__ == "__main__":
    main()
