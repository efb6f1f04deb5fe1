"""When the sampler begins to model: not before a trial is above the untrained base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.search import sampled
from hpo.search.sampled import SearchLimits, SearchProposals
from hpo.search.samplers import make_sampler
from hpo.study.standing import is_above_base
from tests.tiny_search import Recorder, draw_images, make_search, tiny_bench, tiny_study

SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "learning_rate": optuna.distributions.FloatDistribution(1e-6, 1e-2, log=True),
    "max_train_epochs": optuna.distributions.IntDistribution(1, 10),
}


def asked(told: list[float], *, learned: bool) -> dict[str, Any]:
    """The proposal after trials that were told these values."""
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate(told):
        study.sampler = make_sampler(3, number, 30)
        study.tell(study.ask(SPACE), value)
    study.sampler = make_sampler(3, len(told), 30, learned=learned)
    return study.ask(SPACE).params


def test_until_something_is_learned_what_was_told_does_not_matter() -> None:
    one, other = [-0.01 * n for n in range(12)], [-0.01 * (n % 5) for n in range(12)]
    assert asked(one, learned=False) == asked(other, learned=False)
    assert asked(one, learned=True) != asked(other, learned=True), "the model reads what was told"


@pytest.mark.parametrize(("value", "above"), [(-0.1, False), (0.0, False), (0.15, False), (0.17, True)])
def test_above_the_base_is_two_standard_errors_above_zero(value: float, above: bool) -> None:
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    trial.set_user_attr("se", 0.08)
    study.tell(trial, value)
    assert is_above_base(study.get_trials()[0]) is above


@pytest.mark.parametrize("form", ["signed", "clipped"])
@pytest.mark.parametrize("best", [0.05, 0.6])
def test_a_search_models_once_a_trial_is_above_the_base_and_a_clipped_one_as_it_always_did(
    tmp_path: Path, form: str, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tiny_bench(
        tmp_path / "study", draw_images(tmp_path / "data"), tiny_study({"score": {"below_zero": form}})
    )
    study = make_search(bench, SearchLimits(15)).study
    for number in range(6):
        study.sampler = make_sampler(7, number, 15)
        trial = study.ask(bench.study.space.distributions())
        trial.set_user_attr("se", 0.05)
        study.tell(trial, best if number == 3 else -0.01 * number)
    asked_for: list[bool] = []

    def listening(
        seed: int, number: int, total: int, *, learned: bool, **named: Any
    ) -> optuna.samplers.BaseSampler:
        asked_for.append(learned)
        return make_sampler(seed, number, total, learned=learned, **named)

    monkeypatch.setattr(sampled, "make_sampler", listening)
    SearchProposals(study, bench, SearchLimits(15), Recorder().say).suggest(study.ask())
    assert asked_for == [form == "clipped" or best == 0.6]
