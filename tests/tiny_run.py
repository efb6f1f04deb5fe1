"""Settings of tiny trained runs, and of the study that judges them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo.train.keeper
import trainer.bases.miniature
from tests.tiny import make_vae_overflow, save_folder, tiny_base
from trainer.events import Step

MINI_CLIP = Path(trainer.bases.miniature.__file__).parent / "weights" / "mini-clip"
# What a tiny base can be trained with; a test adds its rate, its batch and its length.
TINY = """
resolution = 64
bucket_no_upscale = false
bucket_reso_steps = 32
min_bucket_reso = 32
network_dim = 2
network_alpha = 2
optimizer_type = "AdamW"
"""
THREE_CHECKPOINTS = (
    TINY
    + """
learning_rate = 3e-2
train_batch_size = 2
max_train_epochs = 3
save_every_n_epochs = 1
output_name = "zkw"
"""
)
# As sd15-character.toml in the current folder it wins over the shipped one: fewer images, fewer steps.
JUDGING = """
[train]
optimizer_type = "AdamW"
[space]
learning_rate = { low = 1e-4, high = 1e-1, log = true }
[baseline]
learning_rate = 1e-3
[prompts]
counts = { train-like = 1, altered = 3 }
seeds = [0]
[confirmation]
counts = { train-like = 1, altered = 3 }
seeds = [1000]
[limits]
copy_rate = 1.0
diversity = 0.0
prior = 100.0
shown = -100.0    # a random base shows nothing
[sampling]
steps = 2
"""


def loud_base(folder: Path, family: str, *, overflows: bool = False) -> Path:
    """A random base draws almost one grey: louder, so that an adapter can be seen. ``overflows``: its VAE does so in
    fp16."""
    base = tiny_base(family)
    with torch.no_grad():
        base.unet.conv_out.weight.mul_(20)
        base.vae.decoder.conv_out.weight.mul_(10)
    if overflows:
        make_vae_overflow(base.vae)
    return save_folder(base, folder)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, how: signal.Signals) -> None:
    """Trainings get the signal after this step, once what it asks for is written."""
    original = hpo.train.keeper.Keeper.on_event

    def stopping(self: Any, event: Any, adapter: Any) -> None:
        original(self, event, adapter)
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), how)

    monkeypatch.setattr(hpo.train.keeper.Keeper, "on_event", stopping)
