"""What a file of sd-scripts asks for is what its networks are and learn: which modules, of which shapes and alphas, at
which rates, and how far each module has moved after n equal gradients.

Recorded from sd-scripts 48d368f and aff4a2e (networks.loha and networks.lokr) and LyCORIS f49d30d on the CPU (the
command: tests/bench/record_networks.py). Everything here goes through the reader of kohya files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.fullsize import meta_base
from tests.networkcases import (
    ALPHA,
    BLOCKS,
    CASES,
    DIFFERS,
    EVERY_CASE,
    FAMILIES,
    LEARNED,
    RANK,
    SINGLE,
    STEPS,
    digest,
    drawn,
    figures,
    filled,
    input_of,
    lines_of,
    loss,
    single_layer,
    start,
)
from tests.tiny import tiny_base
from trainer.adapters.adapter import Adapter, Layer, inject
from trainer.adapters.choice import kind_for
from trainer.adapters.dropout import Draws, Dropout
from trainer.adapters.kinds import LoHa, LoRA, tucker
from trainer.adapters.magnitude import column_norm
from trainer.adapters.morekinds import DyLoRA
from trainer.adapters.targets import Target, targets_of
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.kohya.read import read_kohya
from trainer.loop.optim import build_optimizer

RECORDED = json.loads((Path(__file__).parents[3] / "data" / "networks_recorded.json").read_text())


def read(folder: Path, text: str, optimizer: str = "AdamW") -> TrainConfig:
    path = folder / "kohya.toml"
    path.write_text(
        f'pretrained_model_name_or_path = "sd15"\nresolution = 64\noptimizer_type = "{optimizer}"\n{text}'
    )
    return read_kohya(path).require_all().config


@cache
def base_of(family: str) -> Base:
    return meta_base(family)


@cache
def small_base() -> Base:
    return tiny_base("sd15")


def shapes_of(config: TrainConfig, target: Target, layer: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = dict(kind_for(config, target).shapes(layer, target.rank))
    if target.kind == "DoRA":
        ones = [1] * (len(layer.weight.shape) - 2)  # type: ignore[arg-type]
        shapes["dora_scale"] = (1, layer.weight.shape[1], *ones)  # type: ignore[union-attr]
    return shapes


def in_words_of_a_file(config: TrainConfig, target: Target, shapes: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(kind_for(config, target), DyLoRA):
        return shapes
    rank = config.unit * len(shapes) // 2
    down, up = shapes["lora_down.0000"], shapes["lora_up.0000"]
    return {"lora_down.weight": (rank, math.prod(down[1:])), "lora_up.weight": (up[0], rank)}


def shape_only(config: TrainConfig, base: Base) -> Any:
    """An adapter without memory: as much of it as an optimizer needs."""
    layers = []
    for target in targets_of(base, config):
        module = base.components()[target.component].get_submodule(target.path)
        kind = kind_for(config, target)
        weights = {
            ending: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=ending not in kind.frozen)
            for ending, shape in shapes_of(config, target, module).items()
        }
        layers.append(Layer(target, None, weights))
    return type("ShapeOnly", (), {"layers": layers})()


def trained_values(config: TrainConfig, adapter: Any) -> dict[str, int]:
    """rate → how many values are trained at it."""
    found: dict[str, int] = {}
    for group in build_optimizer(config, adapter).param_groups:
        rate = f"{group['base_lr']:.6g}"
        found[rate] = found.get(rate, 0) + sum(weight.numel() for weight in group["params"])
    return dict(sorted(found.items()))


SIZES = [(name, family) for name in RECORDED["sizes"] for family in RECORDED["sizes"][name]]


def test_every_case_is_recorded() -> None:
    assert RECORDED["sizes"].keys() == EVERY_CASE.keys()
    assert RECORDED["learned"].keys() == CASES.keys()
    assert {family for _, family in SIZES} == set(FAMILIES)


@pytest.mark.parametrize(("name", "family"), SIZES)
def test_modules_alphas_and_rates_are_those_of_the_original(name: str, family: str, tmp_path: Path) -> None:
    config = read(tmp_path, EVERY_CASE[name])
    adapter = shape_only(config, base_of(family))
    modules = {}
    for layer in adapter.layers:
        shapes = {ending: tuple(weight.shape) for ending, weight in layer.weights.items()}
        kind = kind_for(config, layer.target)
        modules[layer.target.key] = (
            layer.target.alpha if kind.constant else None,
            in_words_of_a_file(config, layer.target, shapes),
        )
    expected = RECORDED["sizes"][name][family]
    lines = lines_of(modules)
    assert len(lines) == expected["modules"]
    assert digest(lines) == expected["sha256"]
    assert trained_values(config, adapter) == expected["values"]


class Block:
    """The chosen block of DyLoRA, and no dropout."""

    def __init__(self) -> None:
        self.number: int | None = None

    def rows(self, count: int, like: torch.Tensor) -> None:
        return None

    def entries(self, like: torch.Tensor) -> None:
        return None

    def block(self, count: int) -> int | None:
        return self.number


@torch.no_grad()
def begin(adapter: Adapter, *, other_half: bool = False) -> None:
    """The first values of the recorded problem. ``other_half``: a Tucker LoHa starts with w1_a at zero, as in
    networks/loha.py, and not w2_a; both are factors of one product."""
    for layer in adapter.layers:
        if isinstance(layer.kind, DyLoRA):
            for ending, axis in (("lora_down", 0), ("lora_up", 1)):
                parts = [weight for end, weight in sorted(layer.weights.items()) if end.startswith(ending)]
                whole = start(layer.target.key, f"{ending}.weight", torch.cat([*parts], dim=axis))
                for part, value in zip(parts, whole.split(parts[0].shape[axis], dim=axis), strict=True):
                    part.copy_(value)
            continue
        if other_half and "hada_t1" in layer.weights:
            one, other = (layer.weights[f"hada_w{number}_a"] for number in (1, 2))
            other.copy_(one)
            one.zero_()
        for ending, weight in layer.weights.items():
            weight.copy_(start(layer.target.key, ending, weight))


def learned(config: TrainConfig, *, other_half: bool = False) -> dict[str, list[float]]:
    """What every module has learned after the steps."""
    adapter = inject(small_base(), config)
    begin(adapter, other_half=other_half)
    optimizer = build_optimizer(config, adapter)
    chance = Block()
    for layer in adapter.layers:
        if isinstance(layer.kind, DyLoRA):
            layer.wrapped.chance = chance
    inputs = {
        layer.target.key: input_of(layer.wrapped.base_layer, f"{layer.target.key} input")
        for layer in adapter.layers
    }
    for step in range(STEPS):
        chance.number = BLOCKS[step]
        for layer in adapter.layers:
            loss(layer.target.key, layer.wrapped(inputs[layer.target.key])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    chance.number = None
    found = {}
    with torch.no_grad():
        for layer in adapter.layers:
            key, base_layer = layer.target.key, layer.wrapped.base_layer
            probe = input_of(base_layer, f"{key} probe")
            found[key] = figures(key, layer.wrapped(probe) - base_layer(probe))
    adapter.remove()
    return found


def different(found: dict[str, list[float]], expected: list[list[float]], scale: float = 1.0) -> list[str]:
    """The modules that moved otherwise, by more than fp32 explains."""
    return [
        f"{key}: {values} for {figure}"
        for (key, values), figure in zip(sorted(found.items()), expected, strict=True)
        if any(abs(a * scale - b) > 2e-4 * figure[0] + 2e-6 for a, b in zip(values, figure, strict=True))
    ]


@pytest.mark.parametrize(("name", "optimizer"), [case for case in LEARNED if case[0] not in DIFFERS])
def test_a_module_learns_what_it_learns_in_the_original(name: str, optimizer: str, tmp_path: Path) -> None:
    config = read(tmp_path, CASES[name], optimizer)
    found = learned(config, other_half=name == "loha tucker")
    expected = RECORDED["learned"][name][optimizer]
    moved = [figure[0] > 0 for figure in found.values()]
    assert sum(moved) > 0.95 * len(moved)  # OFT has blocks of one output in the layer before the noise
    assert different(found, expected) == []


def with_gradients_of_the_other_half(_: LoHa, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """ΔW of LoHa. With cores w1_a gets the gradient that it would have with the core and w2_b of the other half, and
    w2_a likewise: LyCORIS functional/loha.py and sd-scripts networks/loha.py, HadaWeightTucker.backward."""
    a_1, b_1, a_2, b_2 = (tensors[ending] for ending in LoHa.endings)
    if "hada_t1" not in tensors:
        return (a_1 @ b_1) * (a_2 @ b_2)
    t_1, t_2 = tensors["hada_t1"], tensors["hada_t2"]
    first, second = tucker(t_2.detach(), a_1, b_2.detach()), tucker(t_1.detach(), a_2, b_1.detach())
    left = tucker(t_1, a_1.detach(), b_1) + first - first.detach()
    right = tucker(t_2, a_2.detach(), b_2) + second - second.detach()
    return (left * right).flatten(1)


@pytest.mark.parametrize("name", ["loha tucker", "ly loha tucker"])
def test_a_tucker_loha_differs_by_two_gradients_of_the_original(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, half = read(tmp_path, CASES[name], "SGDNesterov"), name == "loha tucker"
    expected = RECORDED["learned"][name]["SGDNesterov"]
    ours = different(learned(config, other_half=half), expected)
    assert len(ours) == sum(
        target.rank == config.conv_dim for target in targets_of(tiny_base("sd15"), config)
    )
    monkeypatch.setattr(LoHa, "delta", with_gradients_of_the_other_half)
    assert different(learned(config, other_half=half), expected) == []


@pytest.mark.parametrize("name", ["ly dylora", "ly dylora plus"])
def test_lycoris_dylora_learns_the_same_factors_and_writes_a_file_that_is_stronger(
    name: str, tmp_path: Path
) -> None:
    """AdamW's steps do not depend on the scale, so what is learned is equal. With all of its blocks LyCORIS is at
    alpha / blocks, and its file says alpha / dim, as here."""
    config = read(tmp_path, CASES[name], "AdamW")
    assert different(learned(config), RECORDED["learned"][name]["AdamW"], scale=config.unit) == []


# One layer


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


KINDS = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "Full",
    "lora fa": "LoRA-FA",
    "dora": "DoRA",
    "dylora": "DyLoRA",
}


def one_layer(name: str) -> tuple[Adapter, Layer]:
    """The layer of a recording with our adapter of the same kind and tensors."""
    who, shape, arguments = SINGLE[name]
    kind = next((kind for part, kind in KINDS.items() if part in name), "LoRA")
    layer = single_layer(shape)
    target = Target("unet", "layer", "x", RANK, ALPHA, kind)
    config = TrainConfig(unit=arguments.get("unit", arguments.get("block_size", 1)))
    tensors = {}
    made = kind_for(config.with_values({"network_type": kind}), target)
    target = replace(target, alpha=made.alpha(layer, RANK, ALPHA))
    shapes = dict(made.shapes(layer, RANK))
    if isinstance(made, DyLoRA):
        whole = {end: filled(end, torch.ones(size)) for end, size in LoRA().shapes(layer, RANK).items()}
        tensors = made.unfolded(whole, shapes)
    else:
        tensors = {end: filled(end, torch.ones(size)) for end, size in shapes.items()}
    if kind == "DoRA":
        tensors["dora_scale"] = filled("dora_scale", column_norm(layer.weight.detach()))  # type: ignore[arg-type]
    holder = Holder(layer)
    base: Any = SimpleNamespace(components=lambda: {"unet": holder})
    dropout = Dropout(rank=arguments.get("rank_dropout", 0.0), rows=who.endswith("Module"))
    adapter = Adapter(base, [target], {f"x.{end}": value for end, value in tensors.items()}, dropout=dropout)
    return adapter, adapter.layers[0]


def output_and_gradients(layer: Layer) -> tuple[list[float], dict[str, list[float]]]:
    output = layer.wrapped(input_of(layer.wrapped.base_layer, "single"))
    loss("single", output).backward()  # type: ignore[no-untyped-call]
    gradients = {
        end: figures(end, weight.grad) for end, weight in layer.weights.items() if weight.grad is not None
    }
    return figures("single", output), gradients


def near(found: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) <= 2e-5 * expected[0] for a, b in zip(found, expected, strict=True))


def kept(name: str, layer: Layer) -> torch.Tensor:
    """The rows of ΔW that are kept in the recording."""
    return (drawn(SINGLE[name][1][0]) > SINGLE[name][2]["rank_dropout"]).float()


SPELLED = {"bias": "diff_b", "weight": "diff"}


@pytest.mark.parametrize("name", [name for name in SINGLE if "rows" in name or name == "dropout"])
def test_rank_dropout_with_the_same_draws_gives_the_same_output(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LyCORIS drops rows of ΔW unscaled, sd-scripts' own LoHa and LoKr scale up the rest; LyCORIS' dropout of LoRA does
    nothing while it is not in bypass_mode, so it is not passed on here."""
    adapter, layer = one_layer(name)
    if "rows" in name:
        monkeypatch.setattr(Draws, "kept_rows", lambda *_: kept(name, layer))
    adapter.apply_dropout(1)
    output, gradients = output_and_gradients(layer)
    expected = RECORDED["single"][name]
    assert near(output, expected["output"])
    if "dora" not in name:
        for ending, figure in expected["gradients"].items():
            ending = SPELLED.get(ending, ending) if "full" in name else ending
            assert near(gradients[ending], figure), ending


