"""Rebuilding the miniature: stages save, resume after a kill, and put their data on the device of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.bases.miniature import fitting, stage_vae
from trainer.bases.miniature.fitting import Plan, finished, fit

PLAN = Plan("toy", steps=6, lr=1e-2, warmup_steps=2, ema=0.9, muon_lr=1e-2)


class Killed(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(work: Path, *, kill_at: int | None = None) -> nn.Module:
    module = network()

    def loss_of_step(step: int) -> Tensor:
        if step == kill_at:
            raise Killed
        return module(torch.randn(5, 4)).square().mean()

    fit(PLAN, module, loss_of_step, work)
    return module


@pytest.mark.parametrize("kill_at", range(1, PLAN.steps))
def test_a_stage_that_was_killed_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)  # a checkpoint after every step
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at=kill_at)
    assert not finished(PLAN, tmp_path / "killed")
    again = train(tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    both = [load_file(tmp_path / place / "toy.safetensors") for place in ("whole", "killed")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][k], both[1][k]) for k in both[0])


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    trained = train(tmp_path)
    assert finished(PLAN, tmp_path)
    again = train(tmp_path, kill_at=0)  # its loss is not computed
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_the_pictures_of_the_last_check_are_where_the_autoencoder_is() -> None:
    seen: list[torch.device] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].device)
        raise Killed

    vae = stage_vae.new_vae().to("meta")
    vae.encoder.register_forward_pre_hook(look)
    with pytest.raises(Killed):
        stage_vae.reconstruction_error(vae)
    assert seen == [torch.device("meta")]
