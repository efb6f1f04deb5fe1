"""What an adapter promises: kohya's initial state, fp32, dropout after lora_down, and no trace after removal."""

import math
import warnings

import pytest
import torch

from tests.tiny import tiny_base
from trainer.adapters.adapter import inject
from trainer.adapters.dropout import keyed_generator
from trainer.adapters.kinds import NAME
from trainer.adapters.targets import count_weights, targets_of
from trainer.bases.base import Sizes
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Diverged
from trainer.loop.optim import build_optimizer

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
    if x.shape[1] != layer.wrapped.lora_down.shape[1] or layer.wrapped.lora_down.dim() == 4:
        layer = next(entry for entry in adapter.layers if entry.wrapped.lora_down.dim() == 2)
        wrapped = base.components()[layer.target.component].get_submodule(layer.target.path)
        x = torch.randn(3, layer.wrapped.lora_down.shape[1])
    expected = wrapped.base_layer(x) + (x @ layer.wrapped.lora_down.T @ layer.wrapped.lora_up.T) * (2 / 4)
    torch.testing.assert_close(wrapped(x), expected)


def inner(layer, x):
    """What leaves lora_down, with what is dropped there."""
    down, base_layer = layer.wrapped.lora_down, layer.wrapped.base_layer
    if down.dim() == 4:
        found = torch.nn.functional.conv2d(x, down, None, base_layer.stride, base_layer.padding)
    else:
        found = torch.nn.functional.linear(x, down)
    mask, kept = (None, 1.0) if layer.wrapped.drop is None else layer.wrapped.drop.ranks(found.shape, found)
    return found if mask is None else found * mask / kept


def test_dropout_acts_after_lora_down_and_only_while_a_key_is_set():
    base = tiny_base("sd15")
    adapter = inject(base, CONFIG.with_values({"network_dropout": 0.5}))
    layer = next(entry for entry in adapter.layers if entry.wrapped.lora_down.dim() == 2)
    x = torch.randn(64, layer.wrapped.lora_down.shape[1])
    whole = x @ layer.wrapped.lora_down.T
    torch.testing.assert_close(inner(layer, x), whole)
    adapter.apply_dropout(1, 2, 3)
    dropped = inner(layer, x)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], (whole * 2)[kept])
    assert torch.equal(dropped, inner(layer, x)), "recomputation must see the same mask"
    adapter.apply_dropout(1, 2, 4)
    assert not torch.equal(dropped, inner(layer, x))
    adapter.apply_dropout()
    torch.testing.assert_close(inner(layer, x), whole)


def test_without_dropout_nothing_is_drawn():
    adapter = inject(tiny_base("sd15"), CONFIG)
    assert all(layer.wrapped.drop is None and not layer.wrapped._forward_hooks for layer in adapter.layers)


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


@pytest.mark.parametrize("other", [{"network_train_unet_only": True}, {"network_dim": 3}])
def test_the_state_of_another_adapter_is_refused_and_nothing_is_loaded(other):
    base = tiny_base("sd15")
    wider = inject(base, CONFIG.with_values(other))
    state = wider.state()
    wider.remove()
    adapter = inject(base, CONFIG)
    mark = adapter.fingerprint()
    with pytest.raises(ConfigError, match=r"not of this adapter: \d+ tensors differ, as lora_"):
        adapter.load_state(state)
    assert adapter.fingerprint() == mark


def test_a_failed_injection_leaves_the_base_as_it_was(monkeypatch):
    base = tiny_base("sdxl")
    before = output(base)

    def broken(*args, **kwargs):
        raise RuntimeError("no")

    import trainer.adapters.adapter as module

    original = module.inject_component
    calls = []

    def second_fails(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) if len(calls) == 1 else broken()

    monkeypatch.setattr(module, "inject_component", second_fails)
    with pytest.raises(RuntimeError):
        inject(base, CONFIG)
    assert not hasattr(base.unet, "peft_config")
    assert torch.equal(output(base), before)


