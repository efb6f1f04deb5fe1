"""Optimizers and rates: every name trains, each component at its own rate, state survives a save."""

import io
import sys

import pytest
import torch

from tests.tiny import tiny_base
from trainer.adapters.adapter import inject
from trainer.config import OPTIMIZER_NAMES, TrainConfig
from trainer.data.steps import warmup_steps
from trainer.errors import ConfigError, MachineError
from trainer.loop import loop
from trainer.loop.optim import build_optimizer, in_training, other_rates, set_rate, set_rates_of_step
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
    for step in range(8):  # RAdamScheduleFree only watches the first five
        with in_training(optimizer, adapter.trainable(), None):
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
        for step in range(8):
            if step == save_after:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = build_optimizer(config, adapter)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            with in_training(optimizer, adapter.trainable(), None):
                fake_gradients(adapter, step)
                optimizer.step()
        return adapter.fingerprint()

    assert run(None) == run(6)


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


@pytest.mark.parametrize("name", ["RexAnnealingWarmRestarts", "CosineAnnealingWarmupRestarts"])
def test_no_cycles_give_these_schedules_no_length(name: str) -> None:
    values = {"lr_scheduler": name, "lr_scheduler_num_cycles": 0}
    with pytest.raises(ConfigError, match="no length of a cycle"):
        TrainConfig(lr_scheduler_args="gamma=0.9", **values)
    sound = TrainConfig(lr_scheduler_args="gamma=0.9 first_cycle_max_steps=4", **values)
    assert rate(sound, 10, 0) == 1.0


def test_a_polynomial_below_its_end_rate_stays_where_it_is():
    config = TrainConfig(learning_rate=1e-8, lr_scheduler="polynomial")
    assert [rate(config, 10, step) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"])
def test_outside_of_steps_a_schedule_free_adapter_has_its_averaged_weights(name):
    """What is saved and sampled is the average x of arXiv 2405.15682, gradients are taken at y = (1-β)z + βx."""
    config = config_for(name)
    adapter = inject(tiny_base("sd15"), config)
    optimizer = build_optimizer(config, adapter)
    weights = adapter.trainable()
    for step in range(8):
        averaged = [weight.clone() for weight in weights]
        with in_training(optimizer, weights, None):
            at = [weight.clone() for weight in weights]
            fake_gradients(adapter, step)
            optimizer.step()
    beta = 0.9
    for x, y, weight in zip(averaged, at, weights, strict=True):
        z_before = (y - beta * x) / (1 - beta)
        assert not torch.equal(x, y)
        torch.testing.assert_close(y, (1 - beta) * z_before + beta * x, rtol=1e-5, atol=1e-7)
        z = optimizer.state[weight]["z"]
        # the average moved towards z, by less than z itself moved away from it
        assert (weight - x).norm() < (z - x).norm()


def test_an_optimizer_without_averages_is_left_alone():
    config = config_for("AdamW")
    adapter = inject(tiny_base("sd15"), config)
    before = adapter.fingerprint()
    with in_training(build_optimizer(config, adapter), adapter.trainable(), None):
        assert adapter.fingerprint() == before


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    config = config_for("Lion")
    with pytest.raises(MachineError, match="optimizer_type = Lion needs the package lion-pytorch") as caught:
        build_optimizer(config, inject(tiny_base("sd15"), config))
    assert "pip install lion-pytorch" in caught.value.hint


def test_loraplus_is_not_the_rate_of_the_log():
    config = config_for("AdamW", loraplus_lr_ratio=16.0, lr_scheduler="constant")
    optimizer = build_optimizer(config, inject(tiny_base("sd15"), config))
    rates = set_rates_of_step(optimizer, config, 10, 0)
    assert rates == {"unet": 1e-3, "unet plus": 16e-3, "text_encoder": 1e-3, "text_encoder plus": 16e-3}
    assert loop._highest(rates, "unet") == loop._highest(rates, "text_encoder") == 1e-3


@pytest.mark.parametrize("ratio", [None, 0.0, 1.0])
def test_a_ratio_of_one_is_no_loraplus(ratio):
    config = config_for("Prodigy", loraplus_lr_ratio=ratio, network_train_unet_only=True)
    optimizer = build_optimizer(config, inject(tiny_base("sd15"), config))
    assert [group["name"] for group in optimizer.param_groups] == ["unet"]


def test_loraplus_does_nothing_where_there_is_no_lora_up():
    config = config_for("AdamW", loraplus_lr_ratio=16.0, network_type="LoHa", network_train_unet_only=True)
    optimizer = build_optimizer(config, inject(tiny_base("sd15"), config))
    assert [group["name"] for group in optimizer.param_groups] == ["unet"]


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "AdamWScheduleFree", "Adafactor"])
def test_the_frozen_half_of_lora_fa_has_neither_decay_nor_state(name):
    config = config_for(name, network_type="LoRA-FA", weight_decay=0.5)
    adapter = inject(tiny_base("sd15"), config)
    downs = [layer.weights["lora_down.weight"] for layer in adapter.layers]
    before = [weight.clone() for weight in downs]
    optimizer = build_optimizer(config, adapter)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in held} == {id(weight) for weight in adapter.trainable()}
    for step in range(3):
        with in_training(optimizer, adapter.trainable(), None):
            fake_gradients(adapter, step)
            optimizer.step()
    assert all(torch.equal(weight, old) for weight, old in zip(downs, before, strict=True))
    assert not any(weight in optimizer.state for weight in downs)


