"""Kinds of adapters: LoRA, LoHa and LoKr – the tensors of each, their start, and PEFT's layer for the last two.

Owns what differs between kinds; ``adapter`` owns what they share, ``morekinds`` the kinds that PEFT does not have.
``lowrank`` computes the forward pass of LoRA, PEFT that of LoHa and LoKr, ``changed`` that of Tucker forms and of
use_scalar; LoCon is LoRA on convolutions too, and DoRA is LoRA plus a magnitude (``adapter``).  Names of tensors and
their start are LyCORIS' (KohakuBlueleaf/LyCORIS, lycoris/modules), which ComfyUI and A1111 read.

Shapes: out in of a linear layer; a convolution has in·kh·kw where "in" is flattened; r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from trainer.adapters.changed import Chance
from trainer.oom import is_device_lost, is_out_of_memory

SCALAR = "scalar"  # use_scalar: a factor of ΔW that starts at 0
NAME = "lora"  # the adapter's name inside each layer, as PEFT has it


class Ranked(Protocol):
    """The fields of a target that a kind needs."""

    @property
    def path(self) -> str: ...
    @property
    def rank(self) -> int: ...


class Kind(ABC):
    """One family of formulas for ΔW.

    ``endings`` are the endings of its tensors in a file, ``extras`` those that only some modules have.  ``constant``:
    the ending of the number that a file holds beside them, or "".  ``limit``: what scale_weight_norms shrinks –
    "product" (ΔW is a product of all tensors), "blocks" (the tensor itself) or "" (nothing, as in LyCORIS).
    ``plus``: how the endings begin that LoRA+ trains at another rate.  ``drops_rows``: whether rank_dropout drops rows
    of ΔW in a ``ChangedLayer``.  ``carriers``: the tensors that take up use_scalar's scalar in a file.  ``frozen``:
    tensors that are not trained.
    """

    endings: ClassVar[tuple[str, ...]]
    extras: ClassVar[tuple[str, ...]] = ()
    constant: ClassVar[str] = "alpha"
    limit: ClassVar[str] = "product"
    is_own: ClassVar[bool] = False
    plus: ClassVar[str] = ""
    drops_rows: ClassVar[bool] = True
    carriers: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """ending → shape of its tensors for a layer."""

    @abstractmethod
    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """ending → first value.  ΔW is 0, and every tensor but the zeros gets a gradient soon."""

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        """PEFT's settings for the targets of one network.  Scales are set by the adapter."""
        raise NotImplementedError

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """ΔW (out, in), before alpha / rank."""
        raise NotImplementedError

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        """ΔW in the shape of the layer's weight, and Δb, at this scale (alpha / rank, or ``scale``)."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        delta = self.delta(tensors) * scale
        if SCALAR in tensors:
            delta = delta * tensors[SCALAR]
        return delta.reshape(weight.shape), None

    def scale(self, rank: int, alpha: float) -> float:
        """The number that ``difference`` is computed with, from what a file holds."""
        return alpha / rank

    def is_plus(self, ending: str) -> bool:
        """Whether LoRA+ trains this tensor at another rate."""
        return bool(self.plus) and ending.startswith(self.plus)

    def is_changed(self, endings: Collection[str]) -> bool:
        """Whether a module with these tensors needs a ``ChangedLayer``."""
        return self.is_own or SCALAR in endings or any(ending in endings for ending in self.extras)

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as a file has them: a scalar is part of the carriers."""
        if SCALAR not in tensors:
            return dict(tensors)
        return {
            ending: tensor * tensors[SCALAR] if ending in self.carriers else tensor
            for ending, tensor in tensors.items()
            if ending != SCALAR
        }

    def unfolded(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse, for the tensors that training needs: the scalar is 1, as in LyCORIS."""
        return {**tensors, SCALAR: torch.ones(())} if SCALAR in wanted else dict(tensors)

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
    extras = ("lora_mid.weight",)
    plus = "lora_up"
    carriers = ("lora_up.weight",)

    def __init__(self, use_tucker: bool = False, use_scalar: bool = False) -> None:
        """Options of a fresh adapter, as in LyCORIS."""
        self.use_tucker, self.use_scalar = use_tucker, use_scalar

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        scalar: dict[str, tuple[int, ...]] = {SCALAR: ()} if self.use_scalar else {}
        if self.use_tucker and isinstance(layer, nn.Conv2d) and kernel_size(layer) > 1:
            return {
                "lora_down.weight": (rank, layer.in_channels, 1, 1),
                "lora_mid.weight": (rank, rank, *layer.kernel_size),
                "lora_up.weight": (layer.out_channels, rank, 1, 1),
            } | scalar
        if isinstance(layer, nn.Conv2d):
            down: tuple[int, ...] = (rank, layer.in_channels, *layer.kernel_size)
            up: tuple[int, ...] = (layer.out_channels, rank, 1, 1)
        else:
            assert isinstance(layer, nn.Linear)
            down, up = (rank, layer.in_features), (layer.out_features, rank)
        return {"lora_down.weight": down, "lora_up.weight": up} | scalar

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down kaiming-uniform (a = √5), up zero: sd-scripts networks/lora.py.  With a scalar only that is zero."""
        zero = (SCALAR,) if self.use_scalar else ("lora_up.weight",)
        return _start(self.shapes(layer, rank), zero, generator)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        down, up = tensors["lora_down.weight"].flatten(1), tensors["lora_up.weight"].flatten(1)
        if "lora_mid.weight" in tensors:
            return tucker(tensors["lora_mid.weight"], up.T, down).flatten(1)
        return up @ down

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["lora_down.weight"].shape[0]

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        if not tensors.keys() >= set(self.endings):
            return False
        down, up = (tensors[ending] for ending in self.endings)
        ones = (1,) * (weight.dim() - 2)
        if "lora_mid.weight" in tensors:
            rank = down.shape[0]
            return (
                tuple(tensors["lora_mid.weight"].shape) == (rank, rank, *weight.shape[2:])
                and tuple(down.shape) == (rank, weight.shape[1], *ones)
                and tuple(up.shape) == (weight.shape[0], rank, *ones)
            )
        return (
            down.dim() == weight.dim()
            and down.shape[1:] == weight.shape[1:]
            and up.shape == (weight.shape[0], down.shape[0], *ones)
        )


class LoHa(Kind):
    """ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b) (FedPara, arXiv 2108.06098)."""

    endings = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    extras = ("hada_t1", "hada_t2")
    carriers = ("hada_w1_a",)

    def __init__(self, use_tucker: bool = False, use_scalar: bool = False) -> None:
        """Options of a fresh adapter, as in LyCORIS."""
        self.use_tucker, self.use_scalar = use_tucker, use_scalar

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        scalar: dict[str, tuple[int, ...]] = {SCALAR: ()} if self.use_scalar else {}
        out, inner = _flat_shape(layer)
        found: dict[str, tuple[int, ...]] = {
            ending: (out, rank) if ending.endswith("a") else (rank, inner) for ending in self.endings
        }
        if self.use_tucker and isinstance(layer, nn.Conv2d) and kernel_size(layer) > 1:
            core = (rank, rank, *layer.kernel_size)
            sides = (out, layer.in_channels)
            found = {ending: (rank, sides[ending.endswith("b")]) for ending in self.endings}
            found |= {"hada_t1": core, "hada_t2": core}
        return found | scalar

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal with deviation 0.1 (w1_a and cores) and 1 (w1_b, w2_b), w2_a zero: LyCORIS loha.py.  With a scalar
        only that is zero, and w2_a is as w1_a."""
        found = {}
        for ending, shape in self.shapes(layer, rank).items():
            is_zero = ending == (SCALAR if self.use_scalar else "hada_w2_a")
            deviation = 1.0 if ending.endswith("_b") else 0.1
            found[ending] = (
                torch.zeros(shape) if is_zero else torch.randn(shape, generator=generator) * deviation
            )
        return found

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        return _lycoris(LoHaConfig, targets)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (tensors[ending] for ending in self.endings)
        if "hada_t1" in tensors:
            first, second = tucker(tensors["hada_t1"], w1_a, w1_b), tucker(tensors["hada_t2"], w2_a, w2_b)
            return (first * second).flatten(1)
        return (w1_a @ w1_b) * (w2_a @ w2_b)

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["hada_w1_b"].shape[0]

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        if not tensors.keys() >= set(self.endings):
            return False
        rank = tensors["hada_w1_b"].shape[0]
        if "hada_t1" in tensors or "hada_t2" in tensors:
            core = (rank, rank, *weight.shape[2:])
            return all(
                tuple(tensors[ending].shape) == core for ending in self.extras if ending in tensors
            ) and all(
                tuple(tensors[ending].shape) == (rank, weight.shape[ending.endswith("b")])
                for ending in self.endings
            )
        outer, inner = (weight.shape[0], rank), (rank, weight[0].numel())
        return all(
            tensors[ending].shape == (outer if ending.endswith("a") else inner) for ending in self.endings
        )


class LoKr(Kind):
    """ΔW = w1 ⊗ w2, w1 small and whole, w2 = w2_a · w2_b – or whole where the rank is no saving
    (arXiv 2212.10650, LyCORIS arXiv 2309.14859)."""

    endings = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    extras = ("lokr_t2",)
    carriers = ("lokr_w1", "lokr_w1_a")

    def __init__(
        self,
        factor: int = -1,
        *,
        full_matrix: bool = False,
        decompose_both: bool = False,
        unbalanced: bool = False,
        use_tucker: bool = False,
        use_scalar: bool = False,
    ) -> None:
        """Options of a fresh adapter, as in LyCORIS."""
        self.factor, self.full_matrix, self.decompose_both = factor, full_matrix, decompose_both
        self.unbalanced, self.use_tucker, self.use_scalar = unbalanced, use_tucker, use_scalar

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        (out_1, out_2), (in_1, in_2), kernel = self._factors(layer)
        if self._keeps_first(layer, rank):
            found: dict[str, tuple[int, ...]] = {"lokr_w1": (out_1, in_1)}
        else:
            found = {"lokr_w1_a": (out_1, rank), "lokr_w1_b": (rank, in_1)}
        if self._keeps_second(layer, rank):
            found |= {"lokr_w2": (out_2, in_2, *kernel)}
        elif self.use_tucker and math.prod(kernel) > 1:
            found |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, out_2), "lokr_w2_b": (rank, in_2)}
        else:
            found |= {"lokr_w2_a": (out_2, rank), "lokr_w2_b": (rank, in_2 * math.prod(kernel))}
        return found | ({SCALAR: ()} if self.use_scalar else {})

    def _factors(self, layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
        """A layer's factors of out and of in, and its kernel (empty for a linear layer)."""
        out, inner, kernel = _factors(layer, self.factor)
        return (out[::-1] if self.unbalanced else out), inner, kernel

    def _keeps_first(self, layer: nn.Module, rank: int) -> bool:
        (out_1, _), (in_1, _), _ = self._factors(layer)
        return not self.decompose_both or self.full_matrix or rank >= max(out_1, in_1) / 2

    def _keeps_second(self, layer: nn.Module, rank: int) -> bool:
        """Whether LyCORIS keeps w2 whole at this rank."""
        (_, out_2), (_, in_2), _ = self._factors(layer)
        return self.full_matrix or rank >= max(out_2, in_2) / 2

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Kaiming-uniform (a = √5), but w2_b or w2 zero: LyCORIS lokr.py.  With a scalar only that is zero."""
        zero = (SCALAR,) if self.use_scalar else ("lokr_w2", "lokr_w2_b")
        return _start(self.shapes(layer, rank), zero, generator)

    def settings(self, targets: Sequence[Ranked]) -> PeftConfig:
        return _lycoris(LoKrConfig, targets)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        w1 = _product(tensors, "lokr_w1")
        if "lokr_t2" in tensors:
            w2 = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
        else:
            w2 = _product(tensors, "lokr_w2")
        return torch.kron(w1, w2.flatten(1))

    def alpha(self, layer: nn.Module, rank: int, alpha: float) -> float:
        """Alpha, or the rank (scale 1) where both factors are whole: readers take no scale there."""
        is_whole = self._keeps_first(layer, rank) and self._keeps_second(layer, rank)
        return float(rank) if is_whole else alpha

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        """The rank of what is decomposed; both factors whole: alpha itself, so that the scale is 1."""
        for ending in ("lokr_w2_b", "lokr_w1_b"):
            if ending in tensors:
                return tensors[ending].shape[0]
        return 1 if alpha is None else max(1, round(alpha))

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        try:
            w1 = _product(tensors, "lokr_w1")
            if "lokr_t2" in tensors:
                w2 = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]).flatten(1)
            else:
                w2 = _product(tensors, "lokr_w2").flatten(1)
        except (KeyError, RuntimeError, IndexError) as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise
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


def _flat_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in·kh·kw) of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _factors(layer: nn.Module, factor: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """A layer's (small, large) factors of out and of in, and its kernel (empty for a linear layer)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return split_side(weight.shape[0], factor), split_side(weight.shape[1], factor), tuple(weight.shape[2:])


def split_side(side: int, factor: int) -> tuple[int, int]:
    """LyCORIS' factorization: the small part first.  (PEFT's does not sort where the factor divides.)"""
    first, second = factorization(side, factor)
    return min(first, second), max(first, second)


def _product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor: whole, or of two halves."""
    whole = tensors.get(name)
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"] if whole is None else whole


def _start(
    shapes: Mapping[str, tuple[int, ...]], zero: Collection[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Zeros for some tensors, kaiming-uniform for the others."""
    return {
        ending: torch.zeros(shape) if ending in zero else uniform(shape, generator)
        for ending, shape in shapes.items()
    }


def tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """A kernel (out, in, …) of a core (r, r, …), (r, out), (r, in): LyCORIS functional/general.py, rebuild_tucker."""
    return torch.einsum("ij...,ip,jr->pr...", core, outer, inner)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = √5: ±1 / √fan_in."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
