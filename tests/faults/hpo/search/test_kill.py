"""kill -9, Ctrl-C and SIGTERM at every seam of a search: nothing lost, nothing doubled, nothing left RUNNING."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.search.sampled import SearchLimits
from hpo.study.folder import StudyFolder, read_json
from hpo.study.storage import open_study
from hpo.terminal.stop import Stop
from tests.faults.zygote import attempt, die_at
from tests.tiny_search import Recorder, check_study, make_search, table, tiny_bench, tiny_study
from trainer.errors import Interrupted
from trainer.events import Step
from trainer.files import read_records

pytestmark = pytest.mark.faults
TRIALS = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data: Path) -> StudyFolder:
    """The same study, never interrupted.  It also loads everything that the forks then share."""
    bench = tiny_bench(tmp_path_factory.mktemp("reference") / "study", data)
    make_search(bench, SearchLimits(TRIALS)).run()
    check_study(bench.folder, TRIALS)
    return bench.folder


def search(root: Path, data: Path, change: Callable[[Recorder], None] = lambda view: None) -> None:
    view = Recorder()
    change(view)
    make_search(tiny_bench(root, data), SearchLimits(TRIALS), view).run()


def search_killed_at(root: Path, data: Path, place: str, call: int, when: str) -> None:
    """The search in a process that kills itself before or after the n-th call of a function."""
    die_at(place, call, when)
    search(root, data)


SEAMS = [
    ("hpo.study.storage.open_storage", 1, "after"),  # a database without a study
    ("tests.tiny_search.create_study", 1, "after"),  # a study without a single trial
    ("hpo.search.sampled.suggest", 1, "before"),  # the baseline is RUNNING, nothing proposed yet
    ("hpo.search.sampled.suggest", 2, "after"),  # proposed, the lock not yet taken
    ("hpo.search.worker.write_params", 2, "after"),
    ("trainer.adapters.lorafile.write", 2, "before"),  # trained, nothing saved
    ("trainer.adapters.lorafile.write", 2, "after"),
    ("hpo.search.trial.write_result", 2, "before"),  # scored, no result yet
    ("hpo.search.trial.write_result", 2, "after"),  # the result is on disk, Optuna does not know
    ("hpo.search.dashboard.upload_grid", 2, "after"),  # in the middle of telling
    ("hpo.search.worker.Worker.tell", 2, "after"),  # told, the lock still held
]


@pytest.mark.parametrize(("place", "call", "when"), SEAMS)
def test_a_kill_at_any_seam_changes_nothing_of_the_study(
    reference: StudyFolder, tmp_path: Path, data: Path, place: str, call: int, when: str
) -> None:
    """A4 · weight 3 · A search is killed between any two of its actions: asked, proposed, trained, scored,
    written, told → No trial stays RUNNING or is told twice. The next call takes it up under its number, and its
    LoRA is the same.
    """
    root = tmp_path / "study"
    assert attempt(search_killed_at, root, data, place, call, when) == -signal.SIGKILL
    assert attempt(search, root, data) == 0
    folder = StudyFolder(root)
    check_study(folder, TRIALS)
    assert table(folder) == table(reference)
    for number in range(TRIALS):
        again, before = read_json(folder.trial(number).result), read_json(reference.trial(number).result)
        assert again is not None and before is not None
        assert again["lora_sha256"] == before["lora_sha256"]


RECOVERY = [
    ("trainer.adapters.lorafile.write", 2, "before"),  # the first kill: trial 1 is trained, nothing is saved
    ("hpo.search.worker.sweep_tree", 1, "after"),  # what is incomplete was removed
    ("hpo.search.claim.take_up", 1, "after"),  # trial 1 was found, its lock is not taken
    ("hpo.search.claim.sweep_tree", 1, "after"),  # its lock is taken, its folder swept
    ("hpo.search.trial.write_result", 1, "after"),  # trained once more, the result is on disk
    ("hpo.search.claim.take_up", 1, "after"),  # the result was found
    ("hpo.search.dashboard.upload_grid", 1, "after"),  # in the middle of telling what was found
]


def test_kills_while_a_kill_is_recovered_from_change_nothing_of_the_study(
    reference: StudyFolder, tmp_path: Path, data: Path
) -> None:
    """A7 · weight 5 · A search is killed while it recovers from a kill, again and again → The next call recovers, the
    trial is told once under its number, and its LoRA is the same.
    """
    folder = StudyFolder(tmp_path / "study")
    for place, call, when in RECOVERY:
        assert attempt(search_killed_at, folder.root, data, place, call, when) == -signal.SIGKILL, place
    assert attempt(search, folder.root, data) == 0
    check_study(folder, TRIALS)
    assert table(folder) == table(reference)
    again, before = read_json(folder.trial(1).result), read_json(reference.trial(1).result)
    assert again is not None and before is not None and again["lora_sha256"] == before["lora_sha256"]


def test_a_kill_while_training_or_drawing_goes_on_with_the_same_trial(
    reference: StudyFolder, tmp_path: Path, data: Path
) -> None:
    """A8 · weight 3 · A kill while the images of a trial are drawn → Only the missing images are drawn, and the
    score is that of an undisturbed trial.
    """
    root = tmp_path / "study"

    def kill_in_training(view: Recorder) -> None:
        view.event_hook = lambda event: os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_drawing(view: Recorder) -> None:
        view.image_hook = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done else None

    assert attempt(search, root, data, kill_in_training) == -signal.SIGKILL
    assert attempt(search, root, data, kill_in_drawing) == -signal.SIGKILL
    assert attempt(search, root, data) == 0
    check_study(StudyFolder(root), TRIALS)
    assert table(StudyFolder(root)) == table(reference)
    events = [row["event"] for row in read_records(StudyFolder(root).trial(0).starts)]
    assert events == ["start", "start", "start"]


def interrupted(root: Path, data: Path, number: int, times: int) -> None:
    """The search as the command runs it, with a real signal after the first step; exits as the command does."""
    view = Recorder()
    bench = tiny_bench(root, data)
    worker = make_search(bench, SearchLimits(TRIALS), view)
    with Stop(lambda: view.lines.append("stopping")) as stop:
        view.should_stop = stop  # type: ignore[method-assign]

        def send(event: Any) -> None:
            if isinstance(event, Step) and event.step == 1:
                for _ in range(times):
                    os.kill(os.getpid(), number)

        view.event_hook = send
        try:
            worker.run()
        except Interrupted:
            raise SystemExit(130) from None
        except KeyboardInterrupt:
            raise SystemExit(131) from None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_step_and_the_next_call_goes_on_from_it(
    reference: StudyFolder, tmp_path: Path, data: Path, number: int
) -> None:
    root = tmp_path / "study"
    assert attempt(interrupted, root, data, number, 1) == 130
    folder = StudyFolder(root)
    (trial,) = open_study(folder).get_trials(deepcopy=False)
    assert trial.state.name == "RUNNING"
    assert [p.name for p in folder.trial(0).checkpoints.iterdir()] == ["step-000001"]
    assert attempt(search, root, data) == 0
    check_study(folder, TRIALS)
    assert table(folder) == table(reference)
    steps = [row["step"] for row in read_records(folder.trial(0).steps) if row["event"] == "step"]
    assert steps == sorted(set(steps))


def test_a_second_ctrl_c_ends_at_once_and_still_nothing_is_lost(
    reference: StudyFolder, tmp_path: Path, data: Path
) -> None:
    root = tmp_path / "study"
    assert attempt(interrupted, root, data, signal.SIGINT, 2) == 131
    assert attempt(search, root, data) == 0
    assert table(StudyFolder(root)) == table(reference)


def test_a_trial_that_keeps_killing_its_process_is_given_up(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "study"

    def kill_trial_1(view: Recorder) -> None:
        view.event_hook = lambda e: os.kill(os.getpid(), signal.SIGKILL) if view.started[-1][0] == 1 else None

    deaths = [attempt(search, root, data, kill_trial_1) for _ in range(4)]
    assert deaths == [-signal.SIGKILL] * 3 + [0]
    trials = open_study(StudyFolder(root)).get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "process_died"


LOOKING = [
    ("evaluation.score.looking.look", 1, "after"),  # drawn, nothing written
    ("hpo.search.looks.Looks._report", 1, "after"),  # Optuna knows, the file does not
    ("hpo.search.looks.append_line", 1, "after"),  # both know, the trial goes on
]


def search_with_looks(root: Path, data: Path, *dies: Any) -> None:
    if dies:
        die_at(*dies)
    changes = {
        "search": {"pruner": "median", "looks": [0.3, 0.6]},
        "space": {"max_train_epochs": {"low": 3, "high": 4}},
        "baseline": {"max_train_epochs": 3},
    }
    bench = tiny_bench(root, data, tiny_study(changes))
    make_search(bench, SearchLimits(TRIALS)).run()


@pytest.mark.parametrize(("place", "call", "when"), LOOKING)
def test_a_kill_at_a_look_repeats_none_that_was_finished(
    tmp_path: Path, data: Path, place: str, call: int, when: str
) -> None:
    for root, dies in ((tmp_path / "whole", ()), (tmp_path / "killed", (place, call, when))):
        if dies:
            assert attempt(search_with_looks, root, data, *dies) == -signal.SIGKILL
        assert attempt(search_with_looks, root, data) == 0
        check_study(StudyFolder(root), TRIALS)
    found = []
    for name in ("whole", "killed"):
        folder = StudyFolder(tmp_path / name)
        rows = list(read_records(folder.trial(1).looks))
        assert [row["percent"] for row in rows] == [30, 60]
        [trial] = open_study(folder).get_trials(deepcopy=False)[1:]
        assert trial.intermediate_values == {row["percent"]: row["value"] for row in rows}
        found.append(trial.intermediate_values)
    assert found[0] == found[1] and table(StudyFolder(tmp_path / "whole")) == table(folder)
