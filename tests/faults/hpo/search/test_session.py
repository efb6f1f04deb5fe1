"""The command around a search: what it takes back, what it goes on with, and troubles that are named."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpo.search.claim
import hpo.search.session
import hpo.search.worker
import hpo.study.storage
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench
from hpo.study.folder import STOP, StudyFolder
from hpo.study.storage import begun_study, open_study
from tests.faults.zygote import attempt, die_at, finish, start
from tests.tiny_search import Recorder, check_study, make_search, tiny_bench
from tests.tiny_session import run_session
from trainer.errors import ConfigError, DataError, MachineError, StudyStopped, ToolError

pytestmark = pytest.mark.faults


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "runs" / "study"


def fail(error: Exception) -> Callable[[Any], None]:
    def raising(bench: Workbench) -> None:
        bench.folder.artifacts.mkdir(parents=True)
        raise error

    return raising


def nothing_left(root: Path) -> bool:
    return sorted(p.name for p in root.parents[1].iterdir()) == ["tiny.toml"]


# What a failing call takes back


@pytest.mark.parametrize("error", [DataError("bad"), MachineError("no luck"), ZeroDivisionError("a bug")])
def test_an_error_while_loading_leaves_no_file(root: Path, data: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_session(root, data, loaded=fail(error))
    assert nothing_left(root)


def test_an_error_after_the_study_was_made_leaves_no_file_nor_its_definition(
    root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise MachineError("the disk is full")

    monkeypatch.setattr("hpo.search.cost.check_disk", no_room)
    with pytest.raises(MachineError, match="disk is full"):
        run_session(root, data)
    assert nothing_left(root)
    root.mkdir(parents=True)  # a folder of the user's own stays, and what was in it
    (root / "mine.txt").touch()
    with pytest.raises(MachineError, match="disk is full"):
        run_session(root, data)
    assert [p.name for p in root.iterdir()] == ["mine.txt"]


def test_anchors_that_cannot_be_told_apart_end_a_fresh_search_and_warn_one_that_has_begun(
    root: Path, data: Path
) -> None:
    with pytest.raises(DataError, match="scores would be meaningless") as refused:
        run_session(root, data, guarded=True)
    assert "±" in refused.value.message and "use more" in (refused.value.hint or "")
    assert nothing_left(root)
    assert "warning:" in run_session(root, data)
    assert "warning: the scorer cannot tell" in run_session(root, data, trials=2, guarded=True)


def test_a_failing_call_leaves_alone_what_another_worker_made_meanwhile(root: Path, data: Path) -> None:
    def other_worker_first(bench: Workbench) -> None:
        assert attempt(run_session, root, data) == 0
        raise DataError("bad")

    with pytest.raises(DataError):
        run_session(root, data, loaded=other_worker_first)
    check_study(StudyFolder(root), 1)


def test_a_failing_call_leaves_its_study_to_a_worker_that_has_joined(
    root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, there = os.pipe(), os.pipe()
    other: list[int] = []
    cost_line = hpo.search.session._cost_line

    def wait(bench: Workbench) -> None:
        os.write(there[1], b"x")
        os.read(go[0], 1)

    def join() -> None:
        hpo.search.session._cost_line = cost_line
        run_session(root, data, 1, wait)

    def joined(*_: Any) -> None:
        other.append(start(join))
        os.read(there[0], 1)
        raise MachineError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("hpo.search.session._cost_line", joined)
        with pytest.raises(MachineError, match="disk is full"):
            run_session(root, data)
    assert begun_study(StudyFolder(root)) is not None
    os.write(go[1], b"x")
    assert finish(other[0]) == 0
    check_study(StudyFolder(root), 1)


# Kills before the first trial


def killed_after(place: str, root: Path, data: Path) -> None:
    die_at(f"hpo.{place}")
    run_session(root, data)


@pytest.mark.parametrize(
    "place",
    [
        "study.storage._write_ahead",
        "study.storage.open_storage",
        "search.opening.create_study",
        "search.session.opened",
    ],
)
def test_a_kill_before_the_study_has_begun_does_not_block_its_name(
    root: Path, data: Path, place: str
) -> None:
    assert attempt(killed_after, place, root, data) == -signal.SIGKILL
    assert StudyFolder(root).database.is_file()
    assert "study=study complete=1/1" in run_session(root, data)
    check_study(StudyFolder(root), 1)


def test_a_deleted_study_is_not_begun_anew_over_its_trials(root: Path, data: Path) -> None:
    run_session(root, data)
    folder = StudyFolder(root)
    study = open_study(folder)
    optuna.delete_study(study_name=study.study_name, storage=study._storage)
    with pytest.raises(ConfigError, match="has trials but its study was deleted"):
        run_session(root, data)
    with pytest.raises(ConfigError, match="contains no study"):
        open_study(folder)
    assert folder.trial(0).result.is_file()


# The prompts of a study


def replaced_prompt(bench: Workbench) -> None:
    first, *rest = bench.prompts.prompts
    changed = (replace(first, text=first.text + " at night"), *rest)
    bench.evaluator = bench.evaluator.on(replace(bench.prompts, prompts=changed))


def test_a_study_refuses_to_go_on_under_another_prompt_hash(root: Path, data: Path) -> None:
    run_session(root, data)
    before = StudyFolder(root).prompts.read_bytes()
    with pytest.raises(ConfigError, match="was started with a different definition: prompts: was"):
        run_session(root, data, trials=2, loaded=replaced_prompt)
    assert StudyFolder(root).prompts.read_bytes() == before
    assert len(open_study(StudyFolder(root)).get_trials(deepcopy=False)) == 1


def test_an_edited_prompt_file_is_refused_before_anything_is_loaded_and_not_overwritten(
    root: Path, data: Path
) -> None:
    run_session(root, data)
    path = StudyFolder(root).prompts
    written = path.read_text()
    edited = written.replace("zkw figure a", "zkw figure a at night")
    path.write_text(edited)
    with pytest.raises(ConfigError, match="was edited: the study uses prompts") as caught:
        run_session(root, data, trials=2, loaded=fail(ZeroDivisionError("loaded")))
    assert "delete the file" in caught.value.hint and path.read_text() == edited
    path.write_text("# a remark\n" + written)
    run_session(root, data)
    assert path.read_text() == "# a remark\n" + written, "the same prompts: the file is the user's to comment"


def test_an_edited_confirmation_set_is_kept_and_said(root: Path, data: Path) -> None:
    run_session(root, data)
    path = StudyFolder(root).confirmation
    edited = path.read_text().replace("zkw figure c", "zkw figure c at night")
    path.write_text(edited)
    assert "confirmation.toml differs from" in run_session(root, data, trials=2)
    assert path.read_text() == edited


# Trials and totals


def kill_in_trial_1(root: Path, data: Path) -> None:
    view = Recorder()
    view.event_hook = lambda e: os.kill(os.getpid(), signal.SIGKILL) if view.started[-1][0] == 1 else None
    make_search(tiny_bench(root, data), SearchLimits(3), view).run()


def test_an_orphan_beyond_a_lowered_total_is_left_and_finished_once_it_is_raised(
    root: Path, data: Path
) -> None:
    assert attempt(kill_in_trial_1, root, data) == -signal.SIGKILL
    said = run_session(root, data, trials=1)
    assert "1 trial is done; trial 1 was interrupted: raise --trials to finish it" in said
    states = [t.state.name for t in open_study(StudyFolder(root)).get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "RUNNING"]
    assert "complete=2/2" in run_session(root, data, trials=2)
    check_study(StudyFolder(root), 2)


def test_enqueued_settings_that_must_wait_for_more_trials_are_named(root: Path, data: Path) -> None:
    file = root.parents[1] / "kohya.toml"
    file.write_text("learning_rate = 2e-3\nnetwork_dim = 2\nnetwork_alpha = 2\nmax_train_epochs = 1\n")
    run_session(root, data)
    said = run_session(root, data, enqueue=file)
    assert "the settings of --enqueue are queued as trial 1" in said and "raise --trials" in said


def test_a_stop_is_for_those_who_ask_for_it(root: Path, data: Path) -> None:
    run_session(root, data)
    folder = StudyFolder(root)
    open_study(folder).set_user_attr(STOP, "converged")
    assert "converged (--stop-when-converged)" in run_session(root, data, trials=2, stop_when_converged=True)
    assert "complete=2/2" in run_session(root, data, trials=2)
    assert not open_study(folder).user_attrs[STOP]


def test_next_commands_name_the_runs_folder(root: Path, data: Path) -> None:
    said = run_session(root, data)
    assert f"next: hpo status study --runs {root.parent}" in said


# Troubles of the machine


def test_a_runs_folder_that_is_a_file_is_named(root: Path, data: Path) -> None:
    root.parent.touch()
    with pytest.raises(MachineError, match=r"cannot write .*runs") as caught:
        run_session(root, data)
    assert "a file, not a folder" in caught.value.hint


@pytest.mark.parametrize("when", ["before anything", "after loading"])
def test_a_database_that_stays_locked_is_named(
    root: Path, data: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run_session(root, data)
    monkeypatch.setattr(hpo.study.storage, "LOCK_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    blocker = sqlite3.connect(StudyFolder(root).database, isolation_level=None)

    def lock(bench: Workbench | None) -> None:
        blocker.execute("BEGIN IMMEDIATE")

    if when == "before anything":
        lock(None)
    with pytest.raises(MachineError, match=r"study\.db .*database is locked"):
        run_session(root, data, trials=2, loaded=lock if when == "after loading" else lambda bench: None)
    blocker.execute("ROLLBACK")
    check_study(StudyFolder(root), 1)


def test_a_study_deleted_in_the_dashboard_ends_the_search_by_name(root: Path, data: Path) -> None:
    view = Recorder()
    search = make_search(tiny_bench(root, data), SearchLimits(3), view)
    other = open_study(StudyFolder(root))

    def delete(event: Any) -> None:
        if view.started[-1][0] == 1 and other._storage.get_all_studies():
            other._storage.delete_study(other._study_id)

    view.event_hook = delete
    with pytest.raises(StudyStopped, match=r"was deleted") as caught:
        search.run()
    assert "under another name: hpo search NAME" in caught.value.hint and isinstance(caught.value, ToolError)


def test_a_trial_finished_by_hand_while_it_is_told_is_left_as_it_is(
    root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Recorder()
    search = make_search(tiny_bench(root, data), SearchLimits(2), view)
    other, publish = open_study(StudyFolder(root)), hpo.search.dashboard.publish

    def finished_by_hand(trial: optuna.Trial, *args: Any) -> None:
        if trial.number == 1:
            other.tell(1, 0.5)
        publish(trial, *args)

    monkeypatch.setattr(hpo.search.dashboard, "publish", finished_by_hand)
    search.run()
    assert search.study.get_trials(deepcopy=False)[1].value == 0.5
    assert any("trial 1 was already finished elsewhere" in line for line in view.lines)
    assert StudyFolder(root).trial(1).result.is_file()
