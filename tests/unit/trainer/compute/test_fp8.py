"""An fp8 base: half the bytes of bf16, nearly the same output, and a normal LoRA on top."""

import pytest
import torch

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters import lorafile
from trainer.adapters.adapter import inject
from trainer.compute import fp8
from trainer.events import Step
from trainer.loop.loop import train


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm()
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_8_bit_unet_takes_half_the_bytes_of_bf16(family):
    base = tiny_base(family, full_structure=True)
    unet = base.unet.to(torch.bfloat16)
    before = fp8.nbytes(unet)
    weights = [m.weight for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    saved = sum(
        weight.numel() - 2 * weight.shape[0] for weight in weights
    )  # one byte per weight, minus the scales
    fp8.convert(unet)
    assert before - fp8.nbytes(unet) == saved
    assert all(m.weight.dtype == fp8.FORMAT for m in unet.modules() if fp8.is_fp8(m))


def test_on_a_layer_of_real_width_the_scales_are_nothing():
    layer = torch.nn.Linear(1280, 1280, dtype=torch.bfloat16)
    before = fp8.nbytes(layer)
    fp8.convert(layer)
    assert fp8.nbytes(layer) < 0.505 * before


@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(320, 320), torch.nn.Conv2d(64, 64, 3, padding=1, stride=2)]
)
def test_the_output_is_near_and_much_nearer_than_that_of_a_cast_without_scale(layer):
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight, std=0.003)
    shape = (4, 320) if isinstance(layer, torch.nn.Linear) else (2, 64, 9, 9)
    x = torch.randn(shape, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    unscaled = type(layer).forward
    plain = layer.weight.detach().clone()
    layer.weight.data = plain.to(fp8.FORMAT).float()
    cast = unscaled(layer, x)
    layer.weight.data = plain
    layer.requires_grad_(False)
    fp8.convert(layer)
    error = relative(layer(x), expected)
    assert error < 0.035  # three mantissa bits: at most 2⁻⁴ of each weight, 2.6 % on average
    assert error < 0.5 * relative(cast, expected)
    (again,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert relative(again, gradient) < 0.06


def test_the_backward_pass_keeps_no_wide_copy_of_a_weight():
    layer = torch.nn.Linear(256, 256).requires_grad_(False)
    fp8.convert(layer)
    kept = []
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {tensor.dtype for tensor in kept if tensor.numel() == 256 * 256} == {fp8.FORMAT}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_whole_network_predicts_nearly_the_same(family):
    base = tiny_base(family)
    prepared = tiny_prepared(base, tiny_config())
    latents = torch.stack(list(prepared.latents.values()))
    captions = [item.caption for item in prepared.dataset.items]
    times = torch.tensor([10, 300, 600, 900])
    sizes = list(prepared.sizes.values())
    expected = base.predict(latents, times, prepared.text(captions), sizes)
    fp8.convert(base.unet)
    assert relative(base.predict(latents, times, prepared.text(captions), sizes), expected) < 0.08


@pytest.mark.parametrize("kind, own", [("LoRA", {}), ("LoCon", {"conv_dim": 2}), ("DoRA", {}), ("LoHa", {})])
def test_a_lora_on_an_8_bit_base_learns_and_its_file_is_an_ordinary_one(kind, own, tmp_path):
    config = tiny_config(network_type=kind, fp8_base=True, max_train_steps=1, **own)
    states = []
    for eight_bit in (False, True):
        base = tiny_base("sd15")
        if eight_bit:
            fp8.convert(base.unet)
        adapter = inject(base, config if eight_bit else config.with_values({"fp8_base": False}))
        prepared = tiny_prepared(base, config)
        events = list(train(config.with_values({"fp8_base": eight_bit}), base, adapter, prepared))
        assert all(event.grad_norm > 0 for event in events if isinstance(event, Step))
        lorafile.write(tmp_path / f"{eight_bit}.safetensors", adapter, config)
        states.append(adapter.state())
        adapter.remove()
    plain, eight = (lorafile.read(tmp_path / f"{name}.safetensors") for name in (False, True))
    assert {k: (t.shape, t.dtype) for k, t in plain.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in eight.tensors.items()
    }
    assert all(tensor.dtype == torch.float32 for tensor in states[1].values())
    adapter = lorafile.attach(tiny_base("sd15"), eight)
    assert len(adapter.layers) == len({key.split(".")[0] for key in plain.tensors})


def layer_and_input(kind: str, images: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A layer with weights of several magnitudes and one output of zeros, and an input."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(96, 64) if kind == "linear" else torch.nn.Conv2d(16, 64, 3, padding=1, stride=2)
    with torch.no_grad():
        for row in range(64):
            layer.weight[row].mul_(2.0 ** (row % 9 - 6) if row else 0.0)
    return layer.requires_grad_(False), torch.randn(
        (images * 8, 96) if kind == "linear" else (images, 16, 8, 8)
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scale_gives_the_same_bits_on_the_weight_and_on_the_output(kind, dtype, monkeypatch):
    """A power of two can be multiplied before or after a product: so the smaller of the two may get it."""
    layer, x = layer_and_input(kind, 2)
    fp8.convert(layer.to(dtype))
    found = []
    for on_output in (True, False):
        monkeypatch.setattr(fp8, "scales_output", lambda *_, on=on_output: on)
        given = x.to(dtype).requires_grad_(True)
        out = layer(given)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), given)
        found.append((out, gradient))
    (out, gradient), (again, gradient_again) = found
    assert torch.equal(out, again) and torch.equal(gradient, gradient_again)
    plain = fp8.widened(layer.weight, layer.fp8_scale, torch.float32)
    assert torch.equal(plain.to(torch.bfloat16).float(), plain), "exact in bf16"


def test_the_scale_is_on_the_smaller_of_weight_and_output_and_never_on_the_output_of_fp16():
    weight = torch.empty(10, 20)
    assert fp8.scales_output(199, weight, torch.bfloat16) and fp8.scales_output(199, weight, torch.float32)
    assert not fp8.scales_output(200, weight, torch.bfloat16)
    assert not fp8.scales_output(1, weight, torch.float16)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_powers_of_two_as_scales_are_as_exact_as_the_largest_weight(kind):
    """The earlier scale was the largest weight of an output / 448. Errors of weights: 2.5 % either way."""
    layer, _x = layer_and_input(kind, 1)
    weight = torch.randn_like(layer.weight).flatten(1) * torch.rand(64, 1)
    largest = weight.abs().amax(dim=1, keepdim=True) / fp8.LARGEST
    before = relative((weight / largest).to(fp8.FORMAT).float() * largest, weight)
    eight, scale = fp8.quantized(weight)
    assert relative(fp8.widened(eight, scale, torch.float32), weight) == pytest.approx(before, rel=0.05)
    assert bool((torch.frexp(scale.float())[0] == 0.5).all())
    assert bool(eight.float().isfinite().all())


@pytest.mark.parametrize("peak", [448.0, 0.875, 2.0**-7, 2.0**-30, 0.0, 3e4])
def test_the_largest_weight_is_held_whatever_its_size(peak):
    weight = torch.tensor([[peak, -peak / 3]])
    eight, scale = fp8.quantized(weight)
    assert float(fp8.widened(eight, scale, torch.float32)[0, 0]) == pytest.approx(peak, rel=2**-4)


def test_bf16_autocast_computes_in_bf16():
    layer = torch.nn.Linear(16, 16).requires_grad_(False)
    fp8.convert(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16
