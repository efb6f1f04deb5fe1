"""The whole chain on the miniature with the commands of the README: search on mini-sd15, transfer, probes,
one run on mini-sdxl, evaluation of its checkpoints, comparison of both bases.

The small form is part of every test run.  The full form (twelve trials, six probes, default prompts) is
``slow`` and uses the same code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from tests.places import ROOT
from tests.tiny_search import check_study
from trainer.adapters.lorafile import read


@dataclass(frozen=True)
class Form:
    """The size of a chain."""

    trials: int
    probes: int
    sets: tuple[str, ...] = ()


SMALL = Form(
    trials=2,
    probes=3,
    sets=(
        "prompts.counts={ train-like = 3, altered = 3, class-only = 1 }",
        "confirmation.counts={ train-like = 2, altered = 2, class-only = 1 }",
        "prompts.seeds=[0]",
        "confirmation.seeds=[1000]",
        "sampling.steps=8",
        "max_train_epochs=1",
    ),
)
FULL = Form(trials=12, probes=6)


def hpo(place: Path, *words: str) -> str:
    """The output of a command, which must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # the chain runs alone on the machine, as for a user
    done = subprocess.run(
        [sys.executable, "-c", "from hpo.cli.main import main; main()", *words],
        cwd=place,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, f"hpo {' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def sets(form: Form) -> list[str]:
    return [word for text in form.sets for word in ("--set", text)]


@pytest.mark.parametrize(
    "form", [pytest.param(SMALL, id="small"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
)
def test_a_search_becomes_an_evaluated_run_on_the_larger_base(form: Form, tmp_path: Path) -> None:
    hpo(tmp_path, "dataset", "demo", "character", "luca")
    search = [
        "search",
        "--base",
        "mini-sd15",
        "--data",
        "luca",
        "chain",
        "--trials",
        str(form.trials),
    ]
    hpo(tmp_path, *search, *sets(form))
    source = StudyFolder(tmp_path / "runs" / "chain")
    check_study(source, form.trials)

    said = hpo(tmp_path, "transfer", "--to", "mini-sdxl", "chain", "--trials", str(form.probes))
    settings = source.root / "transfer" / "mini-sdxl.toml"
    assert f"hpo train {settings.relative_to(tmp_path)}" in said
    assert "res.native" in (source.root / "transfer" / "plan.md").read_text()
    target = StudyFolder(tmp_path / "runs" / "chain__mini-sdxl")
    assert len(target.trial_folders()) == form.probes

    dry = json.loads(hpo(tmp_path, "train", str(settings), "--dry-run", "--json"))
    assert dry["config"]["resolution"] == 128
    said = hpo(tmp_path, "train", str(settings), "--set", "save_every_n_epochs=1")
    shown = next(line for line in said.splitlines() if line.startswith("next: hpo evaluate")).split()[-1]
    output = str(tmp_path / shown)
    lora = next(Path(output).glob("chain*.safetensors"))
    assert len(read(lora).tensors) > 0

    hpo(tmp_path, "evaluate", output)
    best = Path(output) / "best.safetensors"
    assert read(best).metadata["ss_base_model_version"].startswith("sdxl")
    winner = max(
        (json.loads(folder.result.read_text()) for folder in source.trial_folders()), key=lambda r: r["value"]
    )
    said = hpo(tmp_path, "compare", str(source.trial(winner["number"]).root), output)
    assert "adapter effect" in said