def test_keyed_streams_depend_on_the_whole_key():
    def first(*key):
        return torch.rand((), generator=keyed_generator(*key)).item()

    assert first(1, "a") == first(1, "a")
    assert len({first(1, 2), first(2, 1), first(12), first("1/2", 0), first(1, 2, 0)}) == 5


# Dropout of ranks and modules, norms, rates


def dropping(kind="LoRA", **values):
    base = tiny_base("sd15")
    adapter = inject(base, CONFIG.with_values({"network_type": kind} | values))
    randomise(adapter)
    return base, adapter


def test_rank_dropout_takes_whole_ranks_of_a_sample_and_scales_the_rest():
    _, adapter = dropping(rank_dropout=0.5, network_dim=16)
    for layer in (
        next(entry for entry in adapter.layers if entry.wrapped.lora_down.dim() == n) for n in (2, 4)
    ):
        conv = layer.wrapped.lora_down.dim() == 4
        x = (
            torch.randn(6, layer.wrapped.lora_down.shape[1], 3, 3)
            if conv
            else torch.randn(6, 5, layer.wrapped.lora_down.shape[1])
        )
        adapter.apply_dropout()
        whole = inner(layer, x)
        adapter.apply_dropout(1, 2, 3)
        dropped = inner(layer, x)
        kept = (dropped != 0).flatten(2).all(2) if conv else (dropped != 0).all(1)
        gone = (dropped == 0).flatten(2).all(2) if conv else (dropped == 0).all(1)
        assert torch.equal(kept, ~gone), "a rank is there for a sample, or it is not"
        assert 0.2 < kept.float().mean() < 0.8
        assert not all(torch.equal(kept[0], row) for row in kept[1:]), "samples have their own"
        torch.testing.assert_close(dropped[dropped != 0], (whole * 2)[dropped != 0])
        assert torch.equal(dropped, inner(layer, x)), "recomputation must see the same mask"


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_rank_dropout_of_loha_and_lokr_takes_whole_rows_of_the_weight(kind):
    _, adapter = dropping(kind, rank_dropout=0.5)
    layer = max(adapter.layers, key=lambda entry: entry.wrapped.base_layer.weight.shape[0])
    adapter.apply_dropout()
    whole = layer.wrapped.get_delta_weight("lora").flatten(1)
    adapter.apply_dropout(4, 5)
    dropped = layer.wrapped.get_delta_weight("lora").flatten(1)
    rows = dropped.abs().sum(1) > 0
    assert 0.1 < rows.float().mean() < 0.9
    torch.testing.assert_close(dropped[rows], whole[rows] * 2)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_module_dropout_leaves_whole_modules_out_for_a_step(kind):
    base, adapter = dropping(kind, module_dropout=0.5)
    with_all = output(base)
    adapter.apply_dropout(1, 2)
    out = [layer.wrapped.disable_adapters for layer in adapter.layers]
    assert 0.2 < sum(out) / len(out) < 0.8
    assert not torch.equal(output(base), with_all)
    adapter.apply_dropout(1, 3)
    assert [layer.wrapped.disable_adapters for layer in adapter.layers] != out
    adapter.apply_dropout(1, 2)
    assert [layer.wrapped.disable_adapters for layer in adapter.layers] == out
    states = base.encode_text(["a cat"])
    base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), states, [SIZES]).sum().backward()
    for layer, left_out in zip(adapter.layers, out, strict=True):
        assert all((weight.grad is None) == left_out for weight in layer.weights.values()), layer.target.key
    adapter.apply_dropout()
    assert torch.equal(output(base), with_all)


