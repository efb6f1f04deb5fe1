"""Outputs of every kind equal LyCORIS' (f49d30d, executed on CPU in fp32 with torch 2.15).

Recorded with ``network_module_dict[algo]("x", layer, 1.0, lora_dim=…, alpha=…, …)``, ``IA3Module``, ``NormModule`` on a
layer and on tensors (in the order of their sorted names) filled by ``filled``: the first three outputs, and the sum of
their absolute values.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.adapters.changed import ChangedLayer
from trainer.adapters.kinds import Kind, LoHa, LoKr, LoRA
from trainer.adapters.morekinds import BOFT, IA3, OFT, Full, GLoRA, Norm


def filled(shape: tuple[int, ...], number: int) -> Tensor:
    """Numbers that need no generator."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index * 0.7 + number * 1.3).mul(0.5).float().reshape(shape)


INPUTS = {
    "linear": (2, 3, 12),
    "conv": (2, 6, 5, 5),
    "group": (2, 8, 4, 4),
    "layer": (2, 3, 12),
}


def layer_of(name: str) -> nn.Module:
    layer: nn.Module = {
        "linear": lambda: nn.Linear(12, 20),
        "conv": lambda: nn.Conv2d(6, 8, 3, 2, 1),
        "group": lambda: nn.GroupNorm(2, 8),
        "layer": lambda: nn.LayerNorm(12),
    }[name]()
    with torch.no_grad():
        for number, parameter in enumerate((layer.weight, layer.bias)):
            parameter.copy_(filled(parameter.shape, number + 1))
    return layer


# name: (kind, layer, rank, the number in the file, the first outputs, their absolute sum)
CASES: dict[str, tuple[Kind, str, int, float, list[float], float]] = {
    "LoCon use_tucker": (LoRA(use_tucker=True), "conv", 4, 2, [0.753, 0.1742, 0.3058], 89.4571),
    "LoCon rs_lora": (LoRA(), "linear", 4, 4, [-0.8974, -0.2539, 0.6737], 119.0076),
    "LoHa": (LoHa(), "conv", 4, 2, [0.4702, -0.3534, 0.3245], 85.2238),
    "LoHa use_tucker": (LoHa(use_tucker=True), "conv", 4, 2, [0.5477, -0.2422, 0.18], 86.2208),
    "LoKr full_matrix": (LoKr(full_matrix=True), "linear", 4, 4, [-0.6315, -0.4925, 0.8574], 116.8378),
    "LoKr 10000": (LoKr(), "conv", 10000, 10000, [0.6872, -0.6435, -0.1679], 116.7535),
    "LoKr decompose_both": (LoKr(decompose_both=True), "linear", 1, 2, [-0.5368, -0.5864, 0.9542], 120.0702),
    "LoKr unbalanced": (LoKr(unbalanced=True), "linear", 1, 2, [-0.5413, -0.5921, 0.95], 119.9831),
    "LoKr use_tucker": (LoKr(2, use_tucker=True), "conv", 1, 2, [0.6034, -0.2742, 0.1508], 90.3242),
    "full": (Full(), "linear", 1, 1, [0.4402, -1.5702, -0.288], 94.2284),
    "full conv": (Full(), "conv", 1, 1, [-0.2504, -0.0113, 0.5177], 78.6584),
    "ia3": (IA3(), "linear", 1, 0, [-0.2643, -0.3364, 0.3965], 114.3121),
    "ia3 conv": (IA3(), "conv", 1, 0, [0.4815, -0.0847, 0.177], 90.1968),
    "ia3 on_input": (IA3(True), "linear", 1, 1, [-0.4788, -0.5715, 0.8698], 107.2742),
    "ia3 on_input conv": (IA3(True), "conv", 1, 1, [0.4389, -0.5858, 0.0785], 118.9087),
    "diag-oft": (OFT(), "linear", 4, 0, [-0.5258, 0.0416, -0.8983], 112.5275),
    "diag-oft constraint": (OFT(), "linear", 4, 0.01, [-0.5282, -0.6314, 0.8626], 120.0146),
    "diag-oft rescaled": (OFT(True), "conv", 4, 0, [0.4794, -0.0792, 0.1706], 93.9527),
    "boft": (BOFT(), "conv", 4, 0, [0.3223, 0.1525, 0.2541], 84.3923),
    "boft rescaled": (BOFT(True), "linear", 10, 0.02, [-0.3212, -0.4321, 1.3624], 116.9081),
    "glora": (GLoRA(), "linear", 4, 2, [-0.5287, -0.6434, 1.04], 120.4718),
    "glora conv": (GLoRA(), "conv", 4, 2, [0.9237, -0.6387, -0.184], 91.5114),
    "norm group": (Norm(), "group", 1, 1, [-0.1285, -0.0948, -0.0566], 133.9898),
    "norm layer": (Norm(), "layer", 1, 1, [-0.1298, -0.6287, -0.4948], 36.2175),
}
# LyCORIS' own names of parameters, where their order differs from that of the names in a file.
_ORDER = {"diff": "weight", "diff_b": "bias", "b_norm": "b_norm", "w_norm": "w_norm"}


