"""The main job as a user runs it: real processes, the shipped miniature, a real optuna-dashboard server."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.places import ROOT

HPO = [sys.executable, "-c", "from hpo.cli.main import main; main()"]
SHORT = ["--set", "max_train_steps=4", "--set", "sampling.steps=2"]


def environment() -> dict[str, str]:
    root = str(ROOT)
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def hpo(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [*HPO, *words], capture_output=True, text=True, check=False, cwd=folder, env=environment()
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A study of two very short trials, and what was printed."""
    folder = tmp_path_factory.mktemp("search")
    return folder, hpo(folder, "search", "--base", "mini-sd15", "--trials", "2", "e2e", *SHORT)


def test_each_trial_leaves_its_settings_lora_log_samples_and_result(finished):
    folder, printed = finished
    for number in (0, 1):
        trial = folder / "runs" / "e2e" / f"trial_{number:04d}"
        result = json.loads((trial / "result.json").read_text())
        assert result["state"] in ("complete", "infeasible")
        assert json.loads((trial / "params.json").read_text())["trial"] == number
        for name in (
            f"lora_trial_{number}.safetensors",
            "train.jsonl",
            "log.txt",
            "grid.png",
            "metrics.json",
        ):
            assert (trial / name).is_file(), name
        assert len(list((trial / "samples").glob("*.png"))) == 15 * 2 + 8  # the class-only prompt has 8 seeds
    assert printed.splitlines()[-1].startswith("study=e2e complete=2/2")


def test_the_same_command_again_repeats_nothing(finished):
    folder, _ = finished
    results = [folder / "runs" / "e2e" / f"trial_{n:04d}" / "result.json" for n in (0, 1)]
    before = [path.stat().st_mtime_ns for path in results]
    printed = hpo(folder, "search", "--base", "mini-sd15", "--trials", "2", "e2e", *SHORT)
    assert "study=e2e complete=2/2" in printed
    assert [path.stat().st_mtime_ns for path in results] == before
    assert not (folder / "runs" / "e2e" / "trial_0002").exists()


def test_status_shows_the_trials_from_another_process(finished):
    printed = hpo(finished[0], "status", "e2e")
    assert "study=e2e complete=2/2" in printed


def test_the_dashboard_serves_each_trials_grid(finished):
    server = subprocess.Popen(
        [*HPO, "dashboard", "e2e", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=finished[0],
        env=environment(),
    )
    try:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert found
        with urllib.request.urlopen(f"{found[0]}/api/studies/1", timeout=60) as answer:
            study = json.load(answer)
        assert len(study["trials"]) == 2
        for trial in study["trials"]:
            (artifact,) = trial["artifacts"]
            address = f"{found[0]}/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}"
            with urllib.request.urlopen(address, timeout=60) as image:
                assert image.headers["Content-Type"] == "image/png"
                assert image.read(8) == b"\x89PNG\r\n\x1a\n"
    finally:
        server.terminate()
        server.wait(timeout=30)