@pytest.mark.parametrize("kind", ["LoRA", "LoCon", "DoRA", "LoHa", "LoKr"])
def test_norms_above_the_limit_are_brought_to_it_and_others_left_alone(kind):
    _, adapter = dropping(kind, conv_dim=2)
    before = [layer.delta().norm().item() for layer in adapter.layers]
    middle = len(before) // 2
    limit = (
        sum(sorted(before)[middle : middle + 2]) / 2
    )  # between two: a norm at the limit may round to either side
    weights = [[weight.clone() for weight in layer.weights.values()] for layer in adapter.layers]
    adapter.limit_norms(limit)
    for layer, norm, old in zip(adapter.layers, before, weights, strict=True):
        assert layer.delta().norm().item() == pytest.approx(min(norm, limit), rel=1e-4)
        if norm <= limit:
            assert all(torch.equal(a, b) for a, b in zip(layer.weights.values(), old, strict=True))
        if kind in ("LoRA", "LoCon") and norm > limit:  # kohya: both halves by the square root
            torch.testing.assert_close(
                layer.wrapped.lora_down, old[0] * (limit / norm) ** 0.5, rtol=1e-4, atol=1e-8
            )


SD15_BLOCKS = {
    "down_blocks.0.attentions.0.proj_in": ("down", 1),
    "down_blocks.0.attentions.1.proj_in": ("down", 2),
    "down_blocks.0.downsamplers.0.conv": ("down", 3),
    "down_blocks.2.attentions.1.proj_in": ("down", 8),
    "down_blocks.3.resnets.1.conv1": ("down", 11),
    "mid_block.attentions.0.proj_in": ("mid", 0),
    "mid_block.resnets.1.conv1": ("mid", 0),
    "up_blocks.0.resnets.0.conv1": ("up", 0),
    "up_blocks.0.upsamplers.0.conv": ("up", 2),
    "up_blocks.1.attentions.0.proj_in": ("up", 3),
    "up_blocks.3.attentions.2.proj_in": ("up", 11),
}
SDXL_BLOCKS = {
    "down_blocks.0.resnets.0.conv1": ("down", 1),
    "down_blocks.1.attentions.0.proj_in": ("down", 4),
    "down_blocks.2.attentions.1.proj_in": ("down", 8),
    "mid_block.resnets.0.conv1": ("mid", 0),
    "mid_block.attentions.0.proj_in": ("mid", 1),
    "mid_block.resnets.1.conv1": ("mid", 2),
    "up_blocks.0.attentions.2.proj_in": ("up", 2),
    "up_blocks.2.resnets.2.conv1": ("up", 8),
}


@pytest.mark.parametrize("family, blocks", [("sd15", SD15_BLOCKS), ("sdxl", SDXL_BLOCKS)])
def test_every_module_has_the_rate_of_its_block_as_sd_scripts_counts_blocks(family, blocks):
    sides = {"sd15": (12, 1, 12), "sdxl": (9, 3, 9)}[family]
    lists = {
        part: [round(base + 0.01 * place, 2) for place in range(count)]
        for part, base, count in zip(("down", "mid", "up"), (0.1, 0.4, 0.7), sides, strict=True)
    }
    texts = {f"{part}_lr_weight": ",".join(map(str, values)) for part, values in lists.items()}
    base = tiny_base(family, full_structure=True)
    targets = {
        t.path: t
        for t in targets_of(base, CONFIG.with_values(texts | {"conv_dim": 2}))
        if t.component == "unet"
    }
    assert len(targets) == {"sd15": 192 + 86, "sdxl": 722 + 66}[family]
    for path, (part, number) in blocks.items():
        assert targets[path].rate == lists[part][number], path


def test_a_block_of_rate_zero_has_no_lora_and_others_have_their_own_group():
    base = tiny_base("sd15", full_structure=True)
    config = CONFIG.with_values(
        {
            "up_lr_weight": "0,0,0,1,1,1,0.5,0.5,0.5,0.5,0.5,0.5",
            "unet_lr": 1e-3,
            "text_encoder_lr": 1e-4,
            "optimizer_type": "AdamW",
        }
    )
    adapter = inject(base, config)
    paths = {layer.target.path for layer in adapter.layers if layer.target.component == "unet"}
    assert any(path.startswith("up_blocks.1") for path in paths)
    groups = {group["name"]: group for group in build_optimizer(config, adapter).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "unet": 1e-3,
        "unet_x0.5": 5e-4,
        "text_encoder": 1e-4,
    }
    none = targets_of(base, CONFIG.with_values({"up_lr_weight": "zeros"}))
    assert not any(t.path.startswith("up_blocks") for t in none)


