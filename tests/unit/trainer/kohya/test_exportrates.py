"""What is exported to sd-scripts reads back as the same optimizer and the same rates."""

from pathlib import Path

import pytest
import tomlkit

from trainer import optimizers
from trainer.config import TrainConfig
from trainer.kohya import export
from trainer.kohya.read import read_kohya
from trainer.loop.schedules import learning_rate
from trainer.optimizers import OPTIMIZER_NAMES, OPTIMIZERS

STEPS = 30
SCHEDULES = [
    {"lr_scheduler": "constant", "lr_warmup_steps": 5},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 0.2},
    {"lr_scheduler": "polynomial", "unet_lr": 1e-3, "text_encoder_lr": 1e-5},
    {"lr_scheduler": "polynomial", "lr_scheduler_args": "lr_end=1e-6", "lr_warmup_steps": 3},
    {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
    {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 10, "lr_scheduler_args": "decay_type='linear'"},
    {"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 4, "lr_scheduler_timescale": 9},
    {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": "step_rules='1:5,0.1'"},
    {"lr_scheduler": "RexAnnealingWarmRestarts", "lr_scheduler_args": "gamma=0.9 first_cycle_max_steps=9"},
    {"lr_scheduler": "MultiStepLR", "lr_scheduler_args": "milestones=(3, 9)"},
    {"loraplus_lr_ratio": 16.0, "loraplus_text_encoder_lr_ratio": 4.0},
]


def round_trip(config: TrainConfig, folder: Path) -> tuple[TrainConfig, tuple[str, ...]]:
    found = export.to_kohya(config, "sd15", "sd15", folder)
    path = folder / "config.toml"
    path.write_text(tomlkit.dumps(dict(found.config)))
    file = read_kohya(path)
    assert not file.refused
    return file.config, found.notes


@pytest.fixture
def data(tmp_path: Path) -> str:
    from PIL import Image

    (tmp_path / "data" / "1_zed man").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "1_zed man" / "a.png")
    return str(tmp_path / "data")


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_every_optimizer_reads_back_as_itself(name: str, warmup: int, data: str, tmp_path: Path) -> None:
    config = TrainConfig(
        train_data_dir=data, optimizer_type=name, learning_rate=1.0, weight_decay=0.03, lr_warmup_steps=warmup
    )
    again, notes = round_trip(config, tmp_path)
    assert (again.optimizer_type, again.weight_decay) == (name, 0.03)
    arguments = OPTIMIZERS[name].arguments
    for argument in arguments:
        if (name, argument) == ("Prodigy", "safeguard_warmup"):
            continue  # in test_trainfile.py
        ours, theirs = (
            optimizers.effective(c.optimizer_type, c.optimizer_args, argument) for c in (config, again)
        )
        assert ours == theirs, argument
    assert any("pip install" in note for note in notes) == (
        OPTIMIZERS[name].package in ("dadaptation", "came-pytorch")
    )


@pytest.mark.parametrize("values", SCHEDULES)
def test_every_schedule_reads_back_with_the_same_rates(values: dict, data: str, tmp_path: Path) -> None:
    config = TrainConfig(train_data_dir=data, optimizer_type="AdamW", **values)
    again, _ = round_trip(config, tmp_path)
    assert again.loraplus_ratios == config.loraplus_ratios
    for step in range(STEPS):
        for full in (config.effective_unet_lr, config.effective_text_encoder_lr):
            expected = learning_rate(config, STEPS, step, full)
            assert learning_rate(again, STEPS, step, full) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_arguments_are_exported(data: str, tmp_path: Path) -> None:
    config = TrainConfig(train_data_dir=data, optimizer_type="AdamW", optimizer_args="betas=(0.9, 0.99)")
    again, _ = round_trip(config, tmp_path)
    assert again.optimizer_args == config.optimizer_args
