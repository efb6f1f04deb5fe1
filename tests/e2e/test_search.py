"""The main job as a user runs it, in processes of its own: killed, stopped, gone on with, looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.folder import StudyFolder, open_study, read_json
from tests.tiny_search import check_study
from trainer.files import read_records
from trainer.lorafile import read

COMMAND = [
    sys.executable, "-u", "-m", "hpo.cli", "search", "--base", "mini-sd15", "--trials", "3", "--name", "e2e",
    "--set", "max_train_steps=6", "--set", "sampling.steps=4", "--set", "prompts.seeds=[0]",
]  # fmt: skip
SECONDS = 300


def run_until(line: str, number: int, here: Path) -> tuple[int, str]:
    """The command, sent a signal as soon as it prints a line that begins so: its exit code and all it said."""
    process = subprocess.Popen(COMMAND, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    assert process.stdout is not None
    for text in process.stdout:
        said.append(text)
        if text.startswith(line):
            os.kill(process.pid, number)
    return process.wait(timeout=SECONDS), "".join(said)


def run(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpo.cli", *words] if words else COMMAND
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


def test_a_search_that_is_killed_and_stopped_is_finished_by_the_same_command(place: Path) -> None:
    code, said = run_until("trial 1 (2 of 3)", signal.SIGKILL, place)
    assert code == -signal.SIGKILL and "trial=0 state=complete score=" in said
    assert "cost: 3 trials" in said and "trials per dimension" in said
    code, said = run_until("trial 1 (2 of 3), taken up again", signal.SIGINT, place)
    assert code == 130, said
    assert "stopping after this step" in said and "go on with the same command" in said
    done = run(place)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = StudyFolder(place / "runs" / "e2e")
    check_study(folder, 3)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("study=e2e complete=3/3 infeasible=0 failed=0 best=")


def test_the_same_command_on_a_finished_study_adds_nothing(place: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (place / "runs" / "e2e").glob("trial_*/*")}
    again = run(place)
    assert again.returncode == 0 and "3 trials are done" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (place / "runs" / "e2e").glob("trial_*/*")}


def test_a_changed_study_is_refused(place: Path) -> None:
    refused = run(place, *COMMAND[4:], "--set", "noise_offset=0.1")
    assert refused.returncode == 2
    assert "noise_offset: was 0.0, is now 0.1" in refused.stderr and "--name" in refused.stderr


def test_every_trial_left_its_settings_its_lora_its_log_its_images_and_its_figures(place: Path) -> None:
    folder = StudyFolder(place / "runs" / "e2e")
    for trial in open_study(folder).get_trials(deepcopy=False):
        files = folder.trial(trial.number)
        params, metrics = read_json(files.params), read_json(files.metrics)
        assert params is not None and metrics is not None
        file = read(files.lora)
        assert file.family == "sd15" and file.metadata["ss_network_dim"] == str(
            params["train"]["network_dim"]
        )
        steps = [row["step"] for row in read_records(files.steps) if row["event"] == "step"]
        assert steps == list(range(1, 7))
        assert metrics["value"] == trial.value and len(metrics["per_image"]) == 16
        assert len(list((files.root / "samples").glob("*.png"))) == 16
        assert files.grid.is_file() and files.log.is_file()


def test_status_tells_the_same_from_another_terminal(place: Path) -> None:
    shown = run(place, "status")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[-1].startswith("study=e2e complete=3/3")