@pytest.mark.parametrize("name", ["rank", "rank conv"])
def test_rank_dropout_of_networks_lora_with_the_same_draws_gives_the_same_output(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, layer = one_layer(name)
    rate = SINGLE[name][2]["rank_dropout"]

    def mask(_: Draws, shape: list[int], keep: float, like: torch.Tensor, *__: Any) -> torch.Tensor:
        return (drawn(2, RANK) > rate).float().reshape(shape)

    monkeypatch.setattr(Draws, "kept", mask)
    adapter.apply_dropout(1)
    output, gradients = output_and_gradients(layer)
    assert near(output, RECORDED["single"][name]["output"])
    for ending, figure in RECORDED["single"][name]["gradients"].items():
        assert near(gradients[ending], figure), ending


def test_lora_fa_of_one_layer_is_that_of_sd_scripts() -> None:
    _, layer = one_layer("lora fa")
    output, gradients = output_and_gradients(layer)
    expected = RECORDED["single"]["lora fa"]
    assert near(output, expected["output"])
    assert gradients.keys() == {"lora_up.weight"} == expected["gradients"].keys()
    assert near(gradients["lora_up.weight"], expected["gradients"]["lora_up.weight"])


def dylora(name: str, *, all_ranks: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], Layer]:
    """Output and gradients, by the endings of a file, with the block of the recording. ``all_ranks``: ranks after it
    are used as constants, as in sd-scripts."""
    _, layer = one_layer(name)
    chance = Block()
    chance.number = SINGLE[name][2]["block"]
    layer.wrapped.chance = chance
    x = input_of(layer.wrapped.base_layer, "single")
    output = layer.wrapped(x)
    if all_ranks:
        used = layer.wrapped.difference(chance)[0]
        chance.number = 1  # the last block: all ranks, at the scale of all
        share = math.sqrt(2 / (SINGLE[name][2]["block"] + 1))
        rest = layer.wrapped.difference(chance)[0] * share - used
        layer_ = layer.wrapped.base_layer
        if isinstance(layer_, nn.Conv2d):
            output = output + nn.functional.conv2d(x, rest.detach(), None, layer_.stride, layer_.padding)
        else:
            output = output + nn.functional.linear(x, rest.detach())
    loss("single", output).backward()  # type: ignore[no-untyped-call]
    gradients = {end: weight.grad for end, weight in layer.weights.items() if weight.grad is not None}
    return output, gradients, layer


