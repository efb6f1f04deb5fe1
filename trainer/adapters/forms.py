"""The maths of every form of LoRA: a module's tensors from a file → tensors of an adapter, or a plain difference.

What ``kinds`` computes becomes tensors of these kinds; Tucker cores are multiplied into the factors, which changes
nothing else. All other forms become ΔW and Δbias, computed from the file and the base's weight. Owns the formulas;
``attaching`` puts the results into a base.

Sources: LyCORIS lycoris/modules and lycoris/functional (f49d30d); ComfyUI comfy/weight_adapter; sd-scripts
networks/oft.py (48d368f); OneTrainer modules/module/oft_utils.py (23df383); PEFT tuners/ia3, tuners/oft (0.21).

Shapes: W (out, in) or (out, in, kh, kw); r rank; K blocks of N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.choice import KINDS
from trainer.adapters.contents import BOFT, DORA, FULL, GLORA, IA3, LOCON, LOHA, LOKR, LORA, NORM, OFT
from trainer.adapters.magnitude import MAGNITUDE
from trainer.compute import weight_of
from trainer.oom import is_device_lost, is_out_of_memory

_LORA_LIKE = (LORA, LOCON, DORA)
_NEUMANN_TERMS = 5  # PEFT's and OneTrainer's default


# Kind → the parts that its formula reads, beside alpha and scalar.
_DORA = (MAGNITUDE, "magnitude")
_READ = {
    LORA: (
        "lora_down.weight",
        "lora_up.weight",
        "lora_mid.weight",
        "lora_down.bias",
        "lora_up.bias",
        "diff",
        "diff_b",
    ),
    LOHA: (*KINDS[LOHA].endings, "hada_t1", "hada_t2", *_DORA),
    LOKR: (*KINDS[LOKR].endings, "lokr_t2", *_DORA),
    FULL: ("diff", "diff_b", "set_weight"),
    NORM: ("w_norm", "b_norm"),
    IA3: ("ia3", "on_input", "ia3_l"),
    OFT: ("oft_blocks", "rescale", "oft_R.weight", "oft_R.scaled_oft"),
    BOFT: ("oft_blocks", "rescale"),
    GLORA: ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
}
_READ |= {LOCON: _READ[LORA], DORA: (*_READ[LORA], *_DORA)}
READABLE = frozenset(_READ)
# Kinds of files → the kinds of adapters that hold their tensors.
OWN = {FULL: "Full", NORM: "Norm", IA3: "IA3", OFT: "OFT", BOFT: "BOFT", GLORA: "GLoRA"}


class Misfit(Exception):
    """The tensors are incomplete, or do not belong to this layer."""


@dataclass(frozen=True)
class Plain:
    """Tensors that an adapter holds itself: kind in the words of ``KINDS``, endings → tensors."""

    kind: str
    rank: int
    alpha: float
    tensors: dict[str, Tensor]

    def delta(self, layer: Any) -> Change:
        """The same as a difference."""
        kind = KINDS[self.kind]
        if kind.is_own:
            tensors = {ending: tensor.float() for ending, tensor in self.tensors.items()}
            return Change(*kind.difference(tensors, layer, kind.scale(self.rank, self.alpha), None))
        weight = weight_of(layer).float()
        delta = KINDS[self.kind].delta({k: t.float() for k, t in self.tensors.items()})
        delta = (delta * (self.alpha / self.rank)).reshape(weight.shape).to(weight.device)
        if MAGNITUDE in self.tensors:
            delta = decomposed(weight, delta, self.tensors[MAGNITUDE])
        return Change(delta)


@dataclass(frozen=True)
class Change:
    """What is added to a layer's weight and bias, each None if nothing is; fp32."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def with_more(self, other: Change | None) -> Change:
        """Both changes."""
        if other is None:
            return self
        return Change(_sum(self.weight, other.weight), _sum(self.bias, other.bias))


Parts = Mapping[str, Tensor]