def tensors_of(kind: Kind, layer: nn.Module, rank: int) -> dict[str, Tensor]:
    shapes = kind.shapes(layer, rank)
    names = sorted(shapes, key=lambda ending: _ORDER.get(ending, ending))
    return {
        name: filled(shapes[name], number + 3) + (1 if name == "rescale" else 0)
        for number, name in enumerate(names)
    }


@pytest.mark.parametrize("name", CASES)
def test_a_layer_computes_what_lycoris_computes(name: str) -> None:
    kind, what, rank, number, first, total = CASES[name]
    layer = layer_of(what)
    tensors = tensors_of(kind, layer, rank)
    assert kind.fits(tensors, layer.weight)
    rank_of_file = kind.rank_of(tensors, number)
    changed = ChangedLayer(
        layer,
        kind,
        {ending: nn.Parameter(tensor) for ending, tensor in tensors.items()},
        "lora",
        kind.scale(rank_of_file, number),
    )
    with torch.no_grad():
        output = changed(filled(INPUTS[what], 9))
    assert output.flatten()[:3].tolist() == pytest.approx(first, abs=1e-4)
    assert float(output.double().abs().sum()) == pytest.approx(total, abs=2e-3)


# (out, in) or (out, in, 3, 3) → kind, rank → shapes of the parameters of a fresh LyCORIS module
SHAPES = [
    (LoKr(full_matrix=True), (1280, 320), 4, {"lokr_w1": (32, 16), "lokr_w2": (40, 20)}),
    (LoKr(), (1280, 320), 4, {"lokr_w1": (32, 16), "lokr_w2_a": (40, 4), "lokr_w2_b": (4, 20)}),
    (LoKr(8), (1280, 320), 16, {"lokr_w1": (8, 8), "lokr_w2_a": (160, 16), "lokr_w2_b": (16, 40)}),
    (LoKr(), (1280, 320), 10000, {"lokr_w1": (32, 16), "lokr_w2": (40, 20)}),
    (
        LoKr(decompose_both=True),
        (1280, 320),
        4,
        {"lokr_w1_a": (32, 4), "lokr_w1_b": (4, 16), "lokr_w2_a": (40, 4), "lokr_w2_b": (4, 20)},
    ),
    (
        LoKr(unbalanced=True),
        (1280, 320),
        4,
        {"lokr_w1": (40, 16), "lokr_w2_a": (32, 4), "lokr_w2_b": (4, 20)},
    ),
    (OFT(), (1280, 320), 8, {"oft_blocks": (160, 8, 8)}),
    (OFT(dim_is_blocks=True), (1280, 320), 8, {"oft_blocks": (8, 160, 160)}),
    (BOFT(), (1280, 320), 16, {"oft_blocks": (8, 128, 10, 10)}),
]


@pytest.mark.parametrize(("kind", "sides", "rank", "shapes"), SHAPES)
def test_a_fresh_module_has_the_shapes_of_lycoris(
    kind: Kind, sides: tuple[int, int], rank: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        layer = nn.Linear(sides[1], sides[0])
    assert kind.shapes(layer, rank) == shapes