@pytest.mark.parametrize("name", [name for name in SINGLE if name.startswith("dylora")])
def test_a_block_of_dylora_gets_the_gradients_of_sd_scripts(name: str) -> None:
    """The output differs by the ranks after the block, which sd-scripts uses as constants, and by nothing else."""
    block = SINGLE[name][2]["block"]
    output, gradients, _ = dylora(name, all_ranks=True)
    expected = RECORDED["single"][name]
    assert near(figures("single", output), expected["output"])
    assert gradients.keys() == {f"lora_down.{block:04}", f"lora_up.{block:04}"}
    own, _, _ = dylora(name, all_ranks=False)
    assert near(figures("single", own), expected["output"]) is (block == 1)
    for side, ending in (("A", "lora_down"), ("B", "lora_up")):
        theirs = [f"lora_{side}.{2 * block + n}" for n in (0, 1)]
        parts = gradients[f"{ending}.{block:04}"].split(1, dim=0 if side == "A" else 1)
        for other, part in zip(theirs, parts, strict=True):
            assert near(figures(other, part), expected["gradients"][other]), other
    assert len(expected["gradients"]) == 4


@pytest.mark.parametrize("name", [name for name in SINGLE if name.startswith("ly dylora")])
def test_a_block_of_lycoris_dylora_gets_its_gradients_at_another_scale(name: str) -> None:
    """alpha / blocks in use there, alpha / dim · √(dim / ranks in use) here."""
    block = SINGLE[name][2]["block"]
    _, gradients, _ = dylora(name, all_ranks=False)
    ratio = (ALPHA / (block + 1)) / (ALPHA / RANK * math.sqrt(2 / (block + 1)))
    for side, ending in (("down_list", "lora_down"), ("up_list", "lora_up")):
        figure = RECORDED["single"][name]["gradients"][f"{side}.{block}"]
        assert near(figures(f"{side}.{block}", gradients[f"{ending}.{block:04}"] * ratio), figure)


