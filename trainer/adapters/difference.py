"""Differences: what a LoRA file adds to weights and biases, put into a base and taken out again.

For forms that no adapter class computes: full differences, norms, IA³, OFT, GLoRA.  They cannot be trained.  Linear
layers and convolutions get the difference beside their own output, so that it is not rounded away in half types and
layers in fp8 keep their form; norms get other parameters while it is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.adapters.forms import Change
from trainer.bases import Base


class Differences:
    """Changes attached to layers of a base, by kohya's key.  ``remove`` leaves the base bitwise as it was."""

    def __init__(self) -> None:
        self._changes: dict[str, Change] = {}
        self._layers: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[tuple[Any, Change]]:
        """Layer and change, of every one."""
        return iter([(self._layers[key], change) for key, change in self._changes.items()])

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, base: Base, key: str, layer: Any, change: Change) -> None:
        """Attach a change that fits the layer (``fits``)."""
        assert fits(layer, change), key
        self._changes[key] = change
        self._layers[key] = layer
        if isinstance(layer, nn.Linear | nn.Conv2d):
            self._undo.append(layer.register_forward_hook(_added(base, layer, change)).remove)
        else:
            self._replace(layer, change)

    def state(self) -> dict[str, Tensor]:
        """``KEY.diff`` and ``KEY.diff_b``, fp32 copies on CPU."""
        state: dict[str, Tensor] = {}
        for key, change in self._changes.items():
            for ending, value in (("diff", change.weight), ("diff_b", change.bias)):
                if value is not None:
                    state[f"{key}.{ending}"] = value.detach().to("cpu", torch.float32, copy=True)
        return state

    def remove(self) -> None:
        """Take all of them out."""
        for undo in reversed(self._undo):
            undo()
        self._undo, self._changes = [], {}

    def _replace(self, layer: Any, change: Change) -> None:
        """Other parameters for a norm."""
        for name, added in (("weight", change.weight), ("bias", change.bias)):
            own = getattr(layer, name)
            if added is None or own is None:
                continue
            value = (own.detach().float() + added.to(own.device)).to(own.dtype)
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
            self._undo.append(lambda name=name, own=own: setattr(layer, name, own))  # type: ignore[misc]


def fits(layer: Any, change: Change) -> bool:
    """Whether a change has the shapes of a layer's weight and bias.  A linear layer or convolution may gain a bias."""
    if change.weight is not None and change.weight.shape != layer.weight.shape:
        return False
    if change.bias is None:
        return True
    may_gain = isinstance(layer, nn.Linear | nn.Conv2d)
    return change.bias.numel() == layer.weight.shape[0] and (may_gain or layer.bias is not None)


def _added(base: Base, layer: Any, change: Change) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that adds what the difference makes of a layer's input."""
    place = layer.weight.device
    kept_in = base.compute_dtype
    weight = None if change.weight is None else change.weight.to(place, kept_in)
    bias = None if change.bias is None else change.bias.to(place, kept_in)

    def add(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        given = inputs[0]
        own = None if bias is None else bias.to(output.dtype)
        if weight is None:
            assert own is not None
            shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
            return output + own.reshape(shape)
        changed = weight.to(given.dtype)
        if isinstance(layer, nn.Conv2d):
            more = functional.conv2d(
                given, changed, own, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        else:
            more = functional.linear(given, changed, own)
        return output + more.to(output.dtype)

    return add
