"""ChangedLayer: a frozen layer plus a change of its weight and bias, y = f(x; W, b) + f(x; ΔW, Δb).

Owns the forward pass of what PEFT has no layer for (Tucker forms, full differences, norms, IA³, OFT, GLoRA, DyLoRA);
the formulas of ΔW are ``kinds``' and ``morekinds``'. This is how LyCORIS computes all its modules (lycoris/modules).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.around import AroundLayer


class Chance(Protocol):
    """What is drawn in a training step for one layer; each is None outside training."""

    def rows(self, count: int, like: Tensor) -> Tensor | None:
        """A factor for each row of ΔW: 0 where rank_dropout drops it."""

    def entries(self, like: Tensor) -> Tensor | None:
        """A factor for each entry: 0 where rank_dropout drops it, and the rest scaled up."""

    def block(self, count: int) -> int | None:
        """One of ``count`` blocks of ranks."""


class Formula(Protocol):
    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]: ...


class ChangedLayer(AroundLayer):
    """A layer of a base and the trained tensors of its change. ``chance`` is set while training uses dropout."""

    def __init__(
        self,
        base_layer: nn.Module,
        formula: Formula,
        tensors: Mapping[str, nn.Parameter],
        name: str,
        scale: float,
    ) -> None:
        super().__init__(base_layer, name, scale)
        self._formula = formula
        self.tensors = nn.ParameterDict(
            {ending.replace(".", "_"): value for ending, value in tensors.items()}
        )
        self._endings = {ending: ending.replace(".", "_") for ending in tensors}
        self.chance: Chance | None = None

    def difference(self, chance: Chance | None = None) -> tuple[Tensor, Tensor | None]:
        """ΔW in the shape of the weight, and Δb, in fp32 whatever autocast says."""
        tensors = {ending: self.tensors[name] for ending, name in self._endings.items()}
        device = next(iter(tensors.values())).device
        with torch.autocast(device.type, enabled=False):
            tensors = {ending: tensor.float() for ending, tensor in tensors.items()}
            return self._formula.difference(tensors, self.base_layer, self.scaling[self._name], chance)

    def get_delta_weight(self, _name: str) -> Tensor:
        return self.difference()[0]

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **options)
        if self._disable_adapters:
            return result
        weight, bias = self.difference(self.chance)
        if self.chance is not None and (rows := self.chance.rows(weight.shape[0], weight)) is not None:
            weight = weight * rows.reshape(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * rows
        return result + _applied(self.base_layer, x, weight, bias).to(result.dtype)


def _applied(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """f(x; ΔW, Δb) of a layer."""
    is_traced = x.device.type == "meta"  # trainer.memory stands in for autocast
    if not is_traced and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.LayerNorm):
        shape = list(layer.normalized_shape)
        return _scaled(F.layer_norm(x, shape, None, None, layer.eps), weight, bias)
    if isinstance(layer, nn.GroupNorm):
        normed = F.group_norm(x, layer.num_groups, None, None, layer.eps)
        ones = [1] * (normed.dim() - 2)
        return _scaled(normed, weight.reshape(-1, *ones), None if bias is None else bias.reshape(-1, *ones))
    return F.linear(x, weight, bias)


def _scaled(normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return normed * weight if bias is None else normed * weight + bias
