"""torch's fused optimizers against their plain ones, and a checkpoint that was begun without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.errors import Interrupted
from trainer.events import Step
from trainer.loop import optimizers
from trainer.loop.loop import Conduct, train
from trainer.optimizers import OPTIMIZERS


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_updates_are_those_of_the_plain_optimizer(name: str) -> None:
    config = tiny_config(optimizer_type=name, weight_decay=0.01)

    def updated(is_fused: bool) -> torch.Tensor:
        draw = torch.Generator().manual_seed(3)
        weights = [torch.nn.Parameter(torch.randn(5, 7, generator=draw)) for _ in range(4)]
        optimizer = optimizers.make([{"params": weights, "lr": 1e-2, "name": "unet"}], config)
        assert optimizer.param_groups[0]["fused"] is True
        optimizer.param_groups[0]["fused"] = is_fused
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(5, 7, generator=draw)
            optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    torch.testing.assert_close(updated(True), updated(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "precision", ["no", "fp16"]
)  # fp16: the loss scaler treats fused optimizers differently
def test_a_run_that_was_begun_with_the_plain_optimizer_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    base, config = (
        tiny_base("sd15"),
        tiny_config(max_train_epochs=4, optimizer_type="Adam", mixed_precision=precision),
    )

    def losses(folder: Path | None, stop: int = 99) -> list[float]:
        adapter, found, asked = inject(base, config), [], iter(range(1, 100))
        how = Conduct(checkpoints=folder, should_stop=lambda: next(asked) >= stop)
        try:
            for event in train(config, base, adapter, tiny_prepared(base, config), how):
                if isinstance(event, Step):
                    found.append(event.loss)
        except Interrupted:
            pass
        finally:
            adapter.remove()
        return found

    with monkeypatch.context() as earlier:
        earlier.setitem(OPTIMIZERS, "Adam", dataclasses.replace(OPTIMIZERS["Adam"], ours={}))
        whole = losses(None)
        begun = losses(tmp_path, stop=3)
    assert begun + losses(tmp_path) == whole
