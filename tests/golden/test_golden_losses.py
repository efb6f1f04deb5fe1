"""The trainer's arithmetic stays what it was: losses of a small training against recorded ones.

RELATIVE is what other processors and libraries may differ by, with a wide margin: fp32 sums in another order
differ by about 1e-6 a step, while every setting in the recorded run changes some loss by more than 1e-3
(test_a_changed_setting_shows).  On one machine a repeat is bitwise the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.golden import record
from trainer.bases.base import Base
from trainer.bases.load import load_base

RELATIVE = 1e-3


@pytest.fixture(scope="module")
def base() -> Iterator[Base]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_base("mini-sd15")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record.draw(tmp_path_factory.mktemp("golden") / "images")


def test_the_losses_are_the_recorded_ones_and_a_repeat_is_bitwise_the_same(base: Base, images: Path) -> None:
    """C6 · weight 5 · A change of the code changes what training computes → A test fails: the losses of
    recorded runs have to be the same.
    """
    recorded = json.loads(record.FILE.read_text())
    assert recorded["settings"] == record.SETTINGS, "record anew: python -m tests.golden.record"
    losses = record.golden_losses(base, images)
    assert len(losses) == record.SETTINGS["max_train_steps"]
    assert losses == pytest.approx(recorded["losses"], rel=RELATIVE)
    assert record.golden_losses(base, images) == losses


@pytest.mark.parametrize(("name", "value"), [("min_snr_gamma", 4), ("noise_offset", 0.06)])
def test_a_changed_setting_shows(
    base: Base, images: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    recorded = json.loads(record.FILE.read_text())["losses"]
    monkeypatch.setitem(record.SETTINGS, name, value)
    assert record.golden_losses(base, images) != pytest.approx(recorded, rel=RELATIVE)
