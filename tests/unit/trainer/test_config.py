"""Settings: every value is checked once, against the limits in its declaration."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import SETTINGS, TrainConfig, check_value
from trainer.errors import ConfigError


def test_the_defaults_are_valid_and_documented() -> None:
    config = TrainConfig()
    assert set(config.as_dict()) == set(SETTINGS)
    assert all(facts.doc for facts in SETTINGS.values())
    assert TrainConfig(**config.as_dict()) == config


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_values_beyond_a_settings_limits_are_refused_with_the_limits(name: str) -> None:
    facts = SETTINGS[name]
    if facts.choices:
        with pytest.raises(ConfigError, match=name):
            check_value(name, "nonsense")
    if facts.low is not None and facts.high is not None:
        for value in (facts.low - 1, facts.high * 2 + 1, float("nan"), float("inf"), 10**400, "1", True, [1]):
            with pytest.raises(ConfigError, match=name) as caught:
                check_value(name, value)
            assert caught.value.exit_code == 2 and caught.value.hint
        if facts.low_is_excluded:
            with pytest.raises(ConfigError, match="outside its limits"):
                check_value(name, facts.low)
        else:
            assert check_value(name, facts.low) == facts.low
        assert check_value(name, facts.high) == facts.high


def test_a_mistyped_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="lerning_rate") as caught:
        TrainConfig().with_values({"lerning_rate": 1e-4})
    assert caught.value.hint == "did you mean learning_rate?"


def test_a_mistyped_choice_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(optimizer_type="adamw8bits")
    assert "AdamW8bit" in caught.value.hint


def test_numbers_take_the_settings_own_type() -> None:
    config = TrainConfig(network_dim=8.0, network_alpha=4)  # type: ignore[arg-type]
    assert type(config.network_dim) is int and type(config.network_alpha) is float
    with pytest.raises(ConfigError, match="not a whole number"):
        TrainConfig(network_dim=8.5)  # type: ignore[arg-type]


def test_with_values_makes_a_checked_copy() -> None:
    config = TrainConfig()
    changed = config.with_values({"seed": 7})
    assert changed.seed == 7 and config.seed == 42
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "unet", "text"),
    [
        ({"learning_rate": 1e-4}, 1e-4, 1e-4),
        ({"learning_rate": 1e-4, "unet_lr": 2e-4, "text_encoder_lr": 5e-5}, 2e-4, 5e-5),
        ({"text_encoder_lr": 0}, 1e-4, 0.0),
        ({"unet_lr": 0}, 0.0, 1e-4),
        ({"text_encoder_lr": 5e-5, "network_train_unet_only": True}, 1e-4, 0.0),
    ],
)
def test_learning_rate_is_the_fallback_of_both_rates(
    values: dict[str, Any], unet: float, text: float
) -> None:
    config = TrainConfig().with_values(values)
    assert (config.effective_unet_lr, config.effective_text_encoder_lr) == (unet, text)
    assert (config.trains_unet, config.trains_text_encoder) == (unet > 0, text > 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_train_epochs": None}, "neither max_train_epochs nor max_train_steps"),
        ({"min_bucket_reso": 512, "max_bucket_reso": 256}, "min_bucket_reso 512 is above"),
        ({"learning_rate": 0}, "nothing is trained"),
        ({"unet_lr": 0, "network_train_unet_only": True}, "nothing is trained"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5}, "Prodigy"),
        ({"seed": None}, "seed must have a value"),
        ({"enable_bucket": 1}, "not true or false"),
        ({"output_name": 3}, "is not a text"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig().with_values(values)
    assert caught.value.hint


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.binary()
)


@given(st.sampled_from(sorted(SETTINGS)), anything)
def test_any_value_is_accepted_or_a_config_error(name: str, value: Any) -> None:
    try:
        accepted = check_value(name, value)
    except ConfigError as error:
        assert name in error.message
    else:
        assert check_value(name, accepted) == accepted


def test_settings_need_no_torch() -> None:
    code = "import sys, trainer.config, trainer.kohya.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
