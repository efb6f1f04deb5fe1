"""Injection: the layers of an adapter in the place of a base's, and back.

Owns which class of layer a target gets and how its tensors are placed; ``adapter`` owns the adapter as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from trainer.adapters.around import AroundLayer
from trainer.adapters.changed import ChangedLayer
from trainer.adapters.choice import KINDS
from trainer.adapters.kinds import NAME, SCALAR, Kind, LoRA
from trainer.adapters.lowrank import LowRankLayer
from trainer.adapters.magnitude import MAGNITUDE
from trainer.adapters.morekinds import DyLoRA
from trainer.adapters.targets import Target

Placed = tuple[
    Target, Any, dict[str, nn.Parameter]
]  # a target, the layer around the base's, its tensors by ending


def inject_component(
    model: nn.Module, targets: list[Target], weights: Mapping[str, Tensor], kept_in: torch.dtype
) -> list[Placed]:
    """Layers around the targets of one network, holding ``weights`` on the network's device; DoRA's magnitudes always
    in fp32.  ``LowRankLayer`` for LoRA, PEFT's for LoHa and LoKr, else ``ChangedLayer``."""
    assert not hasattr(model, "peft_config"), "an adapter is in the base already: remove it first"
    tensors = {target.key: _tensors_of(target, weights) for target in targets}
    plain = [target for target in targets if not KINDS[target.kind].is_changed(tensors[target.key])]
    low_rank = {target.path for target in plain if isinstance(KINDS[target.kind], LoRA)}
    of_peft = [target for target in plain if target.path not in low_rank]
    first = type(KINDS[of_peft[0].kind]).settings if of_peft else None
    of_peft = [target for target in of_peft if type(KINDS[target.kind]).settings is first]
    if of_peft:
        settings = KINDS[of_peft[0].kind].settings(of_peft)
        inject_adapter_in_model(settings, model, adapter_name=NAME, low_cpu_mem_usage=True)
    else:
        model.requires_grad_(False)
        model.peft_config = {}  # type: ignore[assignment]
    how = dict.fromkeys((target.path for target in of_peft), _fill) | dict.fromkeys(low_rank, _put_low_rank)
    return [how.get(target.path, _wrap)(model, target, tensors[target.key], kept_in) for target in targets]


def _tensors_of(target: Target, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ending → tensor of a target."""
    kind = KINDS[target.kind]
    if isinstance(kind, DyLoRA):
        start = f"{target.key}.lora_"
        return {
            key.removeprefix(f"{target.key}."): value
            for key, value in weights.items()
            if key.startswith(start)
        }
    endings = (*kind.endings, *kind.extras, SCALAR, MAGNITUDE)
    return {ending: weights[key] for ending in endings if (key := f"{target.key}.{ending}") in weights}


def _parameter(
    kind: Kind, ending: str, value: Tensor, device: torch.device, kept_in: torch.dtype
) -> nn.Parameter:
    number = torch.float32 if ending == MAGNITUDE else kept_in
    return nn.Parameter(value.to(device, number, copy=True), requires_grad=ending not in kind.frozen)


def _fill(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype) -> Placed:
    """PEFT's layer of a target with these tensors."""
    kind = KINDS[target.kind]
    wrapped: Any = model.get_submodule(target.path)
    placed: dict[str, nn.Parameter] = {}
    for ending, value in tensors.items():
        placed[ending] = _parameter(kind, ending, value, wrapped.base_layer.weight.device, kept_in)
        shape = kind.shape(wrapped, ending)
        assert shape is None or shape == value.shape, f"{target.key}: {value.shape} for {shape}"
        kind.place(wrapped, ending, placed[ending])
    wrapped.scaling[NAME] = target.alpha / target.rank
    return target, wrapped, placed


def _put_low_rank(
    model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype
) -> Placed:
    """A LowRankLayer in the place of a target."""
    layer: Any = model.get_submodule(target.path)
    placed = {
        ending: _parameter(KINDS[target.kind], ending, value, layer.weight.device, kept_in)
        for ending, value in tensors.items()
    }
    down, up = (placed[ending] for ending in LoRA.endings)
    wrapped = LowRankLayer(layer, down, up, NAME, target.alpha / target.rank)
    if MAGNITUDE in placed:
        wrapped.register_parameter(MAGNITUDE, placed[MAGNITUDE])
    wrapped.train(layer.training)
    _put(model, target.path, wrapped)
    return target, wrapped, placed


def _wrap(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype) -> Placed:
    """A ChangedLayer in the place of a target."""
    kind = KINDS[target.kind]
    layer: Any = model.get_submodule(target.path)
    placed = {
        ending: _parameter(kind, ending, value, layer.weight.device, kept_in)
        for ending, value in tensors.items()
    }
    wrapped = ChangedLayer(layer, kind, placed, NAME, kind.scale(target.rank, target.alpha))
    wrapped.train(layer.training)
    _put(model, target.path, wrapped)
    return target, wrapped, placed


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def unwrap(model: nn.Module) -> None:
    """Put the layers of a base back where one of ours is."""
    for path, module in [*model.named_modules()]:
        if isinstance(module, AroundLayer):
            _put(model, path, module.base_layer)
