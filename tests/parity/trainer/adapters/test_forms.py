"""Every form of LoRA does to a layer what LyCORIS or PEFT do with the same tensors (recorded: ``forms``)."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.parity.trainer.adapters.forms import LYCORIS, PEFT, layer_of, wave
from trainer.adapters.contents import kind_of_parts
from trainer.adapters.forms import read_form
from trainer.adapters.keys import read_keys

RECORDED = json.loads((Path(__file__).parents[3] / "data" / "lora_forms.json").read_text())


def changed(shape, tensors, alpha):
    """(weight, bias) of a layer with these tensors."""
    layer = layer_of(shape)
    named = {f"lora_unet_x.{name}": tensor for name, tensor in tensors.items()}
    keys = read_keys(named)
    ((_, module),) = keys.modules.items()
    parts = {part: named[name] for part, name in module.tensors.items()}
    kind = kind_of_parts(module, {name: tuple(tensor.shape) for name, tensor in named.items()})
    plain, change = read_form(kind, parts, layer, alpha)
    weight, bias = layer.weight, layer.bias
    for found in (change, plain and plain.delta(layer)):
        weight = weight if found is None or found.weight is None else weight + found.weight
        bias = bias if found is None or found.bias is None else bias + found.bias
    return weight, bias


@pytest.mark.parametrize("form", LYCORIS)
def test_lycoris(form):
    shape, tensors = LYCORIS[form]
    weight, bias = changed(shape, tensors, float(tensors["alpha"]) if "alpha" in tensors else None)
    expected = RECORDED[f"lycoris: {form}"]
    torch.testing.assert_close(weight, torch.tensor(expected["weight"]).reshape(shape), rtol=0, atol=2e-6)
    torch.testing.assert_close(bias, torch.tensor(expected["bias"]), rtol=0, atol=1e-6)
    assert not torch.allclose(weight, layer_of(shape).weight, atol=1e-3)


@pytest.mark.parametrize("form", PEFT)
def test_peft(form):
    shape, tensors, settings = PEFT[form]
    alpha = settings.get("lora_alpha")
    if settings.get("use_rslora"):
        alpha *= 2**0.5  # the rank is 2
    weight, bias = changed(shape, tensors, alpha)
    given = wave(2, *((shape[1],) if len(shape) == 2 else (shape[1], 5, 5)), at=80)
    if isinstance(layer_of(shape), nn.Linear):
        output = functional.linear(given, weight, bias)
    else:
        output = functional.conv2d(given, weight, bias, padding=1)
    expected = torch.tensor(RECORDED[f"peft: {form}"]["output"]).reshape(output.shape)
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)


def test_onetrainers_oft_turns_a_convolution_the_other_way():
    """OneTrainer modules/module/LoRAModule.py (23df383): W · R for a convolution, W · Rᵀ for a linear layer."""
    shape, tensors, _ = PEFT["oft, 3x3"]
    layer = layer_of(shape)
    parts = {"oft_R.weight": tensors["oft_R.weight"]}
    _, theirs = read_form("OFT", parts, layer, None, one_trainer=True)
    _, pefts = read_form(
        "OFT", {"oft_R.weight": -parts["oft_R.weight"]}, layer, None
    )  # R(-Q) is R(Q)ᵀ but for Q⁴
    torch.testing.assert_close(theirs.weight, pefts.weight, rtol=0, atol=1e-4)


def test_ia3_in_early_lycoris_files_is_two_dimensional():
    for shape, on_input, size in (((12, 1), 0, 12), ((1, 8), 1, 8)):
        tensors = {"weight": wave(*shape, at=3), "on_input": torch.tensor(bool(on_input))}
        flat = {"weight": wave(size, at=3), "on_input": torch.tensor(on_input)}
        found, expected = (changed((12, 8), given, None)[0] for given in (tensors, flat))
        torch.testing.assert_close(found, expected)
