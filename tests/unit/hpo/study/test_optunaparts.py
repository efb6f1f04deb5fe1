"""Optuna's private names: they are where the tool expects them, and nothing but one module uses them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

import hpo
from hpo.study import optunaparts
from hpo.study.optunaparts import set_system_attribute, take_up

ROOT = Path(hpo.__file__).parent


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    return optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=1))


def proposed(trial: optuna.Trial) -> dict[str, float]:
    return {name: trial.suggest_float(name, 0.0, 1.0) for name in ("a", "b")}


def test_a_running_trial_that_is_taken_up_has_what_it_was_asked_for_and_can_be_told(
    study: optuna.Study,
) -> None:
    study.enqueue_trial({"b": 0.25})
    asked = study.ask()
    first = asked.suggest_float("a", 0.0, 1.0)
    (frozen,) = study.get_trials(states=(TrialState.RUNNING,))
    again = take_up(study, frozen)
    assert again.number == asked.number
    assert proposed(again) == {"a": first, "b": 0.25}  # what it had, and what it was queued with
    again.set_user_attr("outcome", "complete")
    study.tell(again, 0.5)
    (told,) = study.get_trials()
    assert (told.state, told.value, told.user_attrs["outcome"]) == (TrialState.COMPLETE, 0.5, "complete")


def test_a_system_attribute_is_kept_where_the_dashboard_reads_it(study: optuna.Study) -> None:
    trial = study.ask()
    set_system_attribute(trial, "constraints", [1.0, -1.0])
    (frozen,) = study.get_trials()
    assert frozen.system_attrs["constraints"] == [1.0, -1.0]


# Nobody else


def private_names(study: optuna.Study) -> set[str]:
    """Every private attribute of Optuna's studies, trials and storages."""
    trial, (frozen,) = study.ask(), study.get_trials()
    storage = trial.storage
    frozen_study = storage.get_all_studies()[0]
    assert frozen_study.direction == StudyDirection.MINIMIZE
    summary = optuna.get_all_study_summaries(storage)[0]
    names = {name for of in (study, trial, frozen, storage, frozen_study, summary) for name in dir(of)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def uses(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """Private names of Optuna in a module: attributes of anything but self, and imports of private parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Constant) and node.value in names:  # getattr(study, "_storage")
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: {part}" for part in parts if part.startswith("_"))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("optuna") and "._" in alias.name:
                    yield f"line {node.lineno}: {alias.name}"


def test_the_private_names_are_used_in_one_module_only(study: optuna.Study) -> None:
    names = private_names(study)
    assert {"_storage", "_study_id", "_trial_id"} <= names
    own = Path(optunaparts.__file__)
    found = {
        path.relative_to(ROOT).as_posix(): list(uses(ast.parse(path.read_text(encoding="utf-8")), names))
        for path in sorted(ROOT.rglob("*.py"))
    }
    assert found.pop(own.relative_to(ROOT).as_posix())  # the search for them finds those that are there
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "self.study._storage.get_trial(1)",
        "getattr(trial, '_trial_id')",
        "from optuna_dashboard._cli import ThreadedWSGIServer",
        "from optuna.storages import _cached_storage",
        "import optuna.storages._cached_storage",
    ],
)
def test_every_way_of_using_one_is_found(study: optuna.Study, line: str) -> None:
    assert list(uses(ast.parse(line), private_names(study)))