def read_form(
    kind: str,
    parts: Parts,
    layer: Any,
    alpha: float | None,
    *,
    one_trainer: bool = False,
    cores: bool = False,
) -> tuple[Plain | None, Change | None]:
    """What a module's tensors do to a layer: as tensors of an adapter, as a difference, or as both.

    ``alpha`` None means the rank.  ``one_trainer``: OneTrainer's OFT turns a convolution's weight the other way round
    than PEFT's.  ``cores``: keep Tucker cores as tensors.
    Raises Misfit, also for a part that the formula of this kind does not know.
    """
    if not parts.keys() <= {*_READ[kind], "alpha", "scalar"}:
        raise Misfit(kind)
    try:
        if kind in _LORA_LIKE:
            return _lora(kind, parts, layer, alpha, cores)
        if kind in (LOHA, LOKR):
            return _factors(kind, parts, layer, alpha, cores)
        if (own := _own(kind, parts, layer, alpha)) is not None:
            return own, None
        weight = weight_of(layer).float()
        parts = {part: tensor.to(weight.device) for part, tensor in parts.items()}
        if kind == OFT and "oft_R.weight" in parts:
            return None, Change(_turned_input(parts, weight, one_trainer and weight.dim() > 2) - weight)
        if kind == IA3:
            return None, _ia3(parts, weight, layer.bias)
        return None, _DENSE[kind](parts, weight, alpha)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise Misfit(str(error)) from error


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's difference: m · (W + ΔW) / ‖W + ΔW‖ − W, the norm per output (out, 1, …) or per input (1, in, …)."""
    merged = weight + delta
    axis = 0 if magnitude.shape[0] == weight.shape[0] and magnitude.shape[0] != 1 else 1
    others = [number for number in range(weight.dim()) if number != axis]
    norm = merged.norm(dim=others, keepdim=True) + torch.finfo(torch.float32).eps
    return merged * (magnitude.float().to(weight.device) / norm) - weight


# LoRA, LoCon, DoRA


def _own(kind: str, parts: Parts, layer: Any, alpha: float | None) -> Plain | None:
    """A module whose tensors an adapter of that kind holds as they are."""
    name = OWN[kind]
    own, constant = KINDS[name], KINDS[name].constant
    tensors = {"weight" if part == "ia3" else part: tensor for part, tensor in parts.items()}
    given = tensors.pop(constant, None) if constant else None
    tensors.pop("alpha", None)
    known = {*own.endings, *own.extras}
    if not set(own.endings) <= tensors.keys() <= known or not own.fits(tensors, layer.weight):
        return None
    rank = own.rank_of(tensors, alpha)
    if constant == "alpha":
        value = (alpha or 0.0) if kind in (OFT, BOFT) else (alpha or float(rank))
    else:
        value = 1.0 if given is None else float(given.flatten()[0])
    return Plain(name, rank, value, tensors)


def _lora(
    kind: str, parts: Parts, layer: Any, alpha: float | None, cores: bool
) -> tuple[Plain, Change | None]:
    shape = tuple(layer.weight.shape)
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    rank = down.shape[0]
    halves = {part: parts[part] for part in (*KINDS[LORA].endings, *KINDS[LORA].extras) if part in parts}
    if cores and parts.keys() - {"alpha"} == halves.keys() and KINDS[LORA].fits(halves, layer.weight):
        return Plain(LORA, rank, alpha or float(rank), halves), None
    if "lora_mid.weight" in parts:
        down = torch.einsum("rs...,si->ri...", parts["lora_mid.weight"].float(), down.flatten(1).float())
    down, up = down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *(1,) * (len(shape) - 2))
    if "scalar" in parts:
        up = up.float() * parts["scalar"].float()
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    if kind == DORA:
        tensors[MAGNITUDE] = magnitude_of(parts, shape)
    scale = (alpha or float(rank)) / rank
    plain = Plain(DORA if kind == DORA else LORA, rank, alpha or float(rank), tensors)
    return plain, _beside_lora(parts, shape, up, scale)


def _beside_lora(parts: Parts, shape: tuple[int, ...], up: Tensor, scale: float) -> Change | None:
    """Biases of the two halves (PEFT's lora_bias), and differences that ComfyUI's extraction writes beside a LoRA."""
    bias: Tensor | None = None
    if "lora_up.bias" in parts:
        bias = parts["lora_up.bias"].float() * scale
    if "lora_down.bias" in parts:
        bias = _sum(bias, up.flatten(1).float() @ parts["lora_down.bias"].float() * scale)
    if "diff_b" in parts:
        bias = _sum(bias, parts["diff_b"].float().flatten())
    weight = parts["diff"].float().reshape(shape) if "diff" in parts else None
    return None if bias is None and weight is None else Change(weight, bias)


