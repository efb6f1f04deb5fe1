"""Samplers: each of Optuna's samplers can propose a study's trials, resumes where it was, and opens no pickle."""

from __future__ import annotations

import json
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.search import samplers
from hpo.search.samplers import make_sampler, require_sampler
from hpo.study import SAMPLERS, build_study
from trainer.errors import ConfigError, MachineError

SPACE = {
    "rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "dim": optuna.distributions.IntDistribution(1, 5),
    "schedule": optuna.distributions.CategoricalDistribution(("constant", "cosine")),
}
START = {"rate": 1e-3, "dim": 3, "schedule": "cosine"}
TOTAL = 12


def value(params: dict[str, Any]) -> float:
    return -abs(params["dim"] - 4) - abs(params["rate"] - 3e-2) * 10


def proposals(storage: str, name: str, count: int) -> list[dict[str, Any]]:
    """The first trials of a study, which is opened anew for each of them."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for _ in range(count):
        study = optuna.create_study(
            storage=storage, study_name="s", load_if_exists=True, direction="maximize"
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(START)
        number = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
        study.sampler = make_sampler(5, number, TOTAL, name=name, study=study)
        trial = study.ask(SPACE)
        study.tell(trial, value(trial.params))
    return [t.params for t in study.get_trials(deepcopy=False)]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes_from_the_whole_space_and_is_the_same_when_resumed(
    name: str, tmp_path: Path
) -> None:
    whole = proposals(f"sqlite:///{tmp_path / 'a.db'}", name, TOTAL)
    proposals(f"sqlite:///{tmp_path / 'b.db'}", name, 5)
    assert proposals(f"sqlite:///{tmp_path / 'b.db'}", name, TOTAL - 5) == whole
    assert whole[0] == START
    assert len({json.dumps(params) for params in whole}) > TOTAL - 3
    assert all(SPACE[key]._contains(SPACE[key].to_internal_repr(v)) for p in whole for key, v in p.items())


def test_cmaes_learns_from_the_finished_trials(tmp_path: Path) -> None:
    """Its third generation is nearer to the optimum than random proposals are."""
    found = proposals(f"sqlite:///{tmp_path / 'a.db'}", "cmaes", 25)
    random = proposals(f"sqlite:///{tmp_path / 'b.db'}", "random", 25)
    assert sum(map(value, found[-8:])) > sum(map(value, random[-8:]))


def test_workers_that_ask_cmaes_at_once_get_different_points(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'a.db'}"
    proposals(storage, "cmaes", 8)
    asked = []
    for number in (8, 9):  # the first is still running when the second is asked for
        study = optuna.load_study(study_name="s", storage=storage)
        study.sampler = make_sampler(5, number, TOTAL, name="cmaes", study=study)
        asked.append(study.ask(SPACE).params)
    assert asked[0]["rate"] != asked[1]["rate"]


def test_cmaes_stores_and_reads_no_pickle(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'a.db'}"
    proposals(storage, "cmaes", 8)
    study = optuna.load_study(study_name="s", storage=storage)
    assert not [key for t in study.trials for key in t.system_attrs if key.startswith("cma")]

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return (Path.touch, (tmp_path / "opened",))

    blob = pickle.dumps(Hostile()).hex()
    with sqlite3.connect(tmp_path / "a.db") as db:
        for (trial,) in db.execute("select trial_id from trials").fetchall():
            for key in ("cma:optimizer:0", "cma:generation:0"):
                db.execute(
                    "insert into trial_system_attributes (trial_id, key, value_json) values (?, ?, ?)",
                    (trial, key, json.dumps(blob if "optimizer" in key else 0)),
                )
    proposals(storage, "cmaes", 2)
    assert not (tmp_path / "opened").exists()


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    require_sampler("tpe")
    with pytest.raises(MachineError, match="the sampler gp needs scipy") as found:
        require_sampler("gp")
    assert "'.[samplers]'" in found.value.hint


def definition(**search: Any) -> dict[str, Any]:
    return {
        "space": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "baseline": {"learning_rate": 1e-3},
        "search": search,
    }


def test_the_study_file_names_the_sampler_and_it_may_change_while_the_study_runs() -> None:
    plain, gp = build_study("s", definition()), build_study("s", definition(), sets=["search.sampler=gp"])
    assert (plain.search.sampler, gp.search.sampler) == ("tpe", "gp")
    assert plain.frozen() == gp.frozen()
    with pytest.raises(ConfigError, match="sampler"):
        build_study("s", definition(sampler="hyperband"))


def test_cmaes_refuses_two_objectives() -> None:
    table = definition(sampler="cmaes") | {"study": {"objectives": ["prompt_following", "likeness"]}}
    with pytest.raises(ConfigError, match="cmaes can search for one objective only"):
        build_study("s", table)
