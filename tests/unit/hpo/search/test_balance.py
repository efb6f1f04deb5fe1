"""What the sampler sees of the learning rate, and what is stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import tomlkit
from optuna.trial import TrialState

from hpo.search.balance import Balance, proposing
from hpo.search.sampled import suggest
from hpo.search.samplers import make_sampler
from hpo.study import StudyConfig, build_study, read_study

SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "network_dim_log2": {"low": 2, "high": 5},
    "network_alpha_ratio": {"low": 0.25, "high": 1.0, "log": True},
    "train_batch_size": {"choices": [1, 2, 4]},
    "images_seen": {"low": 400, "high": 6400, "log": True},
}
BASELINE = {
    "learning_rate": 1e-3,
    "network_dim": 16,
    "network_alpha": 8,
    "train_batch_size": 2,
    "images_seen": 1600,
}
USUAL = {
    "learning_rate": 1e-3,
    "network_dim_log2": 4,
    "network_alpha_ratio": 0.5,
    "train_batch_size": 2,
    "images_seen": 1600,
}


def study_of(tmp_path: Path, **changes: Any) -> StudyConfig:
    table = {"train": {"optimizer_type": "AdamW"}, "space": SPACE, "baseline": BASELINE}
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values}
        table[section] = {name: value for name, value in table[section].items() if value is not None}
    path = tmp_path / "own.toml"
    path.write_text(tomlkit.dumps(table))
    return read_study(path)


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return study_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1.0),
        ({"images_seen": 6400}, 0.5),  # four times the steps
        ({"train_batch_size": 1}, math.sqrt(0.5)),  # twice the steps
        ({"network_dim_log2": 2}, 2.0),  # a quarter of the alpha, as its share of the rank is the same
        ({"network_alpha_ratio": 1.0}, math.sqrt(0.5)),
    ],
)
def test_a_rate_is_relative_to_the_baseline_s_alpha_and_steps(
    config: StudyConfig, change: dict[str, Any], factor: float
) -> None:
    balance = Balance.of(config)
    assert balance is not None
    stored = balance.stored({**USUAL, **change})
    assert stored["learning_rate"] == pytest.approx(1e-3 * factor)
    assert balance.seen(stored)["learning_rate"] == pytest.approx(1e-3)
    assert {**stored, "learning_rate": 0} == {**USUAL, **change, "learning_rate": 0}


def test_a_length_in_epochs_counts_alike(tmp_path: Path) -> None:
    epochs = {"max_train_epochs": {"low": 1, "high": 8}, "images_seen": None}
    config = study_of(tmp_path, space=epochs, baseline={"images_seen": None, "max_train_epochs": 2})
    balance = Balance.of(config)
    assert balance is not None
    seen = {**USUAL, "max_train_epochs": 8, "train_batch_size": 1}
    assert balance.stored(seen)["learning_rate"] == pytest.approx(1e-3 / math.sqrt(8))


def test_a_rate_outside_the_space_becomes_its_edge(config: StudyConfig) -> None:
    balance = Balance.of(config)
    assert balance is not None
    low = {**USUAL, "learning_rate": 1.2e-5, "images_seen": 6400}
    assert balance.stored(low)["learning_rate"] == 1e-5
    high = {**USUAL, "learning_rate": 9e-3, "images_seen": 6400}
    assert balance.seen(high)["learning_rate"] == pytest.approx(1.8e-2)  # seen as it is: nothing is cut off


def test_the_sampler_s_range_holds_every_rate_of_the_space(config: StudyConfig) -> None:
    balance = Balance.of(config)
    assert balance is not None
    wide = balance.distributions()["learning_rate"]
    assert isinstance(wide, optuna.distributions.FloatDistribution)
    # alpha × steps: at most 32 × 6400 and at least 1 × 100, where the baseline has 8 × 800
    assert wide.low == pytest.approx(1e-5 / 8)
    assert wide.high == pytest.approx(1e-2 * math.sqrt(32))


@pytest.mark.parametrize(
    "changes",
    [
        {"search": {"rate": "plain"}},
        {"train": {"optimizer_type": "Prodigy"}, "baseline": {"learning_rate": 1.0}},
        {"train": {"optimizer_type": "SGDNesterov"}},
        {"space": {"learning_rate": {"low": 1e-5, "high": 1e-2}}},  # not logarithmic
        {
            "space": dict.fromkeys(
                ("network_dim_log2", "network_alpha_ratio", "train_batch_size", "images_seen")
            )
        },
    ],
)
def test_where_there_is_nothing_to_balance(tmp_path: Path, changes: dict[str, Any]) -> None:
    if list(changes) == ["space"] and "images_seen" in changes["space"]:
        changes = {**changes, "baseline": dict.fromkeys(BASELINE.keys() - {"learning_rate"})}
        changes["train"] = {"max_train_steps": 400}
    if changes.get("train", {}).get("optimizer_type") == "Prodigy":
        changes = {**changes, "space": {"learning_rate": {"low": 0.5, "high": 2.0, "log": True}}}
    assert Balance.of(study_of(tmp_path, **changes)) is None


def proposals(config: StudyConfig, name: str, count: int, total: int = 30) -> optuna.Study:
    """A study whose score falls with the distance from one rate, as the sampler sees it."""
    balance = Balance.of(config)
    study = optuna.create_study(direction="maximize")
    judge = Balance.of(config) or balance
    for number in range(count):
        study.sampler = make_sampler(3, number, total, name=name, study=study, balance=balance)
        trial = study.ask()
        values = suggest(trial, config)
        assert judge is not None
        study.tell(trial, -((math.log(judge.seen(values)["learning_rate"]) - math.log(3e-4)) ** 2))
    return study


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_what_is_stored_is_kohya_s_rate(config: StudyConfig, name: str) -> None:
    study = proposals(config, name, 14)
    for trial in study.trials:
        assert trial.distributions == config.space.distributions()
        assert 1e-5 <= trial.params["learning_rate"] <= 1e-2
    assert len({tuple(t.params.values()) for t in study.trials}) == 14


def test_what_a_sampler_proposes_is_moved_to_the_length_that_it_proposes(config: StudyConfig) -> None:
    balance = Balance.of(config)
    assert balance is not None
    study = optuna.create_study(direction="maximize")
    study.sampler = balance.sampler(proposing({**USUAL, "images_seen": 6400}, 1), study, 1)
    assert suggest(study.ask(), config) == {**USUAL, "images_seen": 6400, "learning_rate": 5e-4}


def test_random_proposals_fill_the_space_as_it_is(config: StudyConfig) -> None:
    def rates(balance: Balance | None) -> list[float]:
        study = optuna.create_study(direction="maximize")
        for number in range(10):
            study.sampler = make_sampler(3, number, 30, study=study, balance=balance)
            trial = study.ask()
            study.tell(trial, suggest(trial, config)["learning_rate"])
        return [t.params["learning_rate"] for t in study.trials]

    assert rates(Balance.of(config)) == rates(None)


def test_infeasible_trials_stay_infeasible(config: StudyConfig) -> None:
    """Optuna's samplers treat a trial with violated constraints as a bad one, whatever its value."""
    balance = Balance.of(config)
    assert balance is not None
    strict = optuna.create_study(direction="maximize")
    for trial in proposals(config, "tpe", 12).trials:
        again = optuna.trial.create_trial(
            params=trial.params,
            distributions=config.space.distributions(),
            value=0.5,
            constraints={"memory": 1.0},
        )
        strict.add_trial(again)
    seen = list[optuna.trial.FrozenTrial]()

    class Watch(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> Any:
            seen.extend(study.get_trials(states=(TrialState.COMPLETE,)))
            return super().infer_relative_search_space(study, trial)

    balance.sampler(Watch(), strict, 1)
    assert len(seen) == 12 and all(t.constraints == {"memory": 1.0} for t in seen)


@pytest.mark.parametrize(
    ("options", "balanced"), [(["AdamW", "AdamW8bit"], True), (["AdamW", "Lion"], False)]
)
def test_searched_optimizers(tmp_path: Path, options: list[str], balanced: bool) -> None:
    space = {"optimizer_type": {"choices": options}}
    config = study_of(
        tmp_path, space=space, train={"optimizer_type": None}, baseline={"optimizer_type": "AdamW"}
    )
    assert (Balance.of(config) is not None) is balanced


def test_a_study_begun_before_the_setting_keeps_the_plain_rate(tmp_path: Path) -> None:
    config = study_of(tmp_path)
    assert config.search.rate == "balanced" == config.sections["search"]["rate"]
    path = tmp_path / "own.toml"
    stored = {**config.sections, "search": {}}
    assert read_study(path, before=stored).search.rate == "plain"
    assert read_study(path, before=config.sections).search.rate == "balanced"
    assert read_study(path, before=stored, sets=["search.rate=balanced"]).search.rate == "balanced"
    assert build_study("own", stored).search.rate == "plain"


def test_the_model_learns_the_rate_for_every_length(config: StudyConfig) -> None:
    study = proposals(config, "tpe", 40)
    late = [-t.value for t in study.trials[25:] if t.value is not None]
    early = [-t.value for t in study.trials[:10] if t.value is not None]
    assert np.median(late) < 0.2 * np.median(early)


def test_a_resumed_study_gets_the_same_proposals(config: StudyConfig) -> None:
    whole = [t.params for t in proposals(config, "tpe", 16).trials]
    study = proposals(config, "tpe", 12)
    copy = optuna.create_study(direction="maximize")
    copy.add_trials(study.trials)
    for number in range(12, 16):
        copy.sampler = make_sampler(3, number, 30, study=copy, balance=Balance.of(config))
        trial = copy.ask()
        values = suggest(trial, config)
        judge = Balance.of(config)
        assert judge is not None and values == whole[number]
        copy.tell(trial, -((math.log(judge.seen(values)["learning_rate"]) - math.log(3e-4)) ** 2))


def test_trials_that_run_in_other_workers_are_seen(config: StudyConfig) -> None:
    def next_after(running: bool) -> dict[str, Any]:
        study = proposals(config, "tpe", 15)
        if running:
            study.enqueue_trial(study.best_params)
            suggest(study.ask(), config)
        study.sampler = make_sampler(3, 40, 30, study=study, balance=Balance.of(config))
        return suggest(study.ask(), config)

    assert next_after(running=True) != next_after(running=False)


def test_trials_of_another_space_are_left_out(config: StudyConfig) -> None:
    study = proposals(config, "tpe", 12)
    wide = {
        **config.space.distributions(),
        "learning_rate": optuna.distributions.FloatDistribution(1e-9, 1, log=True),
    }
    strange = {**USUAL, "learning_rate": 0.5}
    study.add_trial(optuna.trial.create_trial(params=strange, distributions=wide, value=1.0))
    fewer = {k: v for k, v in config.space.distributions().items() if k != "images_seen"}
    study.add_trial(
        optuna.trial.create_trial(params={k: USUAL[k] for k in fewer}, distributions=fewer, value=1.0)
    )
    study.sampler = make_sampler(3, 14, 30, study=study, balance=Balance.of(config))
    trial = study.ask()
    assert config.space.distributions().keys() == suggest(trial, config).keys()
    assert study.trials[-1].state == TrialState.RUNNING