def magnitude_of(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """DoRA's magnitudes as (out, 1, …) or (1, in, …).  PEFT's are per output, (out) or (1, out, 1, 1)."""
    ones = (1,) * (len(shape) - 2)
    if "magnitude" in parts:
        return parts["magnitude"].reshape(shape[0], 1, *ones)
    scale = parts[MAGNITUDE]
    if scale.dim() == 1:
        return scale.reshape(shape[0], 1, *ones)
    if tuple(scale.shape) not in ((shape[0], 1, *ones), (1, shape[1], *ones)):
        raise Misfit(MAGNITUDE)
    return scale


# LoHa, LoKr


def _factors(
    kind: str, parts: Parts, layer: Any, alpha: float | None, cores: bool
) -> tuple[Plain | None, Change | None]:
    shape = tuple(layer.weight.shape)
    tensors = {part: parts[part] for part in KINDS[kind].endings if part in parts}
    whole = {part: parts[part] for part in (*KINDS[kind].endings, *KINDS[kind].extras) if part in parts}
    if cores and len(whole) > len(tensors) and parts.keys() - {"alpha"} == whole.keys():
        rank = KINDS[kind].rank_of(whole, alpha)
        if KINDS[kind].fits(whole, layer.weight):
            return Plain(kind, rank, alpha or float(rank), whole), None
    if kind == LOHA:
        for number in (1, 2):
            if core := _get(parts, f"hada_t{number}"):
                first, second = (parts[f"hada_w{number}_{half}"].float() for half in "ab")
                tensors[f"hada_w{number}_a"] = first.T
                tensors[f"hada_w{number}_b"] = torch.einsum(
                    "ij...,jn->in...", core[0].float(), second
                ).flatten(1)
    elif core := _get(parts, "lokr_t2"):
        tensors["lokr_w2_a"] = parts["lokr_w2_a"].float().T
        second = torch.einsum("ij...,jn->in...", core[0].float(), parts["lokr_w2_b"].float())
        tensors["lokr_w2_b"] = second.flatten(1)
    if "scalar" in parts:
        part = next(part for part in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if part in tensors)
        tensors[part] = tensors[part].float() * parts["scalar"].float()
    rank = KINDS[kind].rank_of(tensors, alpha)
    if "lokr_w1" in tensors and "lokr_w2" in tensors:
        alpha = float(rank)  # both factors whole: no scale
    plain = Plain(kind, rank, alpha or float(rank), tensors)
    if not KINDS[kind].fits(tensors, layer.weight):
        raise Misfit(kind)
    if MAGNITUDE in parts or "magnitude" in parts:
        return None, Plain(kind, rank, plain.alpha, tensors | {MAGNITUDE: magnitude_of(parts, shape)}).delta(
            layer
        )
    return plain, None


def _get(parts: Parts, part: str) -> tuple[Tensor] | None:
    return (parts[part],) if part in parts else None


# Forms that are differences


def _full(parts: Parts, weight: Tensor, alpha: float | None) -> Change:
    """LyCORIS full, and ComfyUI's ``set_weight``, which replaces the weight."""
    delta = parts["diff"].float().reshape(weight.shape) if "diff" in parts else None
    if "set_weight" in parts:
        delta = parts["set_weight"].float().reshape(weight.shape) - weight
    bias = parts["diff_b"].float().flatten() if "diff_b" in parts else None
    return Change(delta, bias)


def _norm(parts: Parts, weight: Tensor, alpha: float | None) -> Change:
    """LyCORIS norms: what is added to the weight and bias of a norm."""
    return Change(
        parts["w_norm"].float().reshape(weight.shape) if "w_norm" in parts else None,
        parts["b_norm"].float().reshape(weight.shape) if "b_norm" in parts else None,
    )


def _ia3(parts: Parts, weight: Tensor, bias: Tensor | None) -> Change:
    """IA³: LyCORIS scales inputs or outputs by 1 + w and leaves the bias; PEFT by l, outputs with their bias."""
    ones = (1,) * (weight.dim() - 2)
    if "ia3" in parts:
        on_input = bool(parts["on_input"].flatten()[0])
        factor = parts["ia3"].float()
        shape = (1, weight.shape[1], *ones) if on_input else (weight.shape[0], 1, *ones)
        return Change(weight * factor.reshape(shape))
    factor = parts["ia3_l"].float() - 1
    on_input = (factor.shape[0] == 1 and factor.dim() == 2) or (
        factor.dim() == 4 and factor.shape[1] == weight.shape[1] != weight.shape[0]
    )
    shape = (1, weight.shape[1], *ones) if on_input else (weight.shape[0], 1, *ones)
    scaled = None if on_input or bias is None else bias.detach().float() * factor.flatten()
    return Change(weight * factor.reshape(shape), scaled)


def _glora(parts: Parts, weight: Tensor, alpha: float | None) -> Change:
    """GLoRA: (W · a1 · a2 + b1 · b2) · alpha / r; in files of early LyCORIS the factors have the other order."""
    a1, a2, b1, b2 = (parts[f"{part}.weight"].float() for part in ("a1", "a2", "b1", "b2"))
    rank = b2.shape[0]
    if not b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:
        rank = b1.shape[0]
        mixed = weight.flatten(1) @ a2.flatten(1) @ a1.flatten(1)
        return Change(
            (b2.flatten(1) @ b1.flatten(1) + mixed).reshape(weight.shape) * ((alpha or rank) / rank)
        )
    if "bm.weight" in parts:
        b2 = torch.einsum("rs...,si->ri...", parts["bm.weight"].float(), b2.flatten(1))
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    delta = mixed + (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape)
    return Change(delta * ((alpha or rank) / rank))


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """(…, N, N) orthogonal matrices of OFT's blocks: (I + Q) (I − Q)⁻¹, Q = B − Bᵀ, its norm limited."""
    skew = blocks.float() - blocks.float().transpose(-1, -2)
    norm = skew.norm() + 1e-8
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    eye = torch.eye(skew.shape[-1], device=skew.device)
    return (eye + skew) @ (eye - skew).inverse()


def _oft(parts: Parts, weight: Tensor, alpha: float | None) -> Change:
    """diag-oft of LyCORIS and sd-scripts: blocks of outputs are turned.  Alpha limits the turn, per output channel."""
    turns = _rotations(parts["oft_blocks"], (alpha or 0.0) * weight.shape[0])
    blocks, size = turns.shape[:2]
    turned = torch.einsum("knm,kn...->km...", turns, weight.reshape(blocks, size, *weight.shape[1:]))
    return Change(_rescaled(parts, turned.reshape(weight.shape)) - weight)


def _boft(parts: Parts, weight: Tensor, alpha: float | None) -> Change:
    """BOFT of LyCORIS: the outputs are turned several times, in other groups each time (a butterfly)."""
    turns = _rotations(parts["oft_blocks"], (alpha or 0.0) * weight.shape[0])
    size = turns.shape[-1]
    turned = weight
    for number, turn in enumerate(turns):
        apart = 2**number * (size // 2)
        grouped = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        grouped = torch.einsum("bij,bj...->bi...", turn, grouped)
        turned = grouped.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return Change(_rescaled(parts, turned) - weight)


def _rescaled(parts: Parts, weight: Tensor) -> Tensor:
    if "rescale" not in parts:
        return weight
    return weight * parts["rescale"].float().reshape(-1, *(1,) * (weight.dim() - 1))


def _turned_input(parts: Parts, weight: Tensor, transposed: bool) -> Tensor:
    """OFT of PEFT and OneTrainer: blocks of inputs are turned, by Cayley–Neumann's series of a skew matrix."""
    vectors = parts["oft_R.weight"].float()
    size = round((1 + math.sqrt(1 + 8 * vectors.shape[1])) / 2)
    if "oft_R.scaled_oft" in parts:
        vectors = vectors / (2 * math.sqrt(size - 1))
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(vectors), size, size, device=vectors.device)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    power = torch.eye(size, device=skew.device).expand_as(skew)
    turns = power.clone()
    for term in range(1, _NEUMANN_TERMS):
        power = power @ skew
        turns = turns + power * (1 if term == _NEUMANN_TERMS - 1 else 2)
    flat = weight.flatten(1)
    blocks = flat.unflatten(1, (-1, size))
    turns = turns.expand(blocks.shape[1], -1, -1)  # one block may be shared by all
    order = "obk,bkc->obc" if transposed else "obc,bkc->obk"
    return torch.einsum(order, blocks, turns).reshape(weight.shape)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


_DENSE: dict[str, Callable[[Parts, Tensor, float | None], Change]] = {
    FULL: _full,
    NORM: _norm,
    GLORA: _glora,
    OFT: _oft,
    BOFT: _boft,
}
