"""Profiles and families: all shipped files are valid, and an error in a user's file is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.study.config import find_study
from hpo.transfer.profile import SHIPPED, profiles_of, read_family, read_profile
from trainer.errors import ConfigError


def test_everything_shipped_is_read() -> None:
    for path in (SHIPPED / "families").glob("*.toml"):
        assert read_family(path.stem).default_profile in profiles_of(path.stem)
    for path in (SHIPPED / "profiles").glob("*.toml"):
        assert read_profile(path.stem).name == path.stem


def test_a_profile_is_not_taken_for_a_study() -> None:
    with pytest.raises(ConfigError) as error:
        find_study("sdxl-16gb", "sd15")
    assert "sdxl-keep" not in error.value.hint


def test_a_profile_of_ones_own_is_a_file_or_a_name_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "studies" / "profiles").mkdir(parents=True)
    own = tmp_path / "studies" / "profiles" / "mine.toml"
    own.write_text('family = "sdxl"\n[batch]\ntrain_batch_size = 3\n')
    monkeypatch.chdir(tmp_path)
    assert read_profile("mine") == read_profile(str(own)) and read_profile("mine").micro_batch(8) == 3


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "family is missing", "sdxl"),
        ('family = "sdx"', "no family sdx", "sdxl"),
        ('family = "sdxl"\nvram = 12', "unknown key vram", "vram_gb"),
        ('family = "sdxl"\nvram_gb = "much"', "not a number", ""),
        ('family = "sdxl"\n[rate]\nrule = "sqrt"', "rule = sqrt", "sqrt_batch"),
        ('family = "sdxl"\n[rate]\ntext_encoder_ratio = 0.9', "outside its limits", "0.5 to 0.8"),
        ('family = "sdxl"\n[batch]\ntrain_batch_size = 1.5', "not a whole number", ""),
        ('family = "sdxl"\n[batch]\nat = [{ train_batch_size = 2 }]', "without from_gb", ""),
        ('family = "sdxl"\n[optimizer]\neight_bit = 1', "not true or false", ""),
        ('family = "sdxl"\n[settings]\nlearning_rate = 1e-4', "decided by the rules", ""),
        ('family = "sdxl"\n[settings]\nmixed_precison = "bf16"', "unknown setting", "mixed_precision"),
        ('family = "sdxl"\n[settings]\nvae_batch_size = 0', "outside its limits", ""),
        ('family = "sdxl"\n[limits]\nlearning_rate_low = 1e-2\nlearning_rate_high = 1e-3', "above", "swap"),
        ("family = ", "not valid TOML", ""),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_profile(str(path))
    assert message in error.value.message and "mine.toml" in error.value.message and hint in error.value.hint


def test_a_missing_profile_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_profile("sdxl-16g")
    assert "sdxl-16gb" in error.value.hint
    with pytest.raises(ConfigError):
        read_profile(str(tmp_path / "absent.toml"))
