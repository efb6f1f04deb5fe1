"""Kinds of adapters: LoRA, LoHa and LoKr – the tensors of each, their start, and PEFT's layer for it.

Owns what differs between kinds; ``adapter`` owns what they share.  PEFT computes the forward pass; LoCon is
LoRA on convolutions too, and DoRA is LoRA plus a magnitude (``adapter.Magnitude``).  Names of tensors and
their start are LyCORIS' (KohakuBlueleaf/LyCORIS, lycoris/modules), which ComfyUI and A1111 read; LoHa and
LoKr are the variants without Tucker decomposition.

Shapes: out in of a linear layer; a convolution has in·kh·kw where "in" is flattened; r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from trainer.config import TrainConfig

NAME = "lora"  # PEFT's name of the adapter inside each layer


class Ranked(Protocol):
    """The fields of a target that a kind needs."""

    @property
    def path(self) -> str: ...
    @property
    def rank(self) -> int: ...


class Kind(ABC):
    """One family of formulas for ΔW."""

    endings: ClassVar[tuple[str, ...]]  # endings of its tensors in a file, beside .alpha

    @abstractmethod
    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """ending → shape of its tensors for a layer."""

    @abstractmethod
    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """ending → first value.  ΔW is 0, and every tensor but the zeros gets a gradient soon."""

    @abstractmethod
    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        """PEFT's settings for the targets of one network.  Scales are set by the adapter."""

    @abstractmethod
    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """ΔW (out, in), before alpha / rank."""

    def alpha(self, layer: nn.Module, rank: int, alpha: float) -> float:
        """The alpha that a file holds for this layer."""
        return alpha

    @abstractmethod
    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        """The rank of tensors from a file."""

    @abstractmethod
    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        """Whether tensors from a file are complete and belong to a weight of this shape."""

    def place(self, wrapped: Any, ending: str, value: nn.Parameter) -> None:
        """Put a tensor into PEFT's layer."""
        getattr(wrapped, ending)[NAME] = value

    def shape(self, wrapped: Any, ending: str) -> torch.Size | None:
        """The shape that PEFT's layer has for a tensor; None: it has no such tensor."""
        held = getattr(wrapped, ending)
        return held[NAME].shape if NAME in held else None


class LoRA(Kind):
    """ΔW = up · down (arXiv 2106.09685)."""

    endings = ("lora_down.weight", "lora_up.weight")

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        if isinstance(layer, nn.Conv2d):
            down: tuple[int, ...] = (rank, layer.in_channels, *layer.kernel_size)
            up: tuple[int, ...] = (layer.out_channels, rank, 1, 1)
        else:
            assert isinstance(layer, nn.Linear)
            down, up = (rank, layer.in_features), (layer.out_features, rank)
        return {"lora_down.weight": down, "lora_up.weight": up}

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down kaiming-uniform (a = √5), up zero: sd-scripts networks/lora.py."""
        down, up = self.shapes(layer, rank).values()
        return {"lora_down.weight": _uniform(down, generator), "lora_up.weight": torch.zeros(up)}

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        rank, pattern = _ranks(targets)
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[target.path for target in targets],
            rank_pattern=pattern,
            lora_dropout=0.0,
            init_lora_weights=False,
        )

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["lora_down.weight"].shape[0]

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        if not tensors.keys() >= set(self.endings):
            return False
        down, up = (tensors[ending] for ending in self.endings)
        ones = (1,) * (weight.dim() - 2)
        return (
            down.dim() == weight.dim()
            and down.shape[1:] == weight.shape[1:]
            and up.shape == (weight.shape[0], down.shape[0], *ones)
        )

    def place(self, wrapped: Any, ending: str, value: nn.Parameter) -> None:
        _half(wrapped, ending).weight = value

    def shape(self, wrapped: Any, ending: str) -> torch.Size | None:
        shape = _half(wrapped, ending).weight.shape
        assert isinstance(shape, torch.Size)
        return shape


class LoHa(Kind):
    """ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b) (FedPara, arXiv 2108.06098)."""

    endings = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        out, inner = _flat_shape(layer)
        return {ending: (out, rank) if ending.endswith("a") else (rank, inner) for ending in self.endings}

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal with deviation 0.1 (w1_a) and 1 (w1_b, w2_b), w2_a zero: LyCORIS loha.py."""
        shapes = self.shapes(layer, rank)
        return {
            "hada_w1_a": torch.randn(shapes["hada_w1_a"], generator=generator) * 0.1,
            "hada_w1_b": torch.randn(shapes["hada_w1_b"], generator=generator),
            "hada_w2_a": torch.zeros(shapes["hada_w2_a"]),
            "hada_w2_b": torch.randn(shapes["hada_w2_b"], generator=generator),
        }

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        return _lycoris(LoHaConfig, targets)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (tensors[ending] for ending in self.endings)
        return (w1_a @ w1_b) * (w2_a @ w2_b)

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["hada_w1_b"].shape[0]

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        if not tensors.keys() >= set(self.endings):
            return False
        rank = tensors["hada_w1_b"].shape[0]
        outer, inner = (weight.shape[0], rank), (rank, weight[0].numel())
        return all(
            tensors[ending].shape == (outer if ending.endswith("a") else inner) for ending in self.endings
        )


