"""Train N equals train k, kill -9, resume – for every k, bitwise: weights, losses, rates, counters."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.zygote import attempt
from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.config import TrainConfig
from trainer.events import Saved, Step, Validated
from trainer.loop.loop import Conduct, train

pytestmark = pytest.mark.faults
STEPS = 6  # 3 steps an epoch, whose last batch is smaller; a kill falls into every place of it
SETTINGS = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_epochs": 2,
    "lr_warmup_steps": 2,
    "network_dropout": 0.2,
    "rank_dropout": 0.2,
    "module_dropout": 0.2,
    "scale_weight_norms": 0.02,
    "noise_offset": 0.05,
    "noise_offset_random_strength": True,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
    "min_snr_gamma": 5.0,
    "loss_type": "huber",
    "shuffle_caption": True,
}


def settings(kind: str) -> TrainConfig:
    own = {"LoCon": {"conv_dim": 2}, "LoHa": {"network_dropout": 0.0}, "LoKr": {"network_dropout": 0.0}}
    return tiny_config(**(SETTINGS | {"network_type": kind} | own.get(kind, {})))


def run(config: TrainConfig, folder: Path, kill_after: int | None = None) -> tuple[list[object], str]:
    """Events without wall-clock and the fingerprint at the end.  Dies after the checkpoint of a step."""
    torch.set_num_threads(1)
    base = tiny_base("sd15")
    adapter = inject(base, config)
    data, split = tiny_prepared(base, config, images=11), tiny_prepared(base, config, images=1)
    said: list[object] = []
    how = Conduct(checkpoints=folder, checkpoint_every_seconds=0, validate_on=split)
    for event in train(config, base, adapter, data, how):
        if isinstance(event, Saved) and event.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(event, Step):
            said.append((event.step, event.epoch, event.loss, event.grad_norm, event.learning_rate))
        elif not isinstance(event, Saved):
            said.append(event)
    return said, adapter.fingerprint()


EVERY = range(1, STEPS + 1)


@pytest.mark.parametrize(
    "kind, kills", [("LoRA", EVERY), ("LoCon", (2,)), ("DoRA", (2, 4)), ("LoHa", (4,)), ("LoKr", (2,))]
)
def test_a_run_killed_after_any_step_ends_as_the_run_that_was_never_killed(kind, kills, tmp_path):
    """A1 · weight 5 · A run is killed after any of its steps → The same command goes on from the newest
    checkpoint and ends with bitwise the same LoRA (on a CPU).
    """
    config = settings(kind)
    whole, weights = run(config, tmp_path / "whole")
    assert sum(isinstance(event, Validated) for event in whole) == 2
    for k in kills:
        folder = tmp_path / f"killed_{k}"
        assert attempt(run, config, folder, k) == -signal.SIGKILL
        rest, resumed = run(config, folder)
        assert resumed == weights, k
        assert rest == whole[len(whole) - len(rest) :], k
        steps = [event[0] for event in rest if isinstance(event, tuple)]
        assert steps == list(range(k + 1, STEPS + 1))


def test_a_run_killed_four_times_ends_as_the_run_that_was_never_killed(tmp_path):
    config = settings("LoRA")
    _, weights = run(config, tmp_path / "whole")
    for k in (1, 2, 4, 5):
        assert attempt(run, config, tmp_path / "killed", k) == -signal.SIGKILL
    assert run(config, tmp_path / "killed")[1] == weights


@pytest.mark.parametrize(
    "kind, arguments, more",
    [
        (
            "RAdamScheduleFree",
            "betas=(0.9, 0.5)",
            {},
        ),  # a small second beta: it moves from the second step on
        ("AdamWScheduleFree", "", {"full_bf16": True, "mixed_precision": "bf16"}),
        ("Prodigy", "d_coef=2.0 safeguard_warmup=True", {"learning_rate": 1.0}),
        ("DAdaptAdam", "decouple=True", {"learning_rate": 1.0}),
        ("Adafactor", "relative_step=True scale_parameter=True", {}),
        ("CAME", "", {"loraplus_lr_ratio": 4.0}),
        (
            "AdamW",
            "betas=(0.9, 0.99)",
            {"lr_scheduler": "RexAnnealingWarmRestarts", "lr_scheduler_args": "gamma=0.9"},
        ),
    ],
)
def test_every_kind_of_optimizer_state_survives_a_kill(kind, arguments, more, tmp_path):
    config = settings("LoRA").with_values({"optimizer_type": kind, "optimizer_args": arguments, **more})
    whole, weights = run(config, tmp_path / "whole")
    assert len({event[2] for event in whole if isinstance(event, tuple)}) == STEPS
    for k in (2, 4):
        assert attempt(run, config, tmp_path / "killed", k) == -signal.SIGKILL
    rest, resumed = run(config, tmp_path / "killed")
    assert resumed == weights
    assert rest == whole[len(whole) - len(rest) :]
