"""The command itself, in a process of its own on the shipped miniature: kill -9, then Ctrl-C, then to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from tests.places import ROOT
from tests.tiny_search import check_study

pytestmark = pytest.mark.faults
COMMAND = [
    sys.executable, "-u", "-c", "from hpo.cli.main import main; main()", "search", "--base", "mini-sd15",
    "--trials", "3", "killed", "--set", "max_train_steps=6", "--set", "sampling.steps=4",
    "--set", "prompts.seeds=[0]", "--set", "prompts.counts={ train-like = 3, altered = 3, class-only = 1 }",
]  # fmt: skip


RESUME = [*COMMAND[: COMMAND.index("search")], "resume"]


def run_until(line: str, number: int, here: Path, command: list[str] = COMMAND) -> tuple[int, str]:
    """The command, sent a signal once it prints a line that begins so: its exit code and all it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    said = []
    assert process.stdout is not None
    for text in process.stdout:
        said.append(text)
        if line and text.startswith(line):
            os.kill(process.pid, number)
    return process.wait(timeout=60), "".join(said)


def test_a_search_that_is_killed_and_then_stopped_is_finished_by_resume(tmp_path: Path) -> None:
    code, said = run_until("trial 1 (2/3)", signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL and "trial=0 state=complete score=" in said
    assert "cost: 3 trials" in said and "trials for each searched setting" in said
    code, said = run_until("trial 1 (2/3), resumed", signal.SIGINT, tmp_path)
    assert code == 130, said
    assert said.count("trial 1 (2/3), resumed") == 1  # nothing is printed twice by the handler
    assert "stopping after this step" in said and "next: hpo resume killed" in said
    code, said = run_until("", 0, tmp_path, RESUME)
    assert code == 0, said
    assert "resuming: hpo search --base mini-sd15" in said and "resuming trial 1: from " in said
    assert said.splitlines()[-1].startswith("study=killed complete=3/3 infeasible=0 failed=0 best=")
    check_study(StudyFolder(tmp_path / "runs" / "killed"), 3)