class LoKr(Kind):
    """ΔW = w1 ⊗ w2, w1 small and whole, w2 = w2_a · w2_b – or whole where the rank is no saving
    (arXiv 2212.10650, LyCORIS arXiv 2309.14859)."""

    def __init__(self, factor: int = -1) -> None:
        """``factor``: LyCORIS' factor, which only a fresh adapter needs."""
        self.factor = factor

    endings = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        (out_small, out_large), (in_small, in_large), kernel = _factors(layer, self.factor)
        first: dict[str, tuple[int, ...]] = {"lokr_w1": (out_small, in_small)}
        if _is_whole(layer, rank, self.factor):
            return first | {"lokr_w2": (out_large, in_large, *kernel)}
        return first | {"lokr_w2_a": (out_large, rank), "lokr_w2_b": (rank, in_large * math.prod(kernel))}

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """w1 and w2_a kaiming-uniform (a = √5), w2_b or w2 zero: LyCORIS lokr.py."""
        return {
            ending: torch.zeros(shape) if ending in ("lokr_w2", "lokr_w2_b") else _uniform(shape, generator)
            for ending, shape in self.shapes(layer, rank).items()
        }

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        return _lycoris(LoKrConfig, targets)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        w1 = _product(tensors, "lokr_w1")
        return torch.kron(w1, _product(tensors, "lokr_w2").flatten(1))

    def alpha(self, layer: nn.Module, rank: int, alpha: float) -> float:
        """Alpha, or the rank (scale 1) where both factors are whole: readers take no scale there."""
        return float(rank) if _is_whole(layer, rank, self.factor) else alpha

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        """The rank of what is decomposed; both factors whole: alpha itself, so that the scale is 1."""
        for ending in ("lokr_w2_b", "lokr_w1_b"):
            if ending in tensors:
                return tensors[ending].shape[0]
        return 1 if alpha is None else max(1, round(alpha))

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        try:
            w1, w2 = _product(tensors, "lokr_w1"), _product(tensors, "lokr_w2").flatten(1)
        except (KeyError, RuntimeError, IndexError):
            return False
        shape = (w1.shape[0] * w2.shape[0], w1.shape[-1] * w2.shape[1])
        return w1.dim() == 2 and shape == (weight.shape[0], weight[0].numel())

    def shape(self, wrapped: Any, ending: str) -> torch.Size | None:
        """Files may split a weight otherwise than PEFT would: its own shape does not bind."""
        return None

    def place(self, wrapped: Any, ending: str, value: nn.Parameter) -> None:
        """PEFT prefers a whole factor to its halves, so tensors that are not in the file are removed."""
        for other in _OTHER_FORM[ending]:
            if NAME in getattr(wrapped, other):
                getattr(wrapped, other).pop(NAME)
        getattr(wrapped, ending)[NAME] = value


_OTHER_FORM = {
    f"lokr_w{n}{half}": (f"lokr_w{n}",) if half else (f"lokr_w{n}_a", f"lokr_w{n}_b")
    for n in (1, 2)
    for half in ("", "_a", "_b")
}
KINDS: dict[str, Kind] = {"LoRA": LoRA(), "LoCon": LoRA(), "DoRA": LoRA(), "LoHa": LoHa(), "LoKr": LoKr()}


def kind_of(config: TrainConfig) -> Kind:
    """The kind that these settings train."""
    return LoKr(config.factor) if config.network_type == "LoKr" else KINDS[config.network_type]


def kernel_size(layer: nn.Module) -> int:
    """Side of a convolution's kernel; 1 for a linear layer."""
    return int(layer.kernel_size[0]) if isinstance(layer, nn.Conv2d) else 1


def _lycoris(
    config: type[LoHaConfig] | type[LoKrConfig], targets: Sequence[Ranked]
) -> LoHaConfig | LoKrConfig:
    """PEFT's settings of a LyCORIS kind at scale 1; the initial weights are ours."""
    rank, pattern = _ranks(targets)
    return config(
        r=rank,
        alpha=rank,
        target_modules=[target.path for target in targets],
        rank_pattern=pattern,
        init_weights=False,
    )


def _ranks(targets: Sequence[Ranked]) -> tuple[int, dict[str, int]]:
    """The most common rank, and the others by path."""
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    return rank, {target.path: target.rank for target in targets if target.rank != rank}


def _half(wrapped: Any, ending: str) -> Any:
    return (wrapped.lora_A if ending == "lora_down.weight" else wrapped.lora_B)[NAME]


def _flat_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in·kh·kw) of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _factors(layer: nn.Module, factor: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """A layer's (small, large) factors of out and of in, and its kernel (empty for a linear layer)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return _split(weight.shape[0], factor), _split(weight.shape[1], factor), tuple(weight.shape[2:])


def _split(side: int, factor: int) -> tuple[int, int]:
    """LyCORIS' factorization: the small part first.  (PEFT's does not sort where the factor divides.)"""
    first, second = factorization(side, factor)
    return min(first, second), max(first, second)


def _is_whole(layer: nn.Module, rank: int, factor: int) -> bool:
    """Whether LyCORIS keeps w2 whole at this rank."""
    (_, out_large), (_, in_large), _ = _factors(layer, factor)
    return rank >= max(out_large, in_large) / 2


def _product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor: whole, or of two halves."""
    whole = tensors.get(name)
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"] if whole is None else whole


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = √5: ±1 / √fan_in."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
