"""AroundLayer: what the layers of an adapter have in common – the frozen layer of the base inside, and a switch."""

from __future__ import annotations

from typing import Any

from torch import nn


class AroundLayer(nn.Module):
    """A module in the place of a base's layer. ``scaling`` holds alpha / rank under the adapter's name, as PEFT's
    layers do; ``_disable_adapters`` is the switch that module_dropout uses, under PEFT's name as well."""

    def __init__(self, base_layer: nn.Module, name: str, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = {name: scale}
        self._name = name
        self._disable_adapters = False

    @property
    def weight(self) -> Any:
        """The frozen weight, for code that reads a layer's."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer computes as without an adapter."""
        return self._disable_adapters
