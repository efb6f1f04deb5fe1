"""What an adapter promises: kohya's initial state, fp32, dropout after lora_down, and no trace after
removal."""

import math
import warnings

import pytest
import torch

from tests.tiny import tiny_base
from trainer.adapter import inject, keyed_generator, targets_of
from trainer.bases.base import Sizes
from trainer.config import TrainConfig
from trainer.errors import Diverged

SIZES = Sizes((64, 64), (0, 0), (64, 64))
CONFIG = TrainConfig(network_dim=4, network_alpha=2, seed=7)


def output(base):
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = base.encode_text(["a cat", "a dog"])
        return base.predict(noisy, torch.tensor([100, 700]), states, [SIZES, SIZES])


def randomise(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("conv_dim", [None, 2])
def test_a_fresh_adapter_changes_nothing_and_every_weight_of_it_is_trainable(family, conv_dim):
    base = tiny_base(family)
    before = output(base)
    adapter = inject(base, CONFIG.with_values({"conv_dim": conv_dim}))
    torch.testing.assert_close(output(base), before, rtol=0, atol=0)
    trainable = {id(p) for module in base.modules() for p in module.parameters() if p.requires_grad}
    assert trainable == {id(weight) for weight in adapter.trainable()}
    randomise(adapter)
    assert not torch.allclose(output(base), before)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("conv_dim", [None, 2])
def test_removal_restores_the_base_bitwise_and_leaves_nothing_behind(family, conv_dim):
    base = tiny_base(family)
    modules = {name: list(model.named_modules()) for name, model in base.components().items()}
    values = {
        name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in base.components().items()
    }
    before = output(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            adapter = inject(base, CONFIG.with_values({"conv_dim": conv_dim, "network_dropout": 0.5}))
            randomise(adapter)
            adapter.apply_dropout(1)
            output(base)
            adapter.remove()
            adapter.remove()
    for name, model in base.components().items():
        assert [n for n, _ in model.named_modules()] == [n for n, _ in modules[name]]
        assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules[name], strict=True))
        assert all(torch.equal(v, values[name][k]) for k, v in model.state_dict().items())
        assert not hasattr(model, "peft_config")
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(output(base), before)


def test_the_start_is_kohyas_kaiming_uniform_down_and_zero_up():
    base = tiny_base("sd15")
    state = inject(base, CONFIG).state()
    down = torch.cat([v.flatten() for k, v in state.items() if k.endswith("attn2_to_k.lora_down.weight")])
    bound = 1 / math.sqrt(16)  # kaiming_uniform with a = √5: ±1/√fan_in, fan_in = text width
    assert down.abs().max() <= bound
    assert down.abs().max() > 0.9 * bound
    assert abs(down.mean()) < 0.1 * bound
    assert all(not v.any() for k, v in state.items() if k.endswith("lora_up.weight"))
    assert all(v.item() == 2.0 for k, v in state.items() if k.endswith(".alpha"))


def test_the_start_depends_on_the_seed_and_the_modules_name_only():
    base = tiny_base("sd15")

    def start(**values):
        adapter = inject(base, CONFIG.with_values(values))
        state = adapter.state()
        adapter.remove()
        return state

    first = start()
    torch.manual_seed(123)
    random_state = torch.get_rng_state()
    again = start()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    unet_only = start(network_train_unet_only=True)
    assert unet_only.keys() < first.keys()
    assert all(torch.equal(first[key], unet_only[key]) for key in unet_only)
    other = start(seed=8)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_weights_are_fp32_on_a_half_precision_base():
    base = tiny_base("sd15")
    for module in base.modules():
        module.to(torch.bfloat16)
    adapter = inject(base, CONFIG)
    assert {weight.dtype for weight in adapter.trainable()} == {torch.float32}


def test_rates_of_zero_train_nothing_of_that_component():
    base = tiny_base("sdxl")
    assert {t.component for t in targets_of(base, CONFIG)} == {"unet", "text_encoder", "text_encoder_2"}
    assert {t.component for t in targets_of(base, CONFIG.with_values({"text_encoder_lr": 0}))} == {"unet"}
    assert {t.component for t in targets_of(base, CONFIG.with_values({"unet_lr": 0}))} == {
        "text_encoder",
        "text_encoder_2",
    }


