"""kill -9 during the target trials of ``hpo transfer``: the same command resumes with the same trials."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder, read_json
from tests.faults.zygote import attempt, die_at
from tests.tiny_target import run_transfer, searched_source, target_of, target_trials

pytestmark = pytest.mark.faults
TRIALS = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data: Path) -> StudyFolder:
    """An uninterrupted search with its target trials.  Also loads all modules, so that forked processes share them."""
    source = searched_source(tmp_path_factory.mktemp("reference") / "s", data)
    run_transfer(source, data, TRIALS)
    return source


@pytest.fixture
def source(tmp_path: Path, reference: StudyFolder) -> StudyFolder:
    """The search without its target trials."""
    shutil.copytree(reference.root, tmp_path / "s", ignore=shutil.ignore_patterns("transfer"))
    return StudyFolder(tmp_path / "s")


def killed_at(source: StudyFolder, data: Path, place: str, call: int, when: str) -> None:
    """Run the command in a process that kills itself before or after the n-th call of a function."""
    die_at(place, call, when)
    run_transfer(source, data, TRIALS)


SEAMS = [
    ("hpo.transfer.probes.prior.Prior.save", 1, "after"),  # what is known of the search, no trial
    ("hpo.transfer.probes.guided.Guide._proposed", 1, "before"),  # two trials are finished
    ("hpo.search.claim.Claims._claim", 3, "before"),  # the proposal is stored and enqueued, nobody has it
    ("hpo.search.trial.write_result", 3, "after"),  # the result is on disk, Optuna does not know
    ("hpo.transfer.probes.run.write_saved", 1, "before"),  # everything but the decision
]


@pytest.mark.parametrize(("place", "call", "when"), SEAMS)
def test_a_kill_at_any_seam_changes_no_target_trial(
    reference: StudyFolder, source: StudyFolder, data: Path, place: str, call: int, when: str
) -> None:
    assert attempt(killed_at, source, data, place, call, when) == -signal.SIGKILL
    assert not (target_of(source).root / "probes.json").exists()
    assert attempt(run_transfer, source, data, TRIALS) == 0
    assert target_trials(source) == target_trials(reference)
    again, before = (read_json(target_of(folder).root / "probes.json") for folder in (source, reference))
    assert again is not None and before is not None
    assert {k: v for k, v in again.items() if k != "lines"} == {
        k: v for k, v in before.items() if k != "lines"
    }