@pytest.mark.parametrize("name", ["dora", "dora conv"])
def test_dora_differs_from_lycoris_by_the_constant_norm_only(name: str) -> None:
    """Output and the magnitude's gradient are equal. With a norm that is differentiated the factors get LyCORIS'
    gradients; as a constant they get ours."""
    _, layer = one_layer(name)
    base_layer = layer.wrapped.base_layer
    output, gradients = output_and_gradients(layer)
    expected = RECORDED["single"][name]
    assert near(output, expected["output"])
    assert near(gradients["dora_scale"], expected["gradients"]["dora_scale"])

    def by_formula(is_constant: bool) -> dict[str, list[float]]:
        tensors = {end: weight.detach().clone().requires_grad_() for end, weight in layer.weights.items()}
        merged = base_layer.weight + layer.kind.delta(tensors).reshape(base_layer.weight.shape) * ALPHA / RANK
        norm = column_norm(merged)
        weight = merged * tensors["dora_scale"] / (norm.detach() if is_constant else norm)
        x = input_of(base_layer, "single")
        if isinstance(base_layer, nn.Conv2d):
            result = nn.functional.conv2d(x, weight, base_layer.bias, base_layer.stride, base_layer.padding)
        else:
            result = nn.functional.linear(x, weight, base_layer.bias)
        loss("single", result).backward()  # type: ignore[no-untyped-call]
        return {end: figures(end, tensor.grad) for end, tensor in tensors.items() if tensor.grad is not None}

    theirs, ours = by_formula(is_constant=False), by_formula(is_constant=True)
    for ending in ("lora_down.weight", "lora_up.weight"):
        assert near(theirs[ending], expected["gradients"][ending]), ending
        assert near(ours[ending], gradients[ending]), ending
        assert not near(gradients[ending], expected["gradients"][ending]), ending
