"""kill -9 inside of SQLite: at every call of the system that a trial's commits make, and those of the recovery."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from hpo.study.folder import StudyFolder
from hpo.study.storage import open_storage
from tests.faults.strace import count_calls, traced
from tests.faults.zygote import attempt

pytestmark = pytest.mark.faults
WRITES = ("pwrite64", "fdatasync", "fsync", "ftruncate", "unlink")  # what SQLite changes files with
SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
KEPT = (TrialState.COMPLETE, {"x": 0.75}, {1: 0.75}, 0.75)  # the trial that was told before


def facts(
    trial: optuna.trial.FrozenTrial,
) -> tuple[TrialState, dict[str, float], dict[int, float], float | None]:
    return trial.state, trial.params, trial.intermediate_values, trial.value


def new_study(root: Path) -> None:
    """A study with a trial that was told."""
    root.mkdir()
    storage = open_storage(StudyFolder(root))
    study = optuna.create_study(study_name="tiny", storage=storage)
    study.add_trial(
        optuna.create_trial(
            params={"x": 0.75}, distributions=SPACE, value=0.75, intermediate_values={1: 0.75}
        )
    )
    storage.engine.dispose()


def run_trial(study: optuna.Study) -> None:
    """Claim, propose, report, tell: of the trial that is RUNNING, else of a new one."""
    left = [trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()]
    trial = optuna.trial.Trial(study, left[0]._trial_id) if left else study.ask()
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.report(x, 1)
    study.tell(trial, x)


def work(root: Path) -> Callable[[], None]:
    """A command that has opened the database: what runs one trial and closes it."""
    storage = open_storage(StudyFolder(root))
    study = optuna.load_study(study_name="tiny", storage=storage)

    def run() -> None:
        run_trial(study)
        storage.engine.dispose()

    return run


def finish_trial(root: Path, states: str) -> None:
    """Whatever happened, the database is whole, and the second trial is absent, RUNNING or finished, never between.
    What is open is finished then, as the next command would."""
    connection = sqlite3.connect(root / "study.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    study = optuna.load_study(study_name="tiny", storage=open_storage(StudyFolder(root)))
    first, *rest = study.get_trials()
    assert facts(first) == KEPT and len(rest) <= 1
    for trial in rest:
        state, params, reported, value = facts(trial)
        assert state in (TrialState.RUNNING, TrialState.COMPLETE)
        assert list(params) in ([], ["x"]) and list(reported) in ([], [1])
        assert set(reported.values()) <= set(params.values())
        assert value == (params["x"] if state is TrialState.COMPLETE else None)
    if not rest or rest[0].state is TrialState.RUNNING:
        run_trial(study)
    with open(states, "a") as file:
        file.write(f"{rest[0].state.name if rest else 'absent'}\n")
    first, second = study.get_trials()
    assert facts(first) == KEPT and second.state is TrialState.COMPLETE


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("before") / "study"
    new_study(root)  # in this process, which forks with everything imported
    assert attempt(finish_trial, Path(shutil.copytree(root, root.with_name("warm"))), os.devnull) == 0
    return root


def ladder(
    before: Path, place: Path, work: Callable[[Path], Callable[[], None]] = work
) -> list[tuple[Path, str]]:
    """``work`` on copies of a study, killed at each of its writes: the copies, and at which call."""
    shutil.copytree(before, place / "whole")
    calls = count_calls(WRITES, place / "log", work, place / "whole")
    found = []
    for name, count in calls.items():
        for number in range(1, count + 1):
            root = place / f"{name}-{number}"
            shutil.copytree(before, root)
            code = traced(WRITES, work, root, kill_at=(name, number))
            assert code == -signal.SIGKILL, (name, number, code)
            found.append((root, name))
    return found


def test_a_kill_at_any_write_of_a_commit_leaves_a_trial_whole(before: Path, tmp_path: Path) -> None:
    """A3 · weight 5 · A kill while SQLite commits a claim, a step or a result, at any call of the system that writes
    → The database is whole. The trial is absent, open or finished, never between, and the next call finishes it.
    """
    states = str(tmp_path / "states")
    killed = ladder(before, tmp_path)
    assert len(killed) >= 15 and {name for _, name in killed} >= {"pwrite64", "fdatasync"}
    for root, _ in killed:
        assert attempt(finish_trial, root, states) == 0, root
    assert set(Path(states).read_text().split()) == {"absent", "RUNNING", "COMPLETE"}


def recover(root: Path) -> Callable[[], None]:
    """What SQLite does at the first look into a database whose process was killed, and when it is closed then."""

    def run() -> None:
        connection = sqlite3.connect(root / "study.db")
        connection.execute("SELECT count(*) FROM trials").fetchone()
        connection.execute("PRAGMA wal_checkpoint")
        connection.close()

    return run


def test_a_kill_at_any_write_of_sqlites_recovery_changes_nothing(before: Path, tmp_path: Path) -> None:
    """The recovery of a process that was killed when all was committed, and nothing was in the main file."""
    left, states = tmp_path / "left", str(tmp_path / "states")
    shutil.copytree(before, left)
    shutil.copytree(before, tmp_path / "first")
    calls = count_calls(WRITES, tmp_path / "log", work, tmp_path / "first")
    assert traced(WRITES, work, left, kill_at=("unlink", calls["unlink"])) == -signal.SIGKILL
    assert (left / "study.db-wal").stat().st_size > 0
    killed = ladder(left, tmp_path / "again", recover)
    assert len(killed) >= 3
    for root, _ in killed:
        assert attempt(finish_trial, root, states) == 0, root
    assert set(Path(states).read_text().split()) == {"COMPLETE"}
