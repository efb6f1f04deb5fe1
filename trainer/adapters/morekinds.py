"""Kinds of adapters that PEFT has no layer for: full differences, norms, IA³, OFT, GLoRA and DyLoRA.

Formulas, starts and names of tensors are those of LyCORIS (f49d30d, lycoris/modules) and of sd-scripts (48d368f,
networks/dylora.py, networks/oft.py). They are a few lines each; LyCORIS' own modules draw dropout from the global
generator (so no run could be resumed exactly) and read a layer's weight as it is stored (so no base could be in 8
bits).

Shapes: out in of a linear layer; a convolution has in·kh·kw where "in" is flattened; r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.adapters.changed import Chance
from trainer.adapters.kinds import SCALAR, Kind, LoRA, split_side, uniform
from trainer.compute import weight_of
from trainer.errors import ConfigError


class Own(Kind):
    """A kind whose layer is always a ChangedLayer."""

    is_own = True

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return 1

    def scale(self, rank: int, alpha: float) -> float:
        """The constant itself."""
        return alpha

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {ending: torch.zeros(shape) for ending, shape in self.shapes(layer, rank).items()}


class Full(Own):
    """ΔW and Δb themselves (LyCORIS full.py)."""

    endings = ("diff",)
    extras = ("diff_b",)
    constant = ""
    limit = ""

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"diff": tuple(_weight(layer).shape)}
        bias = layer.bias
        return found | {"diff_b": tuple(bias.shape)} if isinstance(bias, Tensor) else found

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        return tensors["diff"], tensors.get("diff_b")

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        bias = tensors.get("diff_b")
        return tensors["diff"].shape == weight.shape and (bias is None or bias.shape == weight.shape[:1])


class Norm(Own):
    """Changes of a norm's weight and bias (LyCORIS norms.py)."""

    endings = ("w_norm",)
    extras = ("b_norm",)
    constant = ""
    limit = ""

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        found = {"w_norm": tuple(_weight(layer).shape)}
        return found if layer.bias is None else found | {"b_norm": tuple(_weight(layer).shape)}

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        return tensors["w_norm"], tensors.get("b_norm")

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        return weight.dim() == 1 and all(tensor.shape == weight.shape for tensor in tensors.values())


class IA3(Own):
    """ΔW = W with each output, or each input, scaled (arXiv 2205.05638, LyCORIS ia3.py). The constant ``on_input`` is 1
    where inputs are scaled."""

    endings = ("weight",)
    constant = "on_input"
    limit = ""
    drops_rows = False

    def __init__(self, on_input: bool = False) -> None:
        self.on_input = on_input

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        weight = _weight(layer)
        side = weight.shape[1 if self.on_input else 0]
        return {"weight": (1, side, 1, 1) if weight.dim() == 4 else (side,)}

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        weight = weight_of(layer).float()
        factor = tensors["weight"].flatten()
        if scale:  # on_input
            return weight * factor.reshape(1, -1, *[1] * (weight.dim() - 2)), None
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), None

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        return tensors["weight"].numel() in tuple(weight.shape[:2])


