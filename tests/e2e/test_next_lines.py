"""Every command's ``next:`` line is run as it stands, from ``hpo dataset prepare`` to ``hpo compare``.

Flags that make the steps short are added to some of them, and one target trial; nothing else is.  Two studies lie
side by side, so a command that is not told its study cannot guess it.  This is also the chain's small form: the files
of each step are looked at (test_chain has the full one).
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from hpo.study.folder import StudyFolder
from tests.e2e.test_chain import check_run, check_transfer, hpo
from tests.tiny_search import check_study

TRIALS, TARGET_TRIALS = 2, 3
SETS = (
    "prompts.counts={ train-like = 3, altered = 3, class-only = 1 }",
    "confirmation.counts={ train-like = 2, altered = 2, class-only = 1 }",
    "prompts.seeds=[0]",
    "confirmation.seeds=[1000]",
    "sampling.steps=8",
    "max_train_epochs=1",
)

SHORT = {
    "search": ["--trials", str(TRIALS), *(word for text in SETS for word in ("--set", text))],
    "confirm": ["--top", "1", "--seeds", "1", "--yes"],
    "transfer": ["--trials", str(TARGET_TRIALS)],
    "train": ["--set", "save_every_n_epochs=1", "--set", "max_train_epochs=2"],
}


def following(said: str) -> list[str]:
    """The words of the last ``next:`` line; empty if there is none."""
    lines = [line for line in said.splitlines() if line.startswith("next: ")]
    return shlex.split(lines[-1].removeprefix("next: ")) if lines else []


def test_the_next_lines_lead_from_a_folder_of_images_to_the_comparison(tmp_path: Path) -> None:
    hpo(tmp_path, "dataset", "demo", "character", "demo")
    (source,) = (path for path in (tmp_path / "demo").iterdir() if path.is_dir() and path.name != "held_out")
    shutil.copytree(source, tmp_path / "my photos")
    said = hpo(tmp_path, "dataset", "prepare", "my photos", "a set", "--trigger", "luca", "--class", "figure",
               "--held-out", "4")  # fmt: skip
    words = following(said)
    assert words[:3] == ["hpo", "dataset", "check"]
    done = ["prepare"]
    words += ["--for", "mini-sd15"]  # the default is sd15, whose weights are a download
    while words:
        step = words[2] if words[1] == "dataset" else words[1]
        done.append(step)
        assert len(done) < 10, done
        if step == "search":
            said = hpo(tmp_path, *words[1:], *SHORT["search"], "--definition", "mini")
            root = next((tmp_path / "runs").iterdir())
            check_study(StudyFolder(root), TRIALS)
            shutil.copytree(root, root.with_name("another"))  # both were worked on today
        else:
            said = hpo(tmp_path, *words[1:], *SHORT.get(step, ()))
        if step == "transfer":
            check_transfer(StudyFolder(root), TARGET_TRIALS, tmp_path)
        if step == "evaluate":
            check_run(tmp_path / words[2])
        words = following(said)
    assert "adapter effect" in said
    assert done == ["prepare", "check", "search", "confirm", "transfer", "train", "evaluate", "compare"]