def test_sdxls_text_encoders_have_their_own_rates_and_zero_trains_none():
    base = tiny_base("sdxl")
    rates = {"unet_lr": 1e-3, "text_encoder_lr1": 1e-4, "text_encoder_lr2": 5e-5, "optimizer_type": "AdamW"}
    adapter = inject(base, CONFIG.with_values(rates))
    groups = build_optimizer(CONFIG.with_values(rates), adapter).param_groups
    assert {group["name"]: group["lr"] for group in groups} == {
        "unet": 1e-3,
        "text_encoder": 1e-4,
        "text_encoder_2": 5e-5,
    }
    adapter.remove()
    only = targets_of(base, CONFIG.with_values(rates | {"text_encoder_lr1": 0.0}))
    assert {t.component for t in only} == {"unet", "text_encoder_2"}


@pytest.mark.parametrize("kind", ["LoRA", "LoCon", "DoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_weights_of_every_kind_are_counted_without_making_them(kind, rank):
    base = tiny_base()
    config = CONFIG.with_values({"network_type": kind, "network_dim": rank, "conv_dim": 2})
    adapter = inject(base, config)
    weights = sum(weight.numel() for weight in adapter.trainable())
    adapter.remove()
    assert count_weights(base, config) == weights


def test_lokr_splits_by_the_factor_as_lycoris_does():
    """LyCORIS factorization(dim, factor): where the factor divides a side it is one part of it,
    the other the rest."""
    base = tiny_base()
    config = CONFIG.with_values({"network_type": "LoKr", "network_dim": 1, "factor": 4})
    before = output(base)
    adapter = inject(base, config)
    for layer in adapter.layers:
        out, inner = layer.wrapped.base_layer.weight.shape[:2]
        assert layer.weights["lokr_w1"].shape == (min(4, out // 4), min(4, inner // 4))
    torch.testing.assert_close(output(base), before)
    adapter.remove()
    even = inject(base, config.with_values({"factor": -1}))
    assert {tuple(layer.weights["lokr_w1"].shape) for layer in even.layers} >= {(2, 2), (4, 4)}
    even.remove()
    with pytest.raises(ConfigError, match="factor = 0"):
        config.with_values({"factor": 0})


def change(layer):
    """ΔW: what the layer adds for the unit vectors, or what PEFT says."""
    wrapped = layer.wrapped
    if not hasattr(wrapped, "lora_up"):
        return wrapped.get_delta_weight(NAME)
    return wrapped.scaling[NAME] * wrapped.lora_up.flatten(1) @ wrapped.lora_down.flatten(1)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA"])
def test_the_change_of_the_weights_is_that_of_the_merged_weights(kind):
    base = tiny_base("sd15")
    config = CONFIG.with_values({"network_type": kind, "conv_dim": 2 if kind == "LoRA" else None})
    layers = [base.components()[t.component].get_submodule(t.path) for t in targets_of(base, config)]
    before = torch.cat([layer.weight.detach().flatten().clone() for layer in layers])
    adapter = inject(base, config)
    assert adapter.weight_change() == 0.0
    factors = [weight for layer in adapter.layers for weight in layer.factors]
    with torch.no_grad():
        for number, weight in enumerate(factors):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    deltas = torch.cat([change(layer).flatten() for layer in adapter.layers])
    assert adapter.weight_change() == pytest.approx(float(deltas.norm() / before.norm()), rel=1e-4)
    assert adapter.weight_change() > 0.001
    adapter.remove()