class OFT(Own):
    """W' = R · W with R orthogonal in blocks, from Cayley's formula (arXiv 2306.07280, LyCORIS diag_oft.py). The
    constant alpha is the constraint. ``dim_is_blocks``: the rank is the number of blocks, as in sd-scripts'
    networks/oft.py; else LyCORIS' choice."""

    endings = ("oft_blocks",)
    extras = ("rescale",)
    limit = "blocks"
    drops_rows = False

    def __init__(self, rescaled: bool = False, dim_is_blocks: bool = False) -> None:
        self.rescaled = rescaled
        self.dim_is_blocks = dim_is_blocks

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        weight = _weight(layer)
        out = weight.shape[0]
        if self.dim_is_blocks and out % rank:
            raise ConfigError(
                f"OFT with network_dim = {rank} parts the outputs of a layer into {rank} blocks, but one has {out}",
                "use a network_dim that divides the outputs of all layers: 2, 4 or 8",
            )
        size, count = (out // rank, rank) if self.dim_is_blocks else split_side(out, rank)
        found: dict[str, tuple[int, ...]] = {"oft_blocks": (count, size, size)}
        return found | ({"rescale": (out, *[1] * (weight.dim() - 1))} if self.rescaled else {})

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = super().start(layer, rank, generator)
        return {ending: tensor + 1 if ending == "rescale" else tensor for ending, tensor in found.items()}

    def rotation(self, blocks: Tensor, constraint: float, out: int) -> Tensor:
        """R (blocks, size, size): (I + Q)(I − Q)⁻¹ of the antisymmetric Q, which is shortened to constraint · out."""
        skew = blocks - blocks.transpose(-1, -2)
        if constraint > 0:
            norm = skew.norm() + 1e-8
            skew = skew * (constraint * out / norm).clamp(max=1.0)
        one = torch.eye(blocks.shape[-1], device=blocks.device)
        # I − Q always has an inverse, and ``inv`` would wait for the GPU to look whether it has
        return (one + skew) @ torch.linalg.inv_ex(one - skew).inverse

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        weight = weight_of(layer).float()
        blocks = tensors["oft_blocks"]
        rotation = self.rotation(blocks, scale, weight.shape[0])
        if chance is not None and (kept := chance.entries(rotation)) is not None:
            rotation = rotation * kept
        parted = weight.reshape(blocks.shape[0], blocks.shape[1], -1)
        turned = (rotation.transpose(1, 2) @ parted).reshape(weight.shape)
        if "rescale" in tensors:
            turned = turned * tensors["rescale"]
        return turned - weight, None

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        return (
            blocks.dim() == 3
            and blocks.shape[1] == blocks.shape[2]
            and blocks.shape[0] * blocks.shape[1] == weight.shape[0]
            and (rescale is None or rescale.numel() == weight.shape[0])
        )

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["oft_blocks"].shape[0 if self.dim_is_blocks else 1]


class BOFT(OFT):
    """W' = R₁ · … · R_m · W, each R orthogonal in blocks of shuffled rows (arXiv 2311.06243, LyCORIS boft.py)."""

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        weight = _weight(layer)
        size, count = butterfly(weight.shape[0], rank)
        steps = (count - 1).bit_count() + 1
        found: dict[str, tuple[int, ...]] = {"oft_blocks": (steps, count, size, size)}
        rescale = {"rescale": (weight.shape[0], *[1] * (weight.dim() - 1))}
        return found | (rescale if self.rescaled else {})

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        weight = weight_of(layer).float()
        blocks = tensors["oft_blocks"]
        rotations = self.rotation(blocks, scale, weight.shape[0])
        size = blocks.shape[-1]
        turned = weight.flatten(1)
        for step, rotation in enumerate(rotations):
            stride = 2**step * (size // 2)
            shuffled = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            moved = (rotation @ shuffled.unflatten(0, (-1, size))).flatten(0, 1)
            turned = moved.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
        turned = turned.reshape(weight.shape)
        if "rescale" in tensors:
            turned = turned * tensors["rescale"]
        return turned - weight, None

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        blocks = tensors["oft_blocks"]
        return (
            blocks.dim() == 4
            and blocks.shape[2] == blocks.shape[3]
            and blocks.shape[1] * blocks.shape[2] == weight.shape[0]
        )

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["oft_blocks"].shape[2]


def butterfly(side: int, factor: int) -> tuple[int, int]:
    """A side as block size (even, at most ``factor``) × a power of two (LyCORIS functional/general.py,
    power2factorization). Raises ConfigError if there is no such pair."""
    size = 0
    for even in range(2, factor + 1, 2):
        if side % even == 0 and (side // even).bit_count() == 1:
            size = even
    if not size:
        raise ConfigError(
            f"BOFT cannot divide {side} outputs into blocks of an even size up to {factor}, a power of two of them",
            "use network_dim = 10 or more",
        )
    return size, side // size


class GLoRA(Own):
    """ΔW = W · a1 · a2 + b1 · b2 (arXiv 2306.07967, LyCORIS glora.py)."""

    endings = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    limit = ""
    drops_rows = False
    carriers = ("a2.weight", "b2.weight")

    def __init__(self, use_scalar: bool = False) -> None:
        self.use_scalar = use_scalar

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        weight = _weight(layer)
        out, inner = weight.shape[:2]
        ones = [1] * (weight.dim() - 2)
        found: dict[str, tuple[int, ...]] = {
            "a1.weight": (inner, rank, *ones),
            "a2.weight": (rank, inner, *ones),
            "b1.weight": (out, rank, *ones),
            "b2.weight": (rank, inner, *weight.shape[2:]),
        }
        return found | ({SCALAR: ()} if self.use_scalar else {})

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """a1 and b1 kaiming-uniform (a = √5), a2 and b2 zero; with a scalar only that is zero."""
        zero = (SCALAR,) if self.use_scalar else self.carriers
        return {
            ending: torch.zeros(shape) if ending in zero else uniform(shape, generator)
            for ending, shape in self.shapes(layer, rank).items()
        }

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        weight = weight_of(layer).float()
        a1, a2, b1, b2 = (tensors[ending].flatten(1) for ending in self.endings)
        mixed = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
        return (mixed + (b1 @ b2).reshape(weight.shape)) * scale * tensors.get(SCALAR, 1.0), None

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        if not tensors.keys() >= set(self.endings):
            return False
        a1, a2, b1, b2 = (tensors[ending] for ending in self.endings)
        return (
            a1.shape[0] == a2.shape[1] == weight.shape[1]
            and b1.shape[0] == weight.shape[0]
            and b2[0].numel() == weight[0].numel()
            and a1.shape[1] == a2.shape[0]
            and b1.shape[1] == b2.shape[0]
        )

    def rank_of(self, tensors: Mapping[str, Tensor], alpha: float | None) -> int:
        return tensors["a2.weight"].shape[0]

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank


class LoRAFA(LoRA):
    """LoRA whose first half stays as it was drawn (arXiv 2308.03303, sd-scripts networks/lora_fa.py, which has no
    LoRA+). The file is a LoRA."""

    plus = ""
    frozen = ("lora_down.weight",)

    def __init__(self) -> None:
        super().__init__()

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down normal with variance 2 / (in + r), up zero; "in" without the kernel, as there."""
        found = super().start(layer, rank, generator)
        shape = found["lora_down.weight"].shape
        deviation = math.sqrt(2.0 / (shape[1] + rank))
        return found | {"lora_down.weight": torch.randn(shape, generator=generator) * deviation}


class DyLoRA(Own):
    """LoRA whose ranks are trained ``unit`` at a time: in a step the ranks before the chosen ones are constant, and
    those after them are not used (arXiv 2210.07558, sd-scripts networks/dylora.py). The file is a LoRA."""

    endings: ClassVar[tuple[str, ...]] = ()
    plus = "lora_up"
    drops_rows = False
    limit = ""

    def __init__(self, unit: int = 1) -> None:
        self.unit = unit

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        down, up = LoRA().shapes(layer, rank).values()
        found: dict[str, tuple[int, ...]] = {}
        for number in range(rank // self.unit):
            found[f"lora_down.{number:04}"] = (self.unit, *down[1:])
            found[f"lora_up.{number:04}"] = (up[0], self.unit, *up[2:])
        return found

    def start(self, layer: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down kaiming-uniform (a = √5) for each unit, up zero."""
        return {
            ending: torch.zeros(shape) if ending.startswith("lora_up") else uniform(shape, generator)
            for ending, shape in self.shapes(layer, rank).items()
        }

    def difference(
        self, tensors: Mapping[str, Tensor], layer: nn.Module, scale: float, chance: Chance | None
    ) -> tuple[Tensor, Tensor | None]:
        downs = [tensor for ending, tensor in tensors.items() if ending.startswith("lora_down")]
        ups = [tensor for ending, tensor in tensors.items() if ending.startswith("lora_up")]
        chosen = None if chance is None else chance.block(len(downs))
        if chosen is not None:
            downs = [*(tensor.detach() for tensor in downs[:chosen]), downs[chosen]]
            ups = [*(tensor.detach() for tensor in ups[:chosen]), ups[chosen]]
            scale = scale * math.sqrt(len(tensors) // 2 / (chosen + 1))
        down, up = torch.cat(downs).flatten(1), torch.cat(ups, dim=1).flatten(1)
        return (up @ down * scale).reshape(_weight(layer).shape), None

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / rank

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        downs = [tensor for ending, tensor in sorted(tensors.items()) if ending.startswith("lora_down")]
        ups = [tensor for ending, tensor in sorted(tensors.items()) if ending.startswith("lora_up")]
        return {"lora_down.weight": torch.cat(downs), "lora_up.weight": torch.cat(ups, dim=1)}

    def unfolded(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        count = len(wanted) // 2
        found: dict[str, Tensor] = {}
        parts = zip(down.chunk(count), up.chunk(count, dim=1), strict=True)
        for number, (one, other) in enumerate(parts):
            found |= {f"lora_down.{number:04}": one, f"lora_up.{number:04}": other}
        return found

    def fits(self, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
        return False  # its files are LoRA


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
