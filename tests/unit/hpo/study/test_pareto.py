"""Promises of a study with two objectives: what is told, the front, the status, what does not apply."""

from pathlib import Path

import pytest
from rich.console import Console

from evaluation.score.formula import told_part
from hpo.confirm.view import status_lines
from hpo.search.sampled import SearchLimits
from hpo.search.samplers import make_sampler
from hpo.search.session import SearchRequest, search
from hpo.search.summary import summary
from hpo.study.config import Inputs
from hpo.study.noise import components
from hpo.study.result import SIGNED_INFEASIBLE_VALUE
from hpo.study.standing import pareto_front, score_of, standing
from hpo.study.storage import create_study, open_study
from hpo.study.table import study_table
from hpo.terminal.live import study_line
from hpo.terminal.status import status_table
from tests.tiny_search import Recorder, draw_images, make_search, tiny_bench, tiny_study
from trainer.errors import ConfigError

BOTH = {"study": {"objectives": ["prompt_following", "likeness"]}}


def test_a_study_with_two_objectives_runs_resumes_and_has_a_front(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data")
    bench = tiny_bench(tmp_path / "study", data, tiny_study(BOTH))
    make_search(bench, SearchLimits(2)).run()
    again = tiny_bench(tmp_path / "study", data, tiny_study(BOTH))
    view = Recorder()
    make_search(again, SearchLimits(3), view).run()
    study = open_study(bench.folder)
    trials = study.get_trials(deepcopy=False)
    assert [number for number, _ in view.started] == [2] and len(trials) == 3
    for trial in trials:
        assert trial.values and all(-1 < value <= 1.1 for value in trial.values)
        assert trial.values[1] == told_part(trial.user_attrs["likeness"], "signed")
        assert score_of(trial) == trial.user_attrs["score"]
    now = standing(study, 3)
    assert now.front == pareto_front(trials) == tuple(t.number for t in study.best_trials)
    assert now.best and now.baseline and now.baseline[0] == 0
    console = Console(record=True, width=140)
    table = study_table(study, bench.folder)
    console.print(status_table(table, 140)[0])
    text = console.export_text()
    assert "likeness" in text and f"{now.front[0]}" in text and "+" in text
    assert "front=" in study_line("s", now)
    assert components(study, bench.folder) is None  # too few trials, and no single value to read
    assert any("confirm" in line for line in status_lines(study, bench.folder, table))
    assert any("Pareto front" in line for line in summary(bench.folder, now, {"a": 1}, "done"))
    assert not bench.folder.alert.exists()
    with pytest.raises(ConfigError, match="was started with 2 objective"):
        create_study(bench.folder, {})


def test_an_infeasible_trial_is_below_every_measured_one_and_not_on_the_front(tmp_path: Path) -> None:
    bench = tiny_bench(
        tmp_path / "study",
        draw_images(tmp_path / "data"),
        tiny_study({**BOTH, "baseline": {"learning_rate": 1e-4, "network_dim": 1, "network_alpha": 1}}),
    )
    runner = make_search(bench, SearchLimits(1))
    study = runner.study
    study.sampler = make_sampler(1, 0, 3)
    for values, broken in (
        ([0.5, 0.1], -1.0),
        ([0.2, 0.2], -1.0),
        ([0.1, 0.1], -1.0),
        ([SIGNED_INFEASIBLE_VALUE] * 2, 1.0),
    ):
        trial = study.ask()
        trial.set_constraint("copied", broken)
        trial.set_user_attr("score", 0.1)
        study.tell(trial, values)
    assert standing(study, 4).front == (0, 1)
    assert standing(study, 4).infeasible == 1


def test_convergence_is_refused_where_it_has_no_meaning(tmp_path: Path) -> None:
    request = SearchRequest(
        Inputs("mini-sd15"), 2, sets=('study.objectives=["prompt_following", "likeness"]',),
        stop_when_converged=True, runs=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="two objectives"):
        search(request, Console())
    assert not list(tmp_path.iterdir())
