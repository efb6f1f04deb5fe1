"""The whole chain on the miniature with the commands of the README: search on mini-sd15, transfer, target trials,
one run on mini-sdxl, evaluation of its checkpoints, comparison of both bases.

This is the full form: twelve trials, six target trials, the default prompts.  The small form, which is part of every
test run, goes from one ``next:`` line to the following (test_next_lines) and makes the same checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from tests.places import ROOT
from tests.tiny_search import check_study
from trainer.adapters.lorafile import read

TRIALS, TARGET_TRIALS = 12, 6


def hpo(place: Path, *words: str) -> str:
    """The output of a command, which must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if "PYTEST_XDIST_WORKER" not in os.environ:  # alone on the machine, as for a user
        environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", "from hpo.cli.main import main; main()", *words],
        cwd=place,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, f"hpo {' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def check_transfer(source: StudyFolder, trials: int, place: Path) -> Path:
    """The written settings, after a look at the plan, the target trials and what the settings mean."""
    settings = source.root / "transfer" / "mini-sdxl.toml"
    assert "res.native" in (source.root / "transfer" / "plan.md").read_text()
    target = StudyFolder(source.root.with_name(f"{source.root.name}__mini-sdxl"))
    assert len(target.trial_folders()) == trials
    dry = json.loads(hpo(place, "train", str(settings), "--dry-run", "--json"))
    assert dry["config"]["resolution"] == 128
    return settings


def check_run(output: Path) -> None:
    """The last LoRA of a run can be read, and the best one is an SDXL LoRA."""
    assert len(read(next(output.glob("*.safetensors"))).tensors) > 0
    assert read(output / "best.safetensors").metadata["ss_base_model_version"].startswith("sdxl")


@pytest.mark.slow
def test_a_search_becomes_an_evaluated_run_on_the_larger_base(tmp_path: Path) -> None:
    hpo(tmp_path, "dataset", "demo", "character", "luca")
    search = [
        "search",
        "--base",
        "mini-sd15",
        "--data",
        "luca",
        "chain",
        "--trials",
        str(TRIALS),
    ]
    hpo(tmp_path, *search)
    source = StudyFolder(tmp_path / "runs" / "chain")
    check_study(source, TRIALS)

    said = hpo(tmp_path, "transfer", "--to", "mini-sdxl", "chain", "--trials", str(TARGET_TRIALS))
    settings = check_transfer(source, TARGET_TRIALS, tmp_path)
    assert f"hpo train {settings.relative_to(tmp_path)}" in said
    said = hpo(tmp_path, "train", str(settings), "--set", "save_every_n_epochs=1")
    shown = next(line for line in said.splitlines() if line.startswith("next: hpo evaluate")).split()[-1]
    output = str(tmp_path / shown)

    hpo(tmp_path, "evaluate", output)
    check_run(Path(output))
    winner = max(
        (json.loads(folder.result.read_text()) for folder in source.trial_folders()), key=lambda r: r["value"]
    )
    said = hpo(tmp_path, "compare", str(source.trial(winner["number"]).root), output)
    assert "adapter effect" in said
