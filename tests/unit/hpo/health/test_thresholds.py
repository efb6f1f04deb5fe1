"""[health]: the defaults are the users' table, and a mistake in a file is named."""

from __future__ import annotations

import pytest

from hpo.study.thresholds import Thresholds, read_thresholds
from trainer.errors import ConfigError


def test_the_defaults_are_the_table_of_a_long_run() -> None:
    usual = Thresholds()
    assert usual.ram_used == (70, 85) and usual.ram_available == (8, 4) and usual.swap_used == (0.5, 2)
    assert usual.gpu_temperature == (75, 85) and (usual.hang_minutes, usual.gpu_idle) == (30, 5)
    assert usual.loss_swing == 0.05
    assert usual.vram_limit_bytes(24 * 10**9) == int(0.98 * 24 * 10**9)
    sixteen = 16_900_000_000
    assert usual.vram_limit_bytes(sixteen) == int(sixteen * 15.5 / 16)
    assert read_thresholds({"vram_used": 90}).vram_limit_bytes(sixteen) == int(0.9 * sixteen)


def test_own_values_replace_single_defaults() -> None:
    own = read_thresholds({"ram_used": [50, 60.5], "acts": False})
    assert own.ram_used == (50, 60.5) and not own.acts and own.swap_used == Thresholds().swap_used


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"ram_usd": [1, 2]}, "did you mean ram_used"),
        ({"ram_used": 70}, "ram_used"),
        ({"ram_used": [85, 70]}, "not a pair of warning and danger"),
        ({"ram_used": [85]}, "not a pair"),
        ({"ram_available": [4, 8]}, "the first one is higher"),
        ({"ram_used": [70, 120]}, "120"),
        ({"hang_minutes": float("nan")}, "hang_minutes"),
        ({"gpu_temperature": ["hot", "hotter"]}, "gpu_temperature"),
        ([], "not a section"),
    ],
)
def test_a_mistake_is_named(body: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_thresholds(body)
    assert said in str(caught.value)
