"""LowRankLayer: a frozen linear layer or convolution plus LoRA's two halves, y = W x + b + s · up(down(x)).

Owns the forward and backward pass of LoRA, LoCon, DoRA's product and LoRA-FA, which train most. What differs from
PEFT's layer, which computes the same (tests/parity): the weights are cast to the type that is computed in, not the
activations to fp32, and all weights of an adapter by one call (``computing``); the product is added by the matrix
multiplication itself; the gradient of the input is one tensor, not a sum of two. Does not own which values are
dropped (``dropout``) or a change of the weight itself (``changed``).

Shapes: N rows (all leading dimensions of x), I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.adapters.around import AroundLayer

Pair = list[Tensor]  # both halves in the compute type; empty once they are not needed any more


class Drop(Protocol):
    """What is dropped in a training step of one layer."""

    def ranks(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor | None, float]:
        """0 and 1 for the values that leave ``down``, and the share that is kept; (None, 1) where none is dropped."""

    def rows(self) -> Tensor | None:
        """0 and 1 for each row of ΔW (O); None where none is dropped."""

    @property
    def changes_rows(self) -> bool:
        """Whether ``rows`` can drop any."""


_drops: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def _handle_of(drop: Drop) -> int:
    """A number by which a compiled graph finds what a layer drops."""
    number = next(_numbers)
    _drops[number] = drop
    return number


@torch.library.custom_op("hpo::kept", mutates_args=())
def _kept(inner: Tensor, handle: Tensor) -> Tensor:
    """The mask of a layer's dropout, 0 and 1 / kept, in the shape and type of ``inner``. It is drawn outside of the
    graph: a generator inside, with a seed that changes in every step, would be compiled anew in every step."""
    mask, kept = _drops[int(handle)].ranks(list(inner.shape), inner)
    return torch.ones_like(inner) if mask is None else mask.to(inner.dtype) / kept


@_kept.register_fake
def _kept_shape(inner: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(inner)


class LowRankLayer(AroundLayer):
    """A layer of a base and the halves of its LoRA: ``lora_down`` (R, I) or (R, I, kh, kw), ``lora_up`` (O, R) or
    (O, R, 1, 1). ``scaling`` holds alpha / rank under the adapter's name."""

    def __init__(
        self, base_layer: nn.Module, down: nn.Parameter, up: nn.Parameter, name: str, scale: float
    ) -> None:
        super().__init__(base_layer, name, scale)
        self.lora_down = down
        self.lora_up = up
        self.drop: Drop | None = None
        self._cast: Pair = []
        self.comes_and_goes = False  # module_dropout leaves it out of some steps
        self.compiled: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._disable_adapters:
            result: Tensor = self.base_layer(x, *args, **options)
            return result
        if self.compiled is not None and torch.compiler.is_compiling():
            return self._in_a_graph(x, *self.compiled)
        x = x.to(kind_of(x))
        up: Tensor = self.lora_up
        pair = self._cast if self._cast and self._cast[0].dtype == x.dtype else []
        if self.drop is not None and (rows := self.drop.rows()) is not None:
            up, pair = up * rows.to(up.dtype).reshape(-1, *[1] * (up.dim() - 1)), []
        if isinstance(self.base_layer, nn.Conv2d):
            return self._convolved(x, *_halves(self.lora_down, up, pair, x.dtype))
        mask, scale = self._drawn([*x.shape[:-1], self.lora_down.shape[0]], x)
        flat_NI = x.reshape(-1, x.shape[-1])
        flat_mask = None if mask is None else mask.reshape(-1, mask.shape[-1])
        if is_plain(self.base_layer) and x.is_contiguous():
            given = (self.weight, self.bias, self.lora_down, up)
            y_NO = _Linear.apply(flat_NI, *given, pair, flat_mask, scale)
        else:  # in 8 bits, or a permuted input, for which torch computes W x + b in another way
            down, up = _halves(self.lora_down, up, pair, x.dtype)
            inner_NR = flat_NI.mm(down.t())
            inner_NR = inner_NR if flat_mask is None else inner_NR * flat_mask
            if x.is_contiguous():
                y_NO = self.base_layer(flat_NI).addmm_(inner_NR, up.t(), alpha=scale)
            else:
                base_NO = self.base_layer(x).reshape(-1, up.shape[0])
                y_NO = torch.addmm(base_NO, inner_NR, up.t(), alpha=scale)
        return y_NO.view(*x.shape[:-1], up.shape[0])

    # Inside torch.compile (``trainer.compute.speed``)

    def to_be_compiled(self, wanted: bool) -> bool:
        """Prepare for graphs that hold for every rank, alpha, dropout and step: all of these are inputs of the graph.
        False where they cannot be; then the layer must stay outside of it."""
        self.compiled = None
        drop = self.drop
        if not wanted or type(self.base_layer) is not nn.Linear or self.comes_and_goes:
            return False
        if self._forward_pre_hooks or self._forward_hooks or (drop is not None and drop.changes_rows):
            return False
        for half, axis in ((self.lora_down, 0), (self.lora_up, 1)):
            torch._dynamo.maybe_mark_dynamic(half, axis)
        scale = torch.full((), self.scaling[self._name], device=self.lora_down.device)
        self.compiled = scale, None if drop is None else torch.tensor(_handle_of(drop))
        return True

    def _in_a_graph(self, x: Tensor, scale: Tensor, handle: Tensor | None) -> Tensor:
        """The same formula in plain operations, for which the compiler finds its own backward pass."""
        x = x.to(kind_of(x))
        inner = F.linear(x, self.lora_down.to(x.dtype))
        if handle is not None:
            inner = inner * torch.ops.hpo.kept(inner.detach(), handle)
        added = F.linear(inner * scale.to(x.dtype), self.lora_up.to(x.dtype))
        result: Tensor = self.base_layer(x) + added
        return result

    def _drawn(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor | None, float]:
        """The mask of what leaves ``down``, in its shape, and the scale of the product with it."""
        mask, kept = (None, 1.0) if self.drop is None else self.drop.ranks(shape, like)
        return mask, self.scaling[self._name] / kept

    def _convolved(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        layer: Any = self.base_layer
        result: Tensor = layer(x)
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        mask, scale = self._drawn(inner.shape, inner)
        if mask is not None:
            inner = inner * mask
        return result.add_(F.conv2d(inner, up), alpha=scale)


def kind_of(x: Tensor) -> torch.dtype:
    """The type that a layer computes in: autocast's where it is on, else the input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_plain(layer: nn.Module) -> bool:
    """Whether a frozen layer is x Wᵀ + b with a W that is stored as it is used."""
    return type(layer) is nn.Linear


def _halves(down: Tensor, up: Tensor, pair: Pair, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both halves in the compute type, where autograd does the rest."""
    if pair:
        return _Given.apply(down, pair, 0), _Given.apply(up, pair, 1)
    return down.to(kind), up.to(kind)


class _Given(torch.autograd.Function):
    """A cast that is made already; its gradient goes to the weight itself. Backward drops both casts of the layer, as
    ``_Linear``'s does: what still needs one has saved it."""

    @staticmethod
    def forward(ctx: Any, half: Tensor, pair: Pair, number: int) -> Tensor:
        ctx.kind, ctx.pair = half.dtype, pair
        return pair[number].detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.pair.clear()
        return gradients[0].to(ctx.kind), None, None


class _Linear(torch.autograd.Function):
    """W x + b + s · up(m ⊙ down(x)) of a frozen W, b: three matrix products forward, five backward. Gradients of the
    halves have their own type (fp32), whatever is computed in."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        pair: Pair,
        mask_NR: Tensor | None,
        scale: float,
    ) -> Tensor:
        kind = x_NI.dtype
        down, up = pair or (down_RI.to(kind), up_OR.to(kind))
        y_NO = F.linear(x_NI, weight_OI.to(kind), None if bias_O is None else bias_O.to(kind))
        inner_NR = x_NI.mm(down.t())
        if mask_NR is not None:
            inner_NR.mul_(mask_NR)
        y_NO.addmm_(inner_NR, up.t(), alpha=scale)
        needs_x, needs_down, needs_up = (ctx.needs_input_grad[n] for n in (0, 3, 4))
        ctx.scale, ctx.pair, ctx.kinds = scale, pair, (down_RI.dtype, up_OR.dtype)
        ctx.save_for_backward(
            x_NI if needs_down else None,
            weight_OI if needs_x else None,
            down if needs_x else None,
            up if needs_x or needs_down else None,
            inner_NR if needs_up else None,
            mask_NR,
        )
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, down_RI, up_OR, inner_NR, mask_NR = ctx.saved_tensors
        ctx.pair.clear()
        grad_NO = gradients[0]
        grad_x = grad_down = grad_up = None
        if inner_NR is not None:
            grad_up = _product(grad_NO.t(), inner_NR, ctx.scale, ctx.kinds[1])
        if up_OR is not None:
            inner_grad_NR = _product(grad_NO, up_OR, ctx.scale, grad_NO.dtype)
            if mask_NR is not None:
                inner_grad_NR.mul_(mask_NR)
            if x_NI is not None:
                grad_down = _product(inner_grad_NR.t(), x_NI, 1.0, ctx.kinds[0])
            if weight_OI is not None:
                grad_x = grad_NO.mm(weight_OI.to(grad_NO.dtype)).addmm_(inner_grad_NR, down_RI)
        return grad_x, None, None, grad_down, grad_up, None, None, None


def _product(a: Tensor, b: Tensor, scale: float, kind: torch.dtype) -> Tensor:
    """scale · a b as ``kind``, by one kernel where the device has it; with beta = 0 the first argument is not read."""
    if a.device.type in ("cuda", "meta") and kind != a.dtype:  # out_dtype: CUDA only, from 16 bits to fp32
        return torch.addmm(b.new_empty(()), a, b, out_dtype=kind, beta=0, alpha=scale)
    found = a.mm(b) if scale == 1.0 else torch.addmm(b.new_empty(()), a, b, beta=0, alpha=scale)
    return found.to(kind)


# The weights of a whole adapter in the compute type


@contextlib.contextmanager
def computing(layers: Sequence[LowRankLayer], kind: torch.dtype) -> Iterator[None]:
    """Inside, these layers compute with one cast of their weights, made now by one multi-tensor kernel for all of
    them on a device. Covers one forward and backward pass, recomputation included: a layer's cast is dropped with its
    backward."""
    halves: list[Tensor] = [half for layer in layers for half in (layer.lora_down, layer.lora_up)]
    if all(half.dtype == kind for half in halves):
        yield
        return
    with torch.no_grad():
        cast = [torch.empty_like(half, dtype=kind) for half in halves]
        # one device, but for text encoders that were frozen on the way and are in RAM
        for device in dict.fromkeys(half.device for half in halves):
            here = [number for number, half in enumerate(halves) if half.device == device]
            torch._foreach_copy_([cast[n] for n in here], [halves[n] for n in here])
    for number, layer in enumerate(layers):
        layer._cast = cast[2 * number : 2 * number + 2]
    del cast
    try:
        yield
    finally:
        for layer in layers:
            layer._cast = []
