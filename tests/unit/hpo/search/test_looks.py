"""Looks in the middle of a training: what Optuna is told, which trials stop, and what stays as without looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

from evaluation.score import Look, evaluate_adapter, look, looked_at
from hpo.search.looks import Looks, look_images, marks
from hpo.search.sampled import SearchLimits
from hpo.search.trial import run_trial
from hpo.search.workbench import Workbench
from hpo.study import COMPLETE, PRUNED, build_study, open_study, read_json, standing
from hpo.terminal.live import study_line
from tests.tiny_search import STUDY, Recorder, draw_images, make_search, tiny_bench, tiny_study
from trainer.adapters import lorafile
from trainer.errors import ConfigError
from trainer.files import read_records

TRIALS = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "images" / "1_zkw figure", 8).parent


def bench_with(root: Path, data: Path, **search: Any) -> Workbench:
    return tiny_bench(root, data, tiny_study({"search": search} if search else None))


def test_after_which_steps() -> None:
    assert marks(100, (0.75, 0.25)) == {25: 25, 75: 75}
    assert marks(3, (0.5,)) == {2: 50}
    assert marks(1, (0.5,)) == {}  # the last step is scored


def test_a_look_is_the_objective_of_its_images(tmp_path: Path, data: Path) -> None:
    bench = bench_with(tmp_path / "study", data)
    bench.measure_anchors(lambda text: None)
    adapter = lorafile.begin(bench.base, bench.config(bench.study.baseline, 0))
    for layer in adapter.layers:
        for weight in layer.factors:
            weight.data.normal_(0, 0.1)
    score = evaluate_adapter(bench.evaluator, tmp_path / "scored")
    found = look(bench.evaluator)
    adapter.remove()
    rows = {row.prompt_id: row for row in score.per_image}
    ids = [p.id for p in looked_at(bench.prompts).prompts]
    assert found.t_P == pytest.approx([rows[i].clip_t for i in ids], abs=1e-6)
    assert found.value == pytest.approx(score.objective, abs=1e-6)  # every prompt has one image


@pytest.mark.parametrize("pruner", ["median", "halving", "behind"])
def test_trials_stop_and_optuna_sees_it(
    tmp_path: Path, data: Path, pruner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_with(tmp_path / "study", data, pruner=pruner)
    if pruner == "behind":  # with two prompts there is no significance: let every difference be one
        monkeypatch.setattr("hpo.search.looks.LEVEL", 0.5 * TRIALS)
    worker = make_search(bench, SearchLimits(TRIALS), view := Recorder())
    worker.run()
    folder = bench.folder
    trials = open_study(folder).get_trials(deepcopy=False)
    stopped = [t for t in trials if t.state == TrialState.PRUNED]
    assert stopped, "the test needs a trial that stops"
    assert len(trials) == TRIALS and all(t.state.is_finished() for t in trials)
    assert trials[0].state == TrialState.COMPLETE and not trials[0].intermediate_values  # the baseline
    for t in trials[1:]:
        assert list(t.intermediate_values) == [50]
        [row] = read_records(folder.trial(t.number).looks)
        assert row["value"] == t.intermediate_values[50] and bool(row["stops"]) == (t in stopped)
    for t in stopped:
        files = folder.trial(t.number)
        assert t.value == t.intermediate_values[50]
        assert t.user_attrs["outcome"] == PRUNED and "score" not in t.user_attrs
        assert "after 50 % of its training" in t.user_attrs["message"]
        assert not files.lora.exists() and not files.checkpoints.exists() and not files.metrics.exists()
        result = read_json(files.result)
        assert result is not None and result["state"] == PRUNED and result["look_seconds"] > 0
    now = standing(open_study(folder), TRIALS)
    assert (now.complete, now.pruned, now.left) == (TRIALS, len(stopped), 0)
    assert f"complete={TRIALS}/{TRIALS}" in study_line("tiny", now)
    assert f"pruned={len(stopped)}" in study_line("tiny", now)
    assert now.best is not None and now.best[0] not in {t.number for t in stopped}
    assert sum(r.state == PRUNED for r in view.results) == len(stopped)


def test_a_trial_that_goes_on_is_trained_and_scored_as_without_looks(tmp_path: Path, data: Path) -> None:
    found = {}
    for name, search in (("with", {"pruner": "median", "looks": [0.3, 0.6]}), ("without", {})):
        bench = bench_with(tmp_path / name, data, **search)
        make_search(bench, SearchLimits(3)).run()
        found[name] = [read_json(bench.folder.trial(n).result) for n in range(3)]
        assert len(list(read_records(bench.folder.trial(2).looks))) == (2 if search else 0)
    for a, b in zip(found["with"], found["without"], strict=True):
        assert a is not None and b is not None and a["state"] == COMPLETE
        assert a["lora_sha256"] == b["lora_sha256"] and a["value"] == b["value"]


def test_a_trial_that_was_killed_after_a_look_decides_the_same(tmp_path: Path, data: Path) -> None:
    bench = bench_with(tmp_path / "study", data, pruner="median")
    worker = make_search(bench, SearchLimits(2))
    worker.run()
    study = open_study(bench.folder)
    trial = study.ask(bench.study.space.distributions())
    folder = bench.folder.trial(trial.number)
    folder.root.mkdir()
    looks = Looks(bench, trial, folder, 5)
    config = bench.config(trial.params, trial.number)
    row = {"percent": 50, "step": 2, "value": -0.9, "t": [], "i": [], "stops": "stopped, as was written"}
    folder.looks.write_text(f"{json.dumps(row)}\n")
    result = run_trial(bench, folder, config, Recorder(), looks=looks)
    assert (result.state, result.value, result.message) == (PRUNED, -0.9, "stopped, as was written")
    assert study.get_trials()[-1].intermediate_values == {50: -0.9}
    assert len(list(read_records(folder.looks))) == 1


def test_behind_waits_for_the_random_trials_and_needs_significance(tmp_path: Path, data: Path) -> None:
    bench = bench_with(tmp_path / "study", data, pruner="behind")
    bench.measure_anchors(lambda text: None)
    make_search(bench, SearchLimits(4)).run()
    study = open_study(bench.folder)
    looks = Looks(bench, study.ask(bench.study.space.distributions()), bench.folder.trial(4), 30)
    invalid = Look(-1.0)
    assert looks._behind(50, invalid) == ""  # of 30 trials, the first ten are random
    looks.total = 10  # here the first five, and four are done
    assert looks._behind(50, invalid) == ""
    make_search(bench, SearchLimits(5)).run()
    assert "below trial" in looks._behind(50, invalid)  # an image that shows nothing needs no test
    best = max((t for t in study.get_trials() if t.intermediate_values), key=lambda t: t.value or -9)
    there = Look.of(best.user_attrs["look_50"])
    assert looks._behind(50, there) == ""


def test_a_look_that_runs_out_of_memory_is_left_out(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_with(tmp_path / "study", data, pruner="median")
    worker = make_search(bench, SearchLimits(2), view := Recorder())

    def full(*args: Any, **words: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("evaluation.score.looking.sample", full)
    worker.run()
    assert [r.state for r in view.results] == [COMPLETE, COMPLETE] and not view.results[1].remedy
    folder = bench.folder.trial(1)
    [row] = read_records(folder.looks)
    assert "out of memory" in row["left_out"] and "left out" in folder.log.read_text()
    assert not bench.folder.memory.exists()
    assert not open_study(bench.folder).get_trials()[1].intermediate_values


def test_images_of_looks_are_part_of_the_estimate(tmp_path: Path, data: Path) -> None:
    assert look_images(bench_with(tmp_path / "a", data)) == 0
    assert look_images(bench_with(tmp_path / "b", data, pruner="median", looks=[0.25, 0.5])) == 4


def test_two_objectives_have_no_pruner() -> None:
    study = {"study": {"seed": 7, "objectives": ["prompt_following", "likeness"]}}
    with pytest.raises(ConfigError, match="one objective"):
        build_study("tiny", {**STUDY, **study, "search": {"pruner": "median"}})
