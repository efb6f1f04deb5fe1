"""``hpo search`` with several workers: real processes that are killed and stopped.  Each trial is run once, nothing
stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hpo.search.trial
from hpo.night import restarts
from hpo.search.workbench import Workbench
from hpo.study.folder import StudyFolder, TrialFolder
from hpo.study.locks import holder
from hpo.study.storage import open_study
from hpo.terminal.live import STOPPING
from tests.faults.zygote import finish, start
from tests.places import ROOT
from tests.supervised import is_over, until
from tests.tiny_crew import run_crew
from tests.tiny_search import check_study, draw_and_warm_up
from trainer.errors import Interrupted, ToolError
from trainer.files import read_records

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and everything imported and run once before the first fork."""
    return draw_and_warm_up(tmp_path_factory.mktemp("begun"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "runs" / "study"


def held(bench: Workbench, *, deaf: bool = False) -> None:
    """After its first step this worker stands still until it is asked to stop.  ``deaf``: for ever."""
    note = hpo.search.trial.StepLog.write

    def write(self: Any, *words: Any, **more: Any) -> None:
        note(self, *words, **more)
        stop = signal.getsignal(signal.SIGTERM).__self__  # type: ignore[union-attr]  # the handler of a Stop
        while deaf or not stop.asked:
            time.sleep(0.02)

    hpo.search.trial.StepLog.write = write  # type: ignore[method-assign]


def held_for_ever(bench: Workbench) -> None:
    held(bench, deaf=True)


def slowly(bench: Workbench) -> None:
    """Every step of this worker takes longer, so that its trial can be met."""
    note = hpo.search.trial.StepLog.write

    def write(self: Any, *words: Any, **more: Any) -> None:
        note(self, *words, **more)
        time.sleep(0.1)

    hpo.search.trial.StepLog.write = write  # type: ignore[method-assign]


def as_usual(bench: Workbench) -> None: ...


def command(root: Path, data: Path, trials: int, screen: Path, loaded: Any = slowly, **words: Any) -> None:
    """The command line's part: exit codes, and pauses that a test can wait for."""
    restarts.PAUSES = (0.05, 0.05, 0.05)
    try:
        run_crew(root, data, trials, screen, loaded=loaded, **words)
    except ToolError as error:
        with screen.open("a") as file:
            file.write(f"{error.message}\n{error.hint}\n")
        raise SystemExit(error.exit_code) from None


def trained(folder: StudyFolder) -> list[tuple[TrialFolder, int]]:
    """The trials that are in training now, and the processes that run them."""
    found = []
    for trial in folder.trial_folders():
        pid = holder(folder.trial_lock(trial.number).path)
        if pid and trial.steps.is_file() and not trial.lora.is_file():
            found.append((trial, pid))
    return found


def both_at_work(folder: StudyFolder) -> set[int]:
    """The processes of two workers, once each of them trains."""
    found = {pid for _, pid in trained(folder)}
    return found if len(found) == 2 else set()


def starts(folder: StudyFolder) -> list[int]:
    return [
        sum(row["event"] == "start" for row in read_records(trial.starts)) for trial in folder.trial_folders()
    ]


def test_two_workers_share_four_trials_and_the_command_says_it_once(
    root: Path, data: Path, tmp_path: Path
) -> None:
    screen, folder = tmp_path / "screen", StudyFolder(root)
    assert finish(start(command, root, data, 4, screen)) == 0
    check_study(folder, 4)
    assert starts(folder) == [1, 1, 1, 1]
    said = screen.read_text()
    lines = said.splitlines()
    assert lines[1] == f"2 workers on the CPU; their output is in {root / 'workers'}"
    assert lines[-1].startswith("study=study complete=4/4 infeasible=0 failed=0 best=")
    for once in (
        "cost: 4 trials",
        "generating 2 images with the untrained",
        "next: hpo confirm",
        "study=study",
    ):
        assert said.count(once) == 1, once
    assert sorted(line.split()[0] for line in lines if line.startswith("trial=")) == [
        f"trial={n}" for n in range(4)
    ]
    logs = [(root / "workers" / f"worker-{n}.log").read_text() for n in (1, 2)]
    assert all("trial=" in log and "study=study" in log for log in logs), (
        "each log has all that its worker said"
    )
    rows = read_records(root / "work.jsonl")
    assert not rows, "a library call is not recorded, and neither are its workers"


def test_a_worker_that_is_killed_starts_again_and_every_trial_is_told_once(
    root: Path, data: Path, tmp_path: Path
) -> None:
    screen, folder = tmp_path / "screen", StudyFolder(root)
    parent = start(command, root, data, 4, screen)
    trial, pid = until(lambda: trained(folder))[0]
    os.kill(pid, signal.SIGKILL)
    assert finish(parent) == 0
    check_study(folder, 4)
    assert starts(folder)[trial.number] == 2 and sum(starts(folder)) == 5
    said = screen.read_text()
    assert said.count("died: killed by SIGKILL; it starts again in 0.05 s") == 1
    assert "start 2" in "".join(path.read_text() for path in (root / "workers").iterdir())


def test_a_worker_that_is_suspended_and_forgotten_is_ended_and_its_trial_goes_on(
    root: Path, data: Path, tmp_path: Path
) -> None:
    screen, folder = tmp_path / "screen", StudyFolder(root)
    parent = start(partial(command, root, data, 4, screen, hang_seconds=1.5))
    trial, pid = until(lambda: trained(folder))[0]
    os.kill(pid, signal.SIGSTOP)
    assert finish(parent) == 0
    check_study(folder, 4)
    assert starts(folder)[trial.number] == 2 and sum(starts(folder)) == 5
    said = screen.read_text()
    assert f"process {pid} is ended" in said and said.count("it starts again in 0.05 s") == 1
    assert [row["reason"] for row in read_records(root / "night.jsonl")] == ["hang"]


def test_when_the_command_is_killed_its_workers_save_and_end_and_the_next_one_goes_on(
    root: Path, data: Path, tmp_path: Path
) -> None:
    """A6 · weight 3 · The command itself is killed while its workers train → The workers save and end by
    themselves; the same command goes on.
    """
    screen, folder = tmp_path / "screen", StudyFolder(root)
    parent = start(command, root, data, 4, screen, held)
    pids = until(lambda: both_at_work(folder))
    os.kill(min(pids), signal.SIGSTOP)  # as Ctrl-Z does
    os.kill(parent, signal.SIGKILL)
    finish(parent)
    for pid in pids:
        until(lambda pid=pid: is_over(pid), 20)
    events = [read_records(trial.starts)[-1]["event"] for trial in folder.trial_folders()]
    assert events.count("interrupted") == 2, "saved, not only dead"
    assert finish(start(command, root, data, 4, screen, as_usual)) == 0
    check_study(folder, 4)


def test_ctrl_c_saves_and_ends_all_and_the_same_command_goes_on(
    root: Path, data: Path, tmp_path: Path
) -> None:
    """W7 · weight 3 · Ctrl-C in a search with several workers → All of them save and end; the same command goes
    on.
    """
    screen, folder = tmp_path / "screen", StudyFolder(root)
    parent = start(command, root, data, 4, screen, held)
    pids = until(lambda: both_at_work(folder))
    os.kill(parent, signal.SIGINT)
    assert finish(parent) == Interrupted.exit_code
    assert all(map(is_over, pids))
    running = [t for t in open_study(folder).get_trials(deepcopy=False) if t.state.name == "RUNNING"]
    assert len(running) == 2
    said = screen.read_text()
    assert said.count("study=study complete=") == 1 and "run the same command again to resume" in said
    assert "is left out" not in said and "died" not in said
    assert finish(start(command, root, data, 4, screen, as_usual)) == 0
    check_study(folder, 4)
    assert "resuming trial" in screen.read_text()


def test_a_second_ctrl_c_ends_at_once(root: Path, data: Path, tmp_path: Path) -> None:
    folder = StudyFolder(root)

    def twice() -> None:
        with (tmp_path / "errors").open("wb") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # pytest's has no descriptor  # noqa: SIM115
        try:
            command(root, data, 2, tmp_path / "screen", held_for_ever)
        except KeyboardInterrupt:
            raise SystemExit(131) from None

    parent = start(twice)
    pids = {pid for _, pid in until(lambda: trained(folder))}
    os.kill(parent, signal.SIGINT)
    until(lambda: STOPPING in (tmp_path / "errors").read_text())
    os.kill(parent, signal.SIGINT)
    assert finish(parent) == 131
    assert all(map(is_over, pids))


def test_a_users_mistake_is_said_once_and_leaves_no_file(root: Path, data: Path, tmp_path: Path) -> None:
    screen = tmp_path / "screen"

    def mistaken(bench: Workbench) -> None:
        from trainer.errors import DataError

        raise DataError("these images cannot be used", "use others")

    assert finish(start(command, root, data, 2, screen, mistaken)) == 3
    assert screen.read_text().splitlines()[-2:] == ["these images cannot be used", "use others"]
    assert screen.read_text().count("cannot be used") == 1
    assert sorted(path.name for path in root.parents[1].iterdir()) == ["tiny.toml"]


def test_the_command_starts_itself_again_and_leaves_no_orphan(tmp_path: Path) -> None:
    words = [
        *("search", "both", "--base", "mini-sd15", "--device", "cpu", "--workers", "2", "--trials", "3"),
        *("--set", "max_train_steps=300", "--set", "sampling.steps=2", "--set", "prompts.seeds=[0]"),
        *("--set", "prompts.counts={ train-like = 3, altered = 3, class-only = 1 }"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "hpo.cli", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("worker 1: trial 0 (1/3)"):
                break
        folder = StudyFolder(tmp_path / "runs" / "both")
        ((trial, pid),) = until(lambda: trained(folder))
        (step,) = read_records(folder.root / "work.jsonl")
        assert step["event"] == "started" and step["words"] == words, "".join(said)
        process.kill()
    until(lambda: is_over(pid), 30)
    assert [row["event"] for row in read_records(trial.starts)] == ["start", "interrupted"]
    assert len(read_records(folder.root / "work.jsonl")) == 1
