"""kill -9 and Ctrl-C during ``hpo confirm``: the same command resumes; nothing is lost or repeated."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.study.folder import StudyFolder, read_json
from hpo.terminal.live import PlainView
from tests.faults.zygote import attempt, die_at
from tests.tiny_confirm import check_confirmation, run_confirm, searched_study
from trainer.files import read_records

pytestmark = pytest.mark.faults
WORDS: dict[str, Any] = {"top": 1, "seeds": 1}
RUNS = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data: Path) -> StudyFolder:
    """An uninterrupted search with its confirmation.  Also loads all modules, so that forked processes share them."""
    source = searched_study(tmp_path_factory.mktemp("reference") / "study", data, trials=2)
    run_confirm(source, data, **WORDS)
    return source


@pytest.fixture
def source(tmp_path: Path, reference: StudyFolder) -> StudyFolder:
    """The search without its confirmation."""
    shutil.copytree(reference.root, tmp_path / "study")
    (tmp_path / "study" / "confirmed.json").unlink()
    return StudyFolder(tmp_path / "study")


def target_of(source: StudyFolder) -> StudyFolder:
    return StudyFolder(source.root.with_name("study__confirm"))


def confirm_killed_at(source: StudyFolder, data: Path, place: str, call: int, when: str) -> None:
    """Run the command in a process that kills itself before or after the n-th call of a function."""
    die_at(place, call, when)
    run_confirm(source, data, **WORDS)


SEAMS = [
    ("hpo.search.opening.create_study", 1, "after"),  # a study without a run
    ("hpo.confirm.proposals.suggested_run", 1, "before"),  # asked, its parameters not yet known
    ("hpo.search.worker.write_params", 2, "before"),
    ("hpo.search.trial.write_result", 2, "after"),  # the result is on disk, Optuna does not know
    ("hpo.confirm.run.write_outcome", 1, "before"),  # everything but the decision
]


@pytest.mark.parametrize(("place", "call", "when"), SEAMS)
def test_a_kill_at_any_seam_changes_nothing_of_the_confirmation(
    reference: StudyFolder, source: StudyFolder, data: Path, place: str, call: int, when: str
) -> None:
    assert attempt(confirm_killed_at, source, data, place, call, when) == -signal.SIGKILL
    assert not source.confirmed.exists()
    assert attempt(finish, source, data) == 0
    assert check_confirmation(target_of(source), RUNS) == check_confirmation(target_of(reference), RUNS)
    again, before = read_json(source.confirmed), read_json(reference.confirmed)
    assert again is not None and before is not None
    assert {k: again[k] for k in DECIDED} == {k: before[k] for k in DECIDED}


DECIDED = ("winner", "config", "score", "interval", "trial0", "ties", "beats_trial0", "shrinkage")


def finish(source: StudyFolder, data: Path, change: Callable[[PlainView], None] = lambda view: None) -> None:
    run_confirm(source, data, change, **WORDS)


def test_a_kill_while_training_or_drawing_goes_on_with_the_same_run(
    reference: StudyFolder, source: StudyFolder, data: Path
) -> None:
    def dying(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_training(view: PlainView) -> None:
        view.on_event = dying  # type: ignore[method-assign]

    def in_drawing(view: PlainView) -> None:
        view.on_image = lambda done, total: dying() if done else None  # type: ignore[method-assign]

    assert attempt(finish, source, data, in_training) == -signal.SIGKILL
    assert attempt(finish, source, data, in_drawing) == -signal.SIGKILL
    assert attempt(finish, source, data) == 0
    target = target_of(source)
    assert check_confirmation(target, RUNS) == check_confirmation(target_of(reference), RUNS)
    events = [row["event"] for row in read_records(target.trial(0).starts)]
    assert events == ["start", "start", "start"]
