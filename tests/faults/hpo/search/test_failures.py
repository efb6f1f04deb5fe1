"""What goes wrong in a trial: the settings' fault teaches the sampler, the machine's fault does not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
import torch

import evaluation.score
import hpo.search.trial
import hpo.search.worker
import hpo.study.result
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench
from hpo.search.worker import Worker
from hpo.study.convergence import ConvergenceVerdict
from hpo.study.folder import STOP, read_json
from hpo.study.storage import open_study
from tests.faults.zygote import attempt
from tests.tiny_search import Recorder, check_study, draw_images, make_search, tiny_bench, tiny_study
from trainer.errors import Diverged, InvalidImages, MachineError, ModelFileError, OutOfMemory, StudyStopped
from trainer.files import read_records
from trainer.loop import loop

pytestmark = pytest.mark.faults


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.set_num_threads(1)
    return tiny_bench(tmp_path / "study", draw_images(tmp_path / "images"))


def fail_on(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], error: BaseException) -> None:
    """Training raises ``error`` in the trials that ``bad`` names."""
    train = loop.train

    def failing(config: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for event in train(config, *args, **kwargs):
            yield event
            if bad(int(config.output_name.rpartition("_")[2])):
                raise error

    monkeypatch.setattr(loop, "train", failing)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Diverged("the loss stayed non-finite"), "diverged"),
        (OutOfMemory("too small a card"), "out_of_memory"),
    ],
)
def test_what_settings_cause_is_complete_violated_and_finite(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """C2 · weight 3 · The settings of a trial make training diverge → It stops with its reason. The sampler
    learns that these settings are bad, and the search goes on.
    """
    fail_on(monkeypatch, lambda number: number == 1, error)
    search = make_search(bench, SearchLimits(3))
    search.run()
    trials = search.study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3  # it counts
    assert trials[1].value == -1 and trials[1].user_attrs["reason"] == reason
    assert trials[1].constraints[reason] == 1.0
    assert trials[1].system_attrs["constraints"] == [1.0 if r == reason else -1.0 for r in REASONS]
    assert all(c <= 0 for t in (trials[0], trials[2]) for c in t.constraints.values())
    assert search.study.best_trial.number != 1
    assert search.standing().infeasible == 1
    assert "peft_config" not in vars(bench.base.unet)


REASONS = hpo.study.result.INFEASIBLE_REASONS


def test_invalid_images_are_the_settings_fault(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def black(*args: Any, **kwargs: Any) -> None:
        raise InvalidImages("12 of 16 images are black")

    search = make_search(bench, SearchLimits(1))
    monkeypatch.setattr(evaluation.score, "evaluate_adapter", black)
    search.run()
    (trial,) = search.study.get_trials(deepcopy=False)
    assert trial.state.name == "COMPLETE" and trial.constraints["invalid_images"] == 1.0
    assert trial.user_attrs["message"] == "12 of 16 images are black"


def test_what_runs_out_of_memory_is_tried_with_checkpointing_which_changes_no_result(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B4 · weight 5 · A trial runs out of GPU memory → It is tried again in ways that do not change its result,
    and this is recorded. No searched value is changed.
    """
    train = loop.train

    def small_card(config: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if not config.gradient_checkpointing:
            raise OutOfMemory("out of memory")
        yield from train(config, *args, **kwargs)

    monkeypatch.setattr(loop, "train", small_card)
    search = make_search(bench, SearchLimits(1))
    search.run()
    (trial,) = search.study.get_trials(deepcopy=False)
    assert trial.state.name == "COMPLETE" and all(c <= 0 for c in trial.constraints.values())
    result = read_json(bench.folder.trial(0).result)
    assert result is not None and result["remedy"] == "single images, gradient_checkpointing of 3 blocks"
    params = read_json(bench.folder.trial(0).params)
    assert params is not None and params["train"]["gradient_checkpointing"] is False


def test_what_the_machine_causes_does_not_count_and_the_study_goes_on(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, lambda number: number in (1, 2), MachineError("the disk is slow", "wait"))
    search = make_search(bench, SearchLimits(2))
    search.run()
    states = [t.state.name for t in search.study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    failed = search.study.get_trials(deepcopy=False)[1]
    assert (
        failed.user_attrs["reason"] == "MachineError" and "the disk is slow" in failed.user_attrs["message"]
    )


def test_three_equal_failures_in_a_row_stop_the_study(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, lambda number: number > 0, ModelFileError("a key does not match"))
    search = make_search(bench, SearchLimits(9))
    with pytest.raises(StudyStopped, match="a key does not match"):
        search.run()
    assert len(search.study.get_trials(deepcopy=False)) == 4


def test_a_bug_is_a_failed_trial_with_its_traceback_in_the_log(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, lambda number: number == 1, ZeroDivisionError("division by zero"))
    search = make_search(bench, SearchLimits(2))
    search.run()
    assert search.study.get_trials(deepcopy=False)[1].user_attrs["reason"] == "crash:ZeroDivisionError"
    assert "Traceback" in bench.folder.trial(1).log.read_text(encoding="utf-8")


def test_a_failed_baseline_is_tried_again(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, lambda number: number == 0, MachineError("no luck"))
    search = make_search(bench, SearchLimits(2))
    search.run()
    trials = search.study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == dict(bench.study.baseline)
    assert search.standing().baseline == (1, trials[1].user_attrs["score"], trials[1].user_attrs["se"])


def test_a_score_that_is_not_a_number_never_reaches_the_sampler(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3 · weight 5 · A score is not a number → The trial fails with its reason; it is never counted as
    finished.
    """
    original = evaluation.score.evaluate_adapter

    def broken(*args: Any, **kwargs: Any) -> Any:
        return replace(original(*args, **kwargs), value=math.nan)

    search = make_search(bench, SearchLimits(1))
    monkeypatch.setattr(evaluation.score, "evaluate_adapter", broken)
    with pytest.raises(StudyStopped):
        search.run()
    assert {t.state.name for t in search.study.get_trials(deepcopy=False)} == {"FAIL"}


def test_a_disk_that_fills_before_the_result_leaves_the_trial_to_the_next_call(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B2 · weight 5 · The disk is full when the result of a trial is written → The trial stays open. When there
    is room, the next call finishes it, and it is told once.
    """
    search = make_search(bench, SearchLimits(1))
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise MachineError("disk full", "free some space")

        patch.setattr(hpo.search.trial, "write_result", full)
        with pytest.raises(MachineError, match="disk full"):
            search.run()
    assert [t.state.name for t in search.study.get_trials(deepcopy=False)] == ["RUNNING"]
    make_search(bench, SearchLimits(1)).run()
    check_study(bench.folder, 1)


def test_a_trial_finished_by_hand_in_the_dashboard_does_not_end_the_search(bench: Workbench) -> None:
    view = Recorder()
    search = make_search(bench, SearchLimits(2), view)
    other = open_study(bench.folder)

    def finish(event: Any) -> None:
        if view.started[-1][0] == 1 and not other.get_trials(deepcopy=False)[1].state.is_finished():
            other.tell(1, 0.5)

    view.event_hook = finish
    search.run()
    trials = search.study.get_trials(deepcopy=False)
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE"] and trials[1].value == 0.5
    assert read_json(bench.folder.trial(1).result) is not None


def test_the_same_settings_are_not_trained_twice_and_a_used_up_space_ends_the_search(tmp_path: Path) -> None:
    changes = {"space": {"learning_rate": {"low": 1e-3, "high": 1e-3}}}
    table = {"network_dim_log2": {"low": 1, "high": 1}, "network_alpha_ratio": {"low": 1.0, "high": 1.0}}
    study = tiny_study({"space": {**changes["space"], **table, "max_train_epochs": {"low": 1, "high": 2}}})
    bench = tiny_bench(tmp_path / "study", draw_images(tmp_path / "images"), study)
    search = make_search(bench, SearchLimits(9))
    why = search.run()
    assert "space is exhausted" in why and "under another name: hpo search NAME" in why
    trials = search.study.get_trials(deepcopy=False)
    assert search.standing().failed == 0 and search.standing().duplicates == len(trials) - 2 == 20
    last = optuna.trial.Trial(search.study, trials[-1]._trial_id)
    assert "duplicate of trial" in optuna_dashboard.get_note(last)
    assert (
        "space is exhausted" in make_search(bench, SearchLimits(9)).run()
    )  # a call later adds nothing to them
    assert len(search.study.get_trials(deepcopy=False)) == len(trials)
    trained = [t for t in search.study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    assert sorted(t.params["max_train_epochs"] for t in trained) == [1, 2]
    assert all(len(read_records(f.starts)) == 1 for f in bench.folder.trial_folders())


def test_keep_best_keeps_the_best_lora_files_and_everything_else(bench: Workbench) -> None:
    search = make_search(bench, SearchLimits(3, keep_best=1))
    search.run()
    best = search.standing().best
    assert best is not None
    for number in range(3):
        folder = bench.folder.trial(number)
        assert folder.lora.exists() == (number == best[0])
        assert folder.result.exists() and folder.params.exists() and folder.grid.exists()


def test_no_trial_begins_after_max_hours(bench: Workbench) -> None:
    search = make_search(bench, SearchLimits(9, max_hours=0.0))
    assert "--max-hours" in search.run()
    assert search.standing().complete == 0


def pretend(
    monkeypatch: pytest.MonkeyPatch, settled: Callable[[int], bool] = lambda trials: trials >= 2
) -> None:
    """The detector finds the study converged, but for running trials, when ``settled`` says so."""

    def detect(points: Any, *, running: int, **_: Any) -> ConvergenceVerdict | None:
        if len(points) < 2:
            return None
        here, top = settled(len(points)), (points[0].number, points[1].number)
        level = ("plateau" if running else "converged") if here else "none"
        return ConvergenceVerdict(
            level, 2, 4, 8, 0, points[0].value, 0.1, 0.0, 0.1, 0.1, 0.1, 0.0, top, True, 0.0, here
        )  # fmt: skip

    monkeypatch.setattr(hpo.search.sampled.convergence, "detect", detect)


def test_stop_when_converged_ends_the_search_and_leaves_the_alert(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    view = Recorder()
    search = make_search(bench, SearchLimits(9, stop_when_converged=True), view)
    assert "converged" in search.run()
    assert search.standing().complete == 2
    assert "Best trial: Trial 0" in bench.folder.alert.read_text(encoding="utf-8")
    assert any("CONVERGENCE_ALERT.txt" in line for line in view.lines)
    assert "Best trial: Trial 0" in optuna_dashboard.get_note(search.study)
    again = make_search(bench, SearchLimits(9, stop_when_converged=True))
    assert "converged" in again.run() and again.standing().complete == 2


def stopped_worker(root: Path, data: Path) -> None:
    view = Recorder()
    why = make_search(tiny_bench(root, data), SearchLimits(9), view).run()
    assert "converged" in why and "still running in other processes: trial 2" in why and view.started == []


def test_a_stop_holds_for_every_worker_and_the_trial_that_still_runs_has_the_last_word(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda trials: trials == 4)
    view = Recorder()
    search = make_search(bench, SearchLimits(9, stop_when_converged=True), view)
    codes = []

    def stop_meanwhile(event: Any) -> None:
        if view.started[-1][0] == 2 and not codes:
            search.study.set_user_attr(STOP, "converged")  # as a worker beside this one does
            codes.append(attempt(stopped_worker, bench.folder.root, bench.data_folder))

    view.event_hook = stop_meanwhile
    assert "converged" in search.run()
    assert codes == [0]
    assert [number for number, _ in view.started] == [0, 1, 2, 3]  # after 2 it was no longer settled


def test_a_resumed_study_proposes_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images")
    whole = make_search(tiny_bench(tmp_path / "whole", images), SearchLimits(7))
    whole.run()
    for trials in (2, 5, 7):
        parts: Worker = make_search(tiny_bench(tmp_path / "parts", images), SearchLimits(trials))
        parts.run()
    proposals = [[t.params for t in s.study.get_trials(deepcopy=False)] for s in (whole, parts)]
    assert proposals[0] == proposals[1]