def test_a_frozen_text_encoder_has_no_group():
    config = config_for("AdamW", loraplus_lr_ratio=4.0)
    adapter = inject(tiny_base("sdxl"), config)
    adapter.freeze_text_encoders()
    optimizer = build_optimizer(config, adapter)
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "unet plus"]


@pytest.mark.parametrize("kind, names", [("DyLoRA", ["unet", "unet plus"]), ("LoRA-FA", ["unet"])])
def test_loraplus_of_other_kinds_with_lora_up_is_that_of_sd_scripts(kind, names):
    """networks/dylora.py has it; networks/lora_fa.py, which trains lora_up only, does not."""
    config = config_for("AdamW", loraplus_lr_ratio=16.0, network_type=kind, network_train_unet_only=True)
    optimizer = build_optimizer(config, inject(tiny_base("sd15"), config))
    assert [group["name"] for group in optimizer.param_groups] == names


def test_further_rates_have_the_names_of_sd_scripts_log():
    """sd-scripts train_network.py:generate_step_logs: lr/unet plus, lr/d*lr/textencoder."""
    plus = config_for("AdamW", loraplus_lr_ratio=16.0, lr_scheduler="constant")
    optimizer = build_optimizer(plus, inject(tiny_base("sd15"), plus))
    rates = set_rates_of_step(optimizer, plus, 10, 0)
    assert other_rates(optimizer, rates) == {"lr/unet plus": 16e-3, "lr/textencoder plus": 16e-3}
    finds = config_for("Prodigy", optimizer_args="d0=1e-5", lr_scheduler="constant")
    optimizer = build_optimizer(finds, inject(tiny_base("sd15"), finds))
    rates = set_rates_of_step(optimizer, finds, 10, 0)
    assert other_rates(optimizer, rates) == {"lr/d*lr/unet": 1e-5, "lr/d*lr/textencoder": 1e-5}
    plain = config_for("AdamW")
    optimizer = build_optimizer(plain, inject(tiny_base("sd15"), plain))
    assert other_rates(optimizer, set_rates_of_step(optimizer, plain, 10, 0)) == {}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ExponentialLR", "gamma=10"), ("StepLR", "step_size=1 gamma=1000"), ("ExponentialLR", "gamma=10.0")],
)
def test_a_rate_that_no_float_can_hold_is_infinite_as_in_torch(name, arguments):
    config = TrainConfig(lr_scheduler=name, lr_scheduler_args=arguments)
    assert rate(config, 1000, 900) == float("inf")
