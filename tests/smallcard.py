"""A card of any size on a CPU: networks are only marked as being on it, and computing with one that is not there fails.

For the decisions of ``trainer.card``. What a real device does with tensors is tested elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.card import Card, nbytes


class SmallCard(Card):
    """A card of ``size`` bytes. ``moved`` lists what went and came; ``seen``: phase → networks on the card whenever
    something was computed in it."""

    def __init__(self, size: int, *, spare: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.moves, self.spare_bytes, self.size = True, spare, size
        self.moved: list[str] = []
        self.seen: dict[str, set[frozenset[str]]] = {}

    def add(self, network: nn.Module, name: str) -> None:
        super().add(network, name)
        for module in network.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda *_, network=network: self._computing(network))

    def _computing(self, network: nn.Module) -> None:
        assert self.is_here(network), (
            f"{self._names[network]} computes in {self.phase_name!r} and is not there"
        )
        self.seen.setdefault(self.phase_name, set()).add(frozenset(self.residents()))

    def free_bytes(self) -> int:
        return self.size - sum(nbytes(network) for network in self._names if self.is_here(network))

    def total_bytes(self) -> int | None:
        return self.size

    def leave(self, network: nn.Module) -> None:
        self._away.add(network)
        self.moved.append(f"-{self._names[network]}")

    def come(self, network: nn.Module) -> None:
        self._away.discard(network)
        self.moved.append(f"+{self._names[network]}")


def on_card(base: Any, size: int) -> SmallCard:
    """A card of that size with a base on it."""
    card = SmallCard(size)
    base.live_on(card)
    del card.moved[:]
    return card
