"""The search space: one mapping, its inverse, and no edge that training would refuse."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.study.space.domain import Choice, Range
from hpo.study.space.file import read_space
from hpo.study.space.space import Space
from trainer.config import TrainConfig
from trainer.errors import ConfigError

FIXED = TrainConfig()
TWELVE: dict[str, Any] = {
    "learning_rate": {"low": 2e-5, "high": 1e-3, "log": True},
    "text_encoder_lr_ratio": {"low": 0.1, "high": 1.0, "log": True},
    "network_dim_log2": {"low": 3, "high": 7},
    "network_alpha_ratio": {"low": 0.25, "high": 1.0, "log": True},
    "optimizer_type": ["AdamW", "AdamW8bit"],
    "lr_scheduler": ["constant", "cosine", "cosine_with_restarts_3"],
    "warmup_ratio": {"low": 0.0, "high": 0.15, "inactive_when": {"lr_scheduler": "constant"}},
    "gradient_accumulation_steps": {"low": 1, "high": 4},
    "max_train_epochs": {"low": 6, "high": 20},
    "min_snr_gamma": [0, 1, 5, 10],
    "noise_offset": {"low": 0.0, "high": 0.1},
    "network_dropout": {"low": 0.0, "high": 0.3},
}
BASELINE = {
    "learning_rate": 1e-4,
    "text_encoder_lr_ratio": 0.5,
    "network_dim_log2": 5,
    "network_alpha_ratio": 0.5,
    "optimizer_type": "AdamW8bit",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.0,
    "gradient_accumulation_steps": 1,
    "max_train_epochs": 10,
    "min_snr_gamma": 5,
    "noise_offset": 0.0,
    "network_dropout": 0.0,
}


@pytest.fixture(scope="module")
def space() -> Space:
    return read_space(TWELVE)


def test_a_proposal_means_kohyas_settings(space: Space) -> None:
    proposal = {**BASELINE, "lr_scheduler": "cosine_with_restarts_3", "warmup_ratio": 0.1, "min_snr_gamma": 0}
    assert space.settings(proposal, FIXED) == {
        "learning_rate": 1e-4,
        "text_encoder_lr": 5e-5,
        "network_dim": 32,
        "network_alpha": 16.0,
        "optimizer_type": "AdamW8bit",
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 3,
        "lr_warmup_steps": 0.1,
        "gradient_accumulation_steps": 1,
        "max_train_epochs": 10,
        "min_snr_gamma": None,
        "noise_offset": 0.0,
        "network_dropout": 0.0,
    }


def test_an_inactive_parameter_is_proposed_recorded_and_not_passed_on(space: Space) -> None:
    proposal = {**BASELINE, "lr_scheduler": "constant", "warmup_ratio": 0.1}
    assert space.inactive(proposal) == ("warmup_ratio",)
    assert "lr_warmup_steps" not in space.settings(proposal, FIXED)
    assert space.config(proposal, FIXED).lr_warmup_steps == FIXED.lr_warmup_steps


@pytest.mark.parametrize("seed", range(20))
def test_settings_and_proposal_are_each_others_inverse(space: Space, seed: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    proposal = study.ask(space.distributions()).params
    config = space.config(proposal, FIXED)
    again = space.proposal(config.as_dict(), proposal)
    for name, value in config.as_dict().items():
        found = getattr(space.config(again, FIXED), name)
        assert found == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert space.check(again, "again").keys() == proposal.keys()


def test_the_mapping_is_pure(space: Space) -> None:
    proposal = dict(BASELINE)
    assert space.settings(proposal, FIXED) == space.settings(proposal, FIXED)
    assert proposal == BASELINE


def test_every_edge_of_the_twelve_is_a_valid_configuration(space: Space) -> None:
    space.check_edges(FIXED, BASELINE)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"learning_rate": {"low": 1e-4, "high": 20.0}}, "learning_rate = 20.0 is outside its limits"),
        ({"network_alpha_ratio": {"low": 0.0, "high": 1.0}}, "network_alpha_ratio = 0.0, but network_alpha"),
        ({"lr_scheduler": ["cosine", "cosine_with_restarts_0"]}, "cosine_with_restarts_0"),
        ({"optimizer_type": ["AdamW", "Prodigy"]}, "optimizer_type = Prodigy, but Prodigy"),
        ({"network_dim_log2": {"low": 3, "high": 11}}, "network_dim_log2: 3 … 11 is outside its limits"),
    ],
)
def test_an_edge_outside_the_limits_is_refused_before_the_first_trial(
    table: dict[str, Any], message: str
) -> None:
    fixed = FIXED.with_values({"text_encoder_lr": 5e-5})
    with pytest.raises(ConfigError, match=message):
        space = read_space(table)
        space.check_edges(fixed, space.proposal(fixed.as_dict()))


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        (
            {"learning_rat": {"low": 1e-4, "high": 1e-3}},
            "unknown setting learning_rat",
            "did you mean learning_rate",
        ),
        (
            {"network_dim": {"low": 1, "high": 8}, "network_dim_log2": {"low": 1, "high": 3}},
            "both set",
            "one of",
        ),
        ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "above high", "swap"),
        ({"learning_rate": {"low": 0.0, "high": 1e-4, "log": True}}, "logarithmic range", "above 0"),
        ({"learning_rate": {"low": 1e-4, "hi": 1e-3}}, "unknown key hi", "did you mean high"),
        ({"learning_rate": {"low": 1e-4}}, "needs a number for high", "low"),
        ({"learning_rate": 1e-4}, "is a single value", r"\[train\]"),
        ({"noise_offset": {"low": 0.0, "high": 0.1, "step": 0.03}}, "cannot be reached", "step"),
        (
            {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": True, "step": 1e-4}},
            "log and step cannot be combined",
            "log",
        ),
        ({"optimizer_type": ["AdamW", "AdamW"]}, "a duplicate choice", "remove"),
        ({"resolution": [512, 768]}, "cannot be searched", "comparable"),
        (
            {"warmup_ratio": {"low": 0.0, "high": 0.1, "inactive_when": {"lr_schedule": "constant"}}},
            "not searched",
            "",
        ),
    ],
)
def test_a_mistake_in_the_space_is_one_line_and_what_to_do(
    table: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_space(table)
    import re

    assert re.search(hint, caught.value.hint)


def test_a_fixed_setting_leaves_the_space_with_all_that_decides_it(space: Space) -> None:
    assert "network_dim_log2" not in space.without({"network_dim"}).describe()
    smaller = space.without({"lr_scheduler"})
    assert dict(next(p for p in smaller if p.name == "warmup_ratio").inactive_when) == {}


def test_whole_numbers_follow_the_setting_not_the_spelling() -> None:
    (alpha,) = read_space({"network_alpha": {"low": 1, "high": 64}})
    assert isinstance(alpha.domain, Range) and not alpha.domain.whole
    (epochs,) = read_space({"max_train_epochs": {"low": 2.0, "high": 8.0}})
    assert isinstance(epochs.domain, Range) and epochs.domain.whole


def test_out_of_range_values_are_refused_where_optuna_would_only_warn(space: Space) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate = 5\.0 is outside"):
        space.check({**BASELINE, "learning_rate": 5.0}, "--enqueue x.toml")
    with pytest.raises(ConfigError, match="is not searched"):
        space.check({**BASELINE, "clip_skip": 2}, "--enqueue x.toml")


def test_places_put_different_choices_one_apart(space: Space) -> None:
    import numpy as np

    one, other = space.place(BASELINE), space.place({**BASELINE, "lr_scheduler": "constant"})
    assert np.linalg.norm(np.subtract(one, other)) == pytest.approx(1.0, abs=0.6)
    assert space.place(BASELINE) == space.place(dict(BASELINE))


@given(st.floats(0, 1))
def test_a_place_and_its_value_are_each_others_inverse(place: float) -> None:
    for domain in (Range(1e-5, 1e-2, log=True), Range(0.0, 3.0)):
        assert domain.to_unit(domain.from_unit(place)) == pytest.approx(place, abs=1e-9)
    assert Range(1, 9).holds(Range(1, 9).from_unit(place))


def test_a_choice_tells_true_from_one() -> None:
    assert Choice((True, False)).holds(True)
    assert not Choice((True, False)).holds(1)


def test_every_optimizer_can_be_searched_in_any_spelling(space: Space) -> None:
    """A schedule-free optimizer among others: the schedule is proposed and recorded, and not followed."""
    names = ["adamw", "AdamWScheduleFree", "lion_pytorch.Lion", "CAME", "AdamW8bit"]
    own = read_space({**TWELVE, "optimizer_type": names})
    own.check_edges(FIXED, BASELINE)
    choices = own.describe()["optimizer_type"]
    assert choices == "AdamW | AdamWScheduleFree | Lion | CAME | AdamW8bit"
    free = own.config({**BASELINE, "optimizer_type": "AdamWScheduleFree", "warmup_ratio": 0.1}, FIXED)
    assert (free.lr_scheduler, free.lr_warmup_steps) == ("cosine", 0.1) and not free.warms_up
    assert own.proposal(free.as_dict())["optimizer_type"] == "AdamWScheduleFree"


def test_arguments_that_one_of_the_optimizers_lacks_are_told_before_the_first_trial() -> None:
    space = read_space({"optimizer_type": ["AdamW", "SGDNesterov"]})
    fixed = FIXED.with_values({"optimizer_args": "betas=(0.9, 0.99)"})
    with pytest.raises(ConfigError, match="optimizer_type = SGDNesterov, but optimizer_args betas"):
        space.check_edges(fixed, {"optimizer_type": "AdamW"})
