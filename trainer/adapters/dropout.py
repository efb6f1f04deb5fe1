"""Dropout: what is left out of an adapter in a training step – values, ranks, rows of ΔW, whole modules.

Owns the shares and the random numbers. They are keyed by (seed, step, micro-batch) and the layer's number, so a
resumed run and the recomputation of gradient checkpointing draw the same, and a part of a split micro-batch draws what
the whole would. Does not own where a layer applies them (``lowrank``, ``changed``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dropout:
    """Dropout while training: shares of channels after lora_down, of ranks, of modules.  ``rows``: ``rank`` is LyCORIS'
    rank_dropout, which drops rows of ΔW (one draw for a micro-batch) and does not scale the rest."""

    network: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    rows: bool = False

    def __bool__(self) -> bool:
        return max(self.network, self.rank, self.module) > 0


class Dropping(Protocol):
    """A layer of an adapter, as far as dropout needs it."""

    @property
    def wrapped(self) -> Any: ...
    @property
    def weights(self) -> dict[str, nn.Parameter]: ...
    @property
    def kind(self) -> Any: ...
    def drops_rows(self, dropout: Dropout) -> bool: ...


class Draws:
    """What is drawn for one micro-batch: ``key`` is set while dropout is on, ``part`` (first, count, of how many) are
    the rows of it that are computed."""

    def __init__(self, dropout: Dropout) -> None:
        self.dropout = dropout
        self.key: tuple[int, ...] | None = None
        self.part = (0, 0, 0)
        self._generators: dict[torch.device, torch.Generator] = {}

    def kept(self, shape: Sequence[int], keep: float, like: Tensor, *purpose: int | str) -> Tensor:
        """A mask of 0 and 1 in the type of ``like``, drawn for a purpose of this micro-batch.  For some rows of it:
        drawn for all of it, then those rows. An image has several rows where a long caption is read in windows."""
        start, count, total = self.part
        each = shape[0] // count if 0 < count < total else 0
        drawn = [total * each, *shape[1:]] if each else shape
        generator = self.generator(like.device, *purpose)
        mask = torch.empty(drawn, device=like.device, dtype=like.dtype).bernoulli_(keep, generator=generator)
        return mask[start * each : (start + count) * each] if each else mask

    def generator(self, device: torch.device, *purpose: int | str) -> torch.Generator:
        """A generator for one purpose of this micro-batch: the device's own, seeded anew, since making one takes
        longer than what it draws here."""
        assert self.key is not None
        key = (*self.key, *purpose)
        if device in self._generators:
            return self._generators[device].manual_seed(seed_of(*key))
        made = keyed_generator(*key, device=device)
        if made is not None:  # None while memory is traced
            self._generators[device] = made
        return made

    def kept_rows(self, number: int, layer: Dropping) -> Tensor | None:
        """1 or 0 for each row of ΔW (out), fp32; None where no rows are dropped."""
        if self.key is None or self.dropout.rank == 0 or not layer.drops_rows(self.dropout):
            return None
        device = next(iter(layer.weights.values())).device
        generator = self.generator(device, number, "rank")
        outputs = layer.wrapped.base_layer.weight.shape[0]
        return torch.empty(outputs, device=device).bernoulli_(1.0 - self.dropout.rank, generator=generator)

    def of_weight(self, number: int, layer: Dropping) -> Any:
        """rank_dropout of LoHa and LoKr: whole rows of ΔW, the rest scaled up (LyCORIS' rank_dropout_scale) unless
        ``Dropout.rows``."""
        get_delta_weight = layer.wrapped.get_delta_weight

        def dropped(*args: Any, **options: Any) -> Tensor:
            delta: Tensor = get_delta_weight(*args, **options)
            rows = self.kept_rows(number, layer)
            if rows is None:
                return delta
            rows = rows.to(delta.dtype).reshape(-1, *[1] * (delta.dim() - 1))
            return delta * (rows if self.dropout.rows else rows / (1.0 - self.dropout.rank))

        return dropped


class Drop:
    """What one LowRankLayer drops: kohya's network_dropout and rank_dropout on what leaves ``lora_down``, single
    values and whole ranks of a sample, or LyCORIS' rank_dropout, rows of ΔW.  It depends only on the key and
    the layer's number, so gradient checkpointing recomputes the same."""

    def __init__(self, draws: Draws, number: int, layer: Dropping) -> None:
        self._draws, self._number, self._layer = draws, number, layer

    def ranks(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor | None, float]:
        draws, dropout = self._draws, self._draws.dropout
        if draws.key is None:
            return None, 1.0
        mask, kept = None, 1.0
        if dropout.network > 0:
            kept = 1.0 - dropout.network
            mask = draws.kept(shape, kept, like, self._number)
        if dropout.rank > 0 and not dropout.rows:
            axis = -1 if len(shape) < 4 else 1
            whole = [1] * len(shape)
            whole[0], whole[axis] = shape[0], shape[axis]
            ranks = draws.kept(whole, 1.0 - dropout.rank, like, self._number, "rank").expand(*shape)
            mask = ranks if mask is None else mask * ranks
            kept *= 1.0 - dropout.rank
        return mask, kept

    def rows(self) -> Tensor | None:
        return self._draws.kept_rows(self._number, self._layer)

    @property
    def changes_rows(self) -> bool:
        dropout = self._draws.dropout
        return dropout.rank > 0 and self._layer.drops_rows(dropout)


class Chance:
    """What one ChangedLayer draws; its values depend only on the key and the layer's number."""

    def __init__(self, draws: Draws, number: int, layer: Dropping) -> None:
        self._draws, self._number, self._layer = draws, number, layer

    def rows(self, count: int, like: Tensor) -> Tensor | None:
        if not self._layer.kind.drops_rows:
            return None
        rows = self._draws.kept_rows(self._number, self._layer)
        if rows is None or self._draws.dropout.rows:
            return rows
        return rows / (1.0 - self._draws.dropout.rank)

    def entries(self, like: Tensor) -> Tensor | None:
        key, rate = self._draws.key, self._draws.dropout.rank
        if key is None or rate == 0:
            return None
        generator = self._draws.generator(like.device, self._number, "rank")
        return torch.empty_like(like).bernoulli_(1.0 - rate, generator=generator) / (1.0 - rate)

    def block(self, count: int) -> int | None:
        key = self._draws.key
        return None if key is None else int(drawn(*key, self._number, "block") * count)


def drawn(*key: int | str) -> float:
    """A number from 0 to 1 that depends on the key only."""
    return float(torch.rand((), generator=keyed_generator(*key)))


def seed_of(*key: int | str) -> int:
    """The seed of a key: 63 bits of its sha256."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends only on the key, whatever the machine and the order of use."""
    return torch.Generator(device).manual_seed(seed_of(*key))
