"""How much disk the rest of a run needs, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.train.needs import FileSizes, file_sizes, needs
from hpo.train.plan import Steps
from tests.tiny import tiny_base
from trainer.adapters import lorafile
from trainer.config import TrainConfig
from trainer.settings import NETWORK_TYPES
from trainer.tensorfile import load_tensors

SIZES = FileSizes(weights_bytes=10, state_bytes=1000, samples_bytes=7)


def config(**values: object) -> TrainConfig:
    return TrainConfig().with_values({"save_every_n_epochs": None, **values})


def steps(per_epoch: int, epochs: int) -> Steps:
    fields = {name: 0 for name in Steps.__dataclass_fields__}
    return Steps(
        **{**fields, "steps_per_epoch": per_epoch, "epochs": epochs, "total_steps": per_epoch * epochs}
    )


def test_a_run_without_copies_needs_its_state_and_its_result() -> None:
    found = needs(config(), steps(10, 5), SIZES, 0)
    assert (found.next_bytes, found.rest_bytes) == (1010, 1010)


def test_copies_and_samples_that_are_still_to_come_count() -> None:
    saving = config(save_every_n_epochs=2, sample_every_n_epochs=1)
    assert needs(saving, steps(10, 10), SIZES, 0).rest_bytes == 1000 + 10 * (4 + 1) + 7 * 10
    assert needs(saving, steps(10, 10), SIZES, 75).rest_bytes == 1000 + 10 * (1 + 1) + 7 * 3
    assert needs(saving, steps(10, 10), SIZES, 75).next_bytes == 1000 + 10 + 7
    every = config(save_every_n_steps=10)
    assert needs(every, steps(10, 10), SIZES, 42).rest_bytes == 1000 + 10 * (5 + 1)


def test_copies_that_are_deleted_again_count_no_more_than_are_kept() -> None:
    saving = config(save_every_n_epochs=1, save_last_n_epochs=3)
    assert needs(saving, steps(10, 100), SIZES, 0).rest_bytes == 1000 + 10 * (4 + 1)


@pytest.mark.parametrize("kind", NETWORK_TYPES)
def test_the_bytes_that_a_rank_predicts_are_those_of_a_whole_file(kind: str, tmp_path: Path) -> None:
    """The file has at least the predicted bytes, so a whole file is no alarm – and not many more, so that half a file
    is one."""
    base = tiny_base("sd15")
    extra = {"conv_dim": 2, "conv_alpha": 1.0} if kind == "LoCon" else {}
    settings = TrainConfig().with_values(
        {"network_type": kind, "network_dim": 4, "network_alpha": 4, **extra}
    )
    predicted = file_sizes(base, settings).weights_bytes
    adapter = lorafile.begin(base, settings)
    try:
        lorafile.write(tmp_path / "x.safetensors", adapter, settings)
    finally:
        adapter.remove()
    tensors = sum(tensor.nbytes for tensor in load_tensors(tmp_path / "x.safetensors").values())
    size = (tmp_path / "x.safetensors").stat().st_size
    assert size >= 0.9 * predicted, "a whole file must not be an alarm"
    if kind in ("LoRA", "LoCon"):  # DoRA keeps its magnitudes in fp32
        assert predicted == pytest.approx(tensors, rel=0.05)
