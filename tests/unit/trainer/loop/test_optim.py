"""Optimizers and rates: every name trains, each component at its own rate, state survives a save."""

import io

import pytest
import torch

from tests.tiny import tiny_base
from trainer.adapters.adapter import inject
from trainer.config import OPTIMIZER_NAMES, TrainConfig
from trainer.data.steps import warmup_steps
from trainer.errors import ConfigError
from trainer.loop.optim import build_optimizer, set_rate
from trainer.loop.schedules import rate


def config_for(name: str, **values) -> TrainConfig:
    finds_its_rate = name == "Prodigy" or name.startswith("DAdapt")
    rates = {"learning_rate": 1.0} if finds_its_rate else {"learning_rate": 1e-3}
    return TrainConfig(optimizer_type=name, network_dim=4, network_alpha=4, **(rates | values))


def fake_gradients(adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter.trainable():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_moves_every_weight_and_prints_nothing(name, capsys):
    adapter = inject(tiny_base("sd15"), config_for(name))
    before = [weight.clone() for weight in adapter.trainable()]
    optimizer = build_optimizer(config_for(name), adapter)
    for step in range(3):
        fake_gradients(adapter, step)
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, adapter.trainable(), strict=True))
    assert all(weight.isfinite().all() for weight in adapter.trainable())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_a_saved_and_restored_optimizer_goes_on_bitwise(name):
    config = config_for(name)

    def run(save_after: int | None) -> str:
        adapter = inject(tiny_base("sd15"), config)
        optimizer = build_optimizer(config, adapter)
        for step in range(6):
            if step == save_after:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = build_optimizer(config, adapter)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            fake_gradients(adapter, step)
            optimizer.step()
        return adapter.fingerprint()

    assert run(None) == run(3)


def test_unet_and_text_encoder_have_their_own_rates_through_the_schedule():
    config = TrainConfig(unet_lr=1e-3, text_encoder_lr=2e-4, lr_scheduler="linear", optimizer_type="AdamW")
    optimizer = build_optimizer(config, inject(tiny_base("sdxl"), config))
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "text_encoder"]
    assert set_rate(optimizer, 0.5) == {"unet": 5e-4, "text_encoder": 1e-4}
    assert set_rate(optimizer, 1.0) == {"unet": 1e-3, "text_encoder": 2e-4}


def test_a_component_that_is_not_trained_has_no_group():
    config = TrainConfig(network_train_unet_only=True, optimizer_type="AdamW")
    optimizer = build_optimizer(config, inject(tiny_base("sdxl"), config))
    assert [group["name"] for group in optimizer.param_groups] == ["unet"]


def test_prodigy_refuses_a_text_encoder_rate_of_its_own():
    with pytest.raises(ConfigError, match="Prodigy adapts one learning rate"):
        TrainConfig(optimizer_type="Prodigy", learning_rate=1.0, text_encoder_lr=0.5)


def test_prodigy_survives_a_warm_up_that_starts_at_zero():
    config = config_for("Prodigy", lr_warmup_steps=3, lr_scheduler="cosine")
    adapter = inject(tiny_base("sd15"), config)
    optimizer = build_optimizer(config, adapter)
    for step in range(6):
        set_rate(optimizer, rate(config, 6, step))
        fake_gradients(adapter, step)
        optimizer.step()
    assert all(weight.isfinite().all() for weight in adapter.trainable())


@pytest.mark.parametrize("given, steps", [(0, 0), (0.1, 20), (0.999, 199), (1, 1), (50, 50)])
def test_warm_up_is_in_steps_or_a_share_below_one(given, steps):
    assert warmup_steps(TrainConfig(lr_warmup_steps=given), 200) == steps


def test_a_polynomial_below_its_end_rate_stays_where_it_is():
    config = TrainConfig(learning_rate=1e-8, lr_scheduler="polynomial")
    assert [rate(config, 10, step) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]
