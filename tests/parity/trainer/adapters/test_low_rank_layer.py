"""LowRankLayer against PEFT's layer, against ComfyUI's formula (a merged weight), and against itself."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.adapters.lowrank import LowRankLayer, computing
from trainer.compute import fp8

RANK, SCALE = 4, 0.5
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 7, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (5, 24)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "1×1 convolution": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 6, 6)),
}


def made(name: str, kind: torch.dtype = torch.float32) -> tuple[LowRankLayer, Tensor]:
    """A layer with random halves, and an input."""
    torch.manual_seed(7)
    make, shape = LAYERS[name]
    base = make().requires_grad_(False)
    is_conv = isinstance(base, nn.Conv2d)
    down = torch.randn(RANK, *base.weight.shape[1:]) * 0.2
    up = torch.randn(base.weight.shape[0], RANK, *((1, 1) if is_conv else ())) * 0.2
    layer = LowRankLayer(base.to(kind), nn.Parameter(down), nn.Parameter(up), "lora", SCALE)
    return layer, torch.randn(shape, dtype=kind, requires_grad=True)


class _Network(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_of(layer: LowRankLayer) -> nn.Module:
    """PEFT's layer with the same weights."""
    network = _Network(layer.base_layer)
    settings = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["layer"], init_lora_weights=False)
    inject_adapter_in_model(settings, network, adapter_name="lora")
    peft = network.layer
    peft.lora_A["lora"].weight = nn.Parameter(layer.lora_down.detach().clone())
    peft.lora_B["lora"].weight = nn.Parameter(layer.lora_up.detach().clone())
    return peft


def results(
    layer: nn.Module, x: Tensor, halves: tuple[Tensor, Tensor], low: torch.dtype | None = None
) -> list[Tensor]:
    """The output, and the gradients of x, down and up, for one fixed gradient of the output."""
    given = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        y = layer(given)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape).to(y.dtype))
    found = [y.detach(), given.grad, *(half.grad for half in halves)]
    for half in halves:
        half.grad = None
    assert all(part is not None for part in found)
    return [part.clone() for part in found if part is not None]


def ours(layer: LowRankLayer, x: Tensor, low: torch.dtype | None = None) -> list[Tensor]:
    return results(layer, x, (layer.lora_down, layer.lora_up), low)


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_peft_in_fp32(name: str) -> None:
    layer, x = made(name)
    peft = peft_of(layer)
    halves = (peft.lora_A["lora"].weight, peft.lora_B["lora"].weight)  # type: ignore[index]
    for own, theirs in zip(ours(layer, x), results(peft, x, halves), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_in_bf16_it_is_at_least_as_near_the_truth_as_peft(name: str) -> None:
    """The truth is fp64. Both round to bf16 on the way; the gradients of the halves arrive in fp32."""
    layer, x = made(name)
    peft = peft_of(layer)
    halves = (peft.lora_A["lora"].weight, peft.lora_B["lora"].weight)  # type: ignore[index]
    own, theirs = ours(layer, x, torch.bfloat16), results(peft, x, halves, torch.bfloat16)
    assert own[0].dtype == torch.bfloat16
    assert own[2].dtype == own[3].dtype == torch.float32
    layer.double()
    truth = ours(layer, x.detach().double())

    def error(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    for mine, other in zip(error(own), error(theirs), strict=True):
        assert mine < max(1.3 * other, 2e-3), (error(own), error(theirs))


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_that_of_the_change_merged_into_the_weight(name: str) -> None:
    """ComfyUI's weight_adapter/lora.py: weight += alpha / rank · (up · down), reshaped to the weight."""
    layer, x = made(name)
    up, down = layer.lora_up.detach().flatten(1), layer.lora_down.detach().flatten(1)
    expected = layer(x).detach()
    layer.base_layer.weight.data += SCALE * (up @ down).reshape(layer.base_layer.weight.shape)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(expected, layer.base_layer(x).detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_one_cast_for_all_layers_gives_the_same_bits_as_one_for_each(name: str) -> None:
    layer, x = made(name, torch.bfloat16)
    each = ours(layer, x)
    with computing([layer], torch.bfloat16):
        assert layer._cast[0].dtype == torch.bfloat16
        together = ours(layer, x)
        assert not layer._cast, "the cast lives until the layer's backward"
    assert layer._cast == []
    for one, other in zip(each, together, strict=True):
        assert torch.equal(one, other)


class _Half:
    """Drops every second value that leaves down, or every second row."""

    def __init__(self, rows: bool) -> None:
        self.drops_rows = rows

    def ranks(self, shape: list[int], like: Tensor) -> tuple[Tensor | None, float]:
        if self.drops_rows:
            return None, 1.0
        mask = torch.arange(torch.Size(shape).numel(), device=like.device) % 2
        return mask.reshape(shape).to(like.dtype), 0.5

    def rows(self) -> Tensor | None:
        return (torch.arange(40) % 2).float() if self.drops_rows else None


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_dropped_counts_in_neither_direction(rows: bool) -> None:
    layer, x = made("linear")
    layer.drop = _Half(rows)
    inner = nn.functional.linear(x, layer.lora_down)
    up = layer.lora_up
    if rows:
        up = up * (torch.arange(40) % 2)[:, None]
    else:
        inner = inner * (torch.arange(inner.numel()) % 2).reshape(inner.shape) * 2
    expected = layer.base_layer(x) + SCALE * inner @ up.T
    gradient = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, (x, layer.lora_down, layer.lora_up), gradient)
    found = torch.autograd.grad(layer(x), (x, layer.lora_down, layer.lora_up), gradient)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_recomputation_gives_the_same_gradients(name: str) -> None:
    layer, x = made(name, torch.bfloat16)
    plain = ours(layer, x)
    recomputed = lambda given: checkpoint(layer, given, use_reentrant=False)  # noqa: E731
    with computing([layer], torch.bfloat16):
        again = results(recomputed, x, (layer.lora_down, layer.lora_up))  # type: ignore[arg-type]
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_a_half_that_is_frozen_gets_no_gradient_and_the_other_does() -> None:
    layer, x = made("linear")
    full = ours(layer, x)
    layer.lora_down.requires_grad_(False)
    y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape))
    assert layer.lora_down.grad is None
    assert layer.lora_up.grad is not None and torch.equal(layer.lora_up.grad, full[3])


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_over_a_base_in_8_bits_only_the_base_is_coarser(name: str) -> None:
    layer, x = made(name)
    wide = ours(layer, x)
    network = _Network(layer.base_layer)
    fp8.convert(network)
    base = [part.detach() for part in (network.layer(x), layer(x))]  # type: ignore[operator]
    merged = ours(layer, x)
    torch.testing.assert_close(merged[2:], wide[2:])
    up, down = layer.lora_up.detach().flatten(1), layer.lora_down.detach().flatten(1)
    change = (up @ down).reshape(network.layer.weight.shape) * SCALE  # type: ignore[union-attr, arg-type]
    if name == "linear":
        torch.testing.assert_close(base[1] - base[0], x.detach() @ change.T, rtol=1e-4, atol=1e-5)


def test_a_permuted_input_is_computed_as_without_an_adapter() -> None:
    """diffusers' transformers hand proj_in one; with ΔW = 0 not a bit may differ."""
    layer, _ = made("linear")
    layer.lora_up.data.zero_()
    x = torch.randn(2, 24, 5).transpose(1, 2)
    assert torch.equal(layer(x), layer.base_layer(x))