@pytest.mark.parametrize("family, added", [("sd15", 86), ("sdxl", 66)])
def test_conv_dim_is_the_rank_of_3x3_convolutions_only(family, added):
    base = tiny_base(family, full_structure=True)
    values = {"conv_dim": 2, "conv_alpha": 1, "network_train_unet_only": True}
    plain = targets_of(base, CONFIG.with_values({"network_train_unet_only": True}))
    targets = targets_of(base, CONFIG.with_values(values))
    assert len(targets) - len(plain) == added
    for target in targets:
        layer = base.unet.get_submodule(target.path)
        wide = getattr(layer, "kernel_size", (1,))[0] == 3
        assert (target.rank, target.alpha) == ((2, 1.0) if wide else (4, 2.0)), target
    state = inject(base, CONFIG.with_values(values)).state()
    conv1 = base.conv_names()["unet"]["down_blocks.1.resnets.0.conv1"]
    assert state[f"{conv1}.lora_down.weight"].shape == (2, 8, 3, 3)
    assert state[f"{conv1}.lora_up.weight"].shape == (16, 2, 1, 1)


def test_the_adapters_scale_is_alpha_over_rank():
    base = tiny_base("sd15")
    adapter = inject(base, CONFIG)
    randomise(adapter)
    layer = adapter.layers[0]
    wrapped = base.unet.get_submodule(layer.target.path)
    x = torch.randn(3, wrapped.base_layer.in_features if hasattr(wrapped.base_layer, "in_features") else 8)
    if x.shape[1] != layer.down.weight.shape[1] or layer.down.weight.dim() == 4:
        layer = next(entry for entry in adapter.layers if entry.down.weight.dim() == 2)
        wrapped = base.components()[layer.target.component].get_submodule(layer.target.path)
        x = torch.randn(3, layer.down.weight.shape[1])
    expected = wrapped.base_layer(x) + (x @ layer.down.weight.T @ layer.up.weight.T) * (2 / 4)
    torch.testing.assert_close(wrapped(x), expected)


def test_dropout_acts_after_lora_down_and_only_while_a_key_is_set():
    base = tiny_base("sd15")
    adapter = inject(base, CONFIG.with_values({"network_dropout": 0.5}))
    layer = next(entry for entry in adapter.layers if entry.down.weight.dim() == 2)
    x = torch.randn(64, layer.down.weight.shape[1])
    whole = x @ layer.down.weight.T
    torch.testing.assert_close(layer.down(x), whole)
    adapter.apply_dropout(1, 2, 3)
    dropped = layer.down(x)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], (whole * 2)[kept])
    assert torch.equal(dropped, layer.down(x)), "recomputation must see the same mask"
    adapter.apply_dropout(1, 2, 4)
    assert not torch.equal(dropped, layer.down(x))
    adapter.apply_dropout()
    torch.testing.assert_close(layer.down(x), whole)


def test_without_dropout_no_layer_has_a_hook():
    adapter = inject(tiny_base("sd15"), CONFIG)
    assert not any(layer.down._forward_hooks for layer in adapter.layers)


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_leaves_only_values_that_the_file_can_hold(precision, dtype):
    adapter = inject(tiny_base("sd15"), CONFIG)
    randomise(adapter)
    before = adapter.fingerprint()
    adapter.round_to("float")
    assert adapter.fingerprint() == before
    adapter.round_to(precision)
    assert adapter.fingerprint() != before
    assert all(torch.equal(w, w.to(dtype).float()) for w in adapter.trainable())


def test_weights_beyond_the_save_precision_are_a_divergence():
    adapter = inject(tiny_base("sd15"), CONFIG)
    with torch.no_grad():
        adapter.trainable()[0].fill_(1e6)
    with pytest.raises(Diverged, match="not finite as fp16"):
        adapter.round_to("fp16")


def test_state_can_be_put_back():
    base = tiny_base("sd15")
    adapter = inject(base, CONFIG)
    randomise(adapter)
    state, mark = adapter.state(), adapter.fingerprint()
    randomise(adapter, seed=1)
    assert adapter.fingerprint() != mark
    adapter.load_state(state)
    assert adapter.fingerprint() == mark


def test_a_failed_injection_leaves_the_base_as_it_was(monkeypatch):
    base = tiny_base("sdxl")
    before = output(base)

    def broken(*args, **kwargs):
        raise RuntimeError("no")

    import trainer.adapter as module

    original = module._inject_component
    calls = []

    def second_fails(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) if len(calls) == 1 else broken()

    monkeypatch.setattr(module, "_inject_component", second_fails)
    with pytest.raises(RuntimeError):
        inject(base, CONFIG)
    assert not hasattr(base.unet, "peft_config")
    assert torch.equal(output(base), before)


def test_keyed_streams_depend_on_the_whole_key():
    def first(*key):
        return torch.rand((), generator=keyed_generator(*key)).item()

    assert first(1, "a") == first(1, "a")
    assert len({first(1, 2), first(2, 1), first(12), first("1/2", 0), first(1, 2, 0)}) == 5
