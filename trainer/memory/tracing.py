"""One training step without data: what is allocated and freed, in order, as a CUDA card would do it.

The networks are the real ones (diffusers, transformers, PEFT's layers, our adapter and checkpointing code) on
the meta device, where tensors have shapes and storages but no memory.  Six functions of torch are replaced
while tracing, because the meta device knows neither autocast nor fused attention: they allocate and save for
backward what CUDA's kernels under autocast do.  Everything else is torch's own autograd.

Owns the order and size of allocations of forward and backward.  Does not own weights, optimizer state or what
an allocator makes of the order (``footprint``, ``allocator``).

Ranks: a trace is made with prime numbers as ranks that divide no other size, so every storage is known to be
constant, or so many bytes per network_dim or per conv_dim, and one trace serves all ranks.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.adapters import KINDS
from trainer.adapters import adapter as adapters
from trainer.bases import Base, Sizes, TextStates
from trainer.compute import recompute
from trainer.config import TrainConfig

DIM, CONV_DIM = 257, 263  # primes above every latent side and text length, in no channel count
CONSTANT, PER_DIM, PER_CONV_DIM = 0, 1, 2


@dataclass(frozen=True)
class Block:
    """One allocation: ``size_bytes`` as a whole, or per unit of a rank."""

    size_bytes: int
    scales_with: int
    is_gradient: bool = False
    is_workspace: bool = False

    def bytes_at(self, dim: int, conv_dim: int) -> int:
        return self.size_bytes * (1, dim, conv_dim)[self.scales_with]


@dataclass(frozen=True)
class Trace:
    """``events``: n ≥ 0 allocates block n, ~n frees it.  ``shapes``: of the adapter's tensors, and whether
    each got a gradient."""

    blocks: tuple[Block, ...]
    events: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, ...], bool], ...]


class Recorder(TorchDispatchMode):
    """Follows every storage from its first tensor to its last."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self.sizes: list[tuple[int, int, bool]] = []
        self.known: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.see(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self.see(part)
        return result

    def see(self, tensor: Tensor, *, is_new: bool = True) -> None:
        """A tensor exists.  ``is_new = False``: it was there before the step and is not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        number = -1
        if is_new:
            number = self._allocate(storage.nbytes(), tensor.element_size())
        self.known[key] = number
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))

    def workspace(self, size_bytes: int) -> None:
        """Memory that a kernel uses while it runs."""
        self.events.append(~self._allocate(size_bytes, 1, is_workspace=True))

    def _allocate(self, size_bytes: int, element_bytes: int, *, is_workspace: bool = False) -> int:
        self.sizes.append((size_bytes, size_bytes // element_bytes, is_workspace))
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def _gone(self, key: int) -> None:
        number = self.known.pop(key)
        del self._references[key]
        if number >= 0:
            self.events.append(~number)


def _block(size_bytes: int, elements: int, is_workspace: bool, is_gradient: bool) -> Block:
    for scale, prime in ((PER_DIM, DIM), (PER_CONV_DIM, CONV_DIM)):
        if elements and elements % prime == 0 and size_bytes % prime == 0:
            return Block(size_bytes // prime, scale, is_gradient, is_workspace)
    return Block(size_bytes, CONSTANT, is_gradient, is_workspace)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """``owner.name`` is ``stand_in`` for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own) if own is not None else delattr(owner, name)


# What CUDA's kernels allocate and save.


class _Product(torch.autograd.Function):
    """Linear layers and convolutions: saves the input for a trained weight, the weight for an input that
    needs a gradient.  Convolutions save both whatever is trained (one formula for all gradients in torch's
    derivatives.yaml), except those of ``trainer.compute.fp8``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, recorder: Any, is_fp8: bool
    ) -> Tensor:
        ctx.recorder, ctx.x_shape, ctx.is_fp8 = recorder, x.shape, is_fp8
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        keeps_x = needs_weight or (needs_x and weight.dim() == 4 and not is_fp8)
        ctx.save_for_backward(
            x if keeps_x else None, weight if needs_x else None, bias if needs_bias else None
        )
        ctx.weight_shape = weight.shape
        wide = _widened(weight, recorder) if is_fp8 else None
        out = x.new_empty(shape)
        del wide
        if weight.dim() == 4:
            ctx.transposed = 2 * (x.numel() + out.numel() + weight.numel())
            recorder.workspace(ctx.transposed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _x, weight, bias = ctx.saved_tensors
        wide = _widened(weight, ctx.recorder) if ctx.is_fp8 else None
        if len(ctx.weight_shape) == 4:
            ctx.recorder.workspace(ctx.transposed)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradients = (
            grad.new_empty(ctx.x_shape) if needs_x else None,
            grad.new_empty(ctx.weight_shape) if needs_weight else None,
            grad.new_empty(bias.shape) if needs_bias else None,
        )
        del wide
        return *gradients, None, None, None


def _widened(weight: Tensor, recorder: Recorder) -> Tensor:
    """An 8-bit weight for one use: twice in fp32 on the way (``trainer.compute.fp8.widened``)."""
    recorder.workspace(8 * weight.numel())
    return weight.new_empty(weight.shape)


class _Norm(torch.autograd.Function):
    """Layer and group norm in fp32: saves the input and the two statistics of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(rows), x.new_empty(rows), weight)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.empty_like(grad), None, None


class _Attention(torch.autograd.Function):
    """FlashAttention 2 (arXiv 2307.08691): saves q, k, v, the output and one fp32 number a row; no L×L
    matrix.  Backward sums dq in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recorder: Any) -> Tensor:
        batch, heads, length, _width = q.shape
        out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty((batch, heads, length), dtype=torch.float32))
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, _out, rows = ctx.saved_tensors
        ctx.recorder.workspace(4 * (q.numel() + rows.numel()))
        return *(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v)), None


class _Kernels:
    """The replaced functions.  ``low``: the autocast type, or None where everything is fp32.  ``fp8``: ids of
    weights that are kept in 8 bits."""

    def __init__(self, recorder: Recorder, low: torch.dtype | None, fp8: frozenset[int]) -> None:
        self.recorder, self.low, self.fp8 = recorder, low, fp8
        self.casts: dict[int, Tensor] | None = {}  # autocast keeps casts of trained weights until it ends

    def patches(self) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        for name in ("linear", "conv2d", "layer_norm", "group_norm", "scaled_dot_product_attention"):
            yield name, getattr(self, name)

    def end_autocast(self) -> None:
        """Forward is over: kept casts go, and backward's recomputation keeps none."""
        self.casts = None

    def _low(self, tensor: Tensor | None) -> Any:
        if tensor is None or self.low is None or tensor.dtype == self.low:
            return tensor
        if self.casts is not None and tensor.is_leaf and tensor.requires_grad:
            if id(tensor) not in self.casts:
                self.casts[id(tensor)] = tensor.to(self.low)
            return self.casts[id(tensor)]
        return tensor.to(self.low)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._product(x, weight, bias, (*x.shape[:-1], weight.shape[0]))

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        sides = [
            (side + 2 * _axis(padding, n) - _axis(dilation, n) * (kernel - 1) - 1) // _axis(stride, n) + 1
            for n, (side, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
        ]
        shape = (x.shape[0], weight.shape[0], *sides)
        return self._product(x, weight, bias, shape)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        is_fp8 = id(weight) in self.fp8
        x, weight, bias = self._low(x), self._low(weight), self._low(bias)
        return _Product.apply(x, weight, bias, shape, self.recorder, is_fp8)

    def layer_norm(
        self,
        x: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        return self._norm(x, x.numel() // math.prod(shape), weight)

    def group_norm(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        return self._norm(x, x.shape[0] * groups, weight)

    def _norm(self, x: Tensor, rows: int, weight: Tensor | None) -> Tensor:
        """CUDA's autocast runs norms in fp32 and leaves their output so (torch docs, amp op reference)."""
        return _Norm.apply(x.float(), rows, None if weight is None else weight.float())

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(self._low(q), self._low(k), self._low(v), self.recorder)


def _axis(value: Any, axis: int) -> int:
    return int(value if isinstance(value, int) else value[axis])


def _inputs_elsewhere(module: Any, *inputs: Any) -> Any:
    """``trainer.compute.recompute._with_inputs_in_ram``: what waits there is not on the card."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype),
        lambda facts: torch.empty(facts[0], dtype=facts[1], device="meta"),
    ):
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, use_reentrant=False)


# The step


@dataclass
class Subject:
    """A base on the meta device with an adapter in it; without one the U-Net itself is trained."""

    base: Base
    adapter: adapters.Adapter | None

    def trainable(self) -> list[nn.Parameter]:
        return list(self.base.unet.parameters()) if self.adapter is None else self.adapter.trainable()


def subject(base: Base, config: TrainConfig) -> Subject:
    """The adapter of these settings in a base on the meta device."""
    targets = adapters.targets_of(base, config)
    weights: dict[str, Tensor] = {}
    with torch.device("meta"):
        for target in targets:
            layer = base.components()[target.component].get_submodule(target.path)
            kind = KINDS[target.kind]
            for ending, value in kind.start(layer, target.rank, None).items():  # type: ignore[arg-type]
                weights[f"{target.key}.{ending}"] = value
            if target.kind == "DoRA":
                weights[f"{target.key}.{adapters.MAGNITUDE}"] = adapters.column_norm(layer.weight)
    dropout = adapters.Dropout(config.network_dropout, config.rank_dropout, 0.0)
    return Subject(base, adapters.Adapter(base, targets, weights, dropout=dropout))


def trace(it: Subject, config: TrainConfig, bucket_px: tuple[int, int], compute: torch.dtype) -> Trace:
    """Forward and backward of one micro-batch.  ``bucket_px``: width, height."""
    base, batch = it.base, config.train_batch_size
    width_px, height_px = bucket_px
    parameters = it.trainable()
    _set_kind(it, torch.bfloat16 if config.full_bf16 else torch.float32)
    if config.text_encoder_frozen and it.adapter is not None:
        it.adapter.freeze_text_encoders()
    recorder = Recorder()
    for module in base.modules():
        for tensor in (*module.parameters(), *module.buffers()):
            recorder.see(tensor, is_new=False)
    matrices = [p for p in base.unet.parameters() if p.dim() > 1 and not p.requires_grad]
    fp8 = frozenset(map(id, matrices)) if config.fp8_base else frozenset()
    kernels = _Kernels(recorder, None if compute == torch.float32 else compute, fp8)
    with contextlib.ExitStack() as stack:
        for name, function in kernels.patches():
            stack.enter_context(_replaced(F, name, function))
        stack.enter_context(_replaced(adapters, "keyed_generator", lambda *_, **__: None))
        stack.enter_context(_replaced(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(_replaced(recompute, "_with_inputs_in_ram", _inputs_elsewhere))
        stack.enter_context(recorder)
        stack.enter_context(recompute.recomputing(base, config))
        if it.adapter is not None and (config.network_dropout or config.rank_dropout):
            it.adapter.apply_dropout(1)
        side = base.latent_factor_px
        with torch.device("meta"):
            shape = (batch, base.unet.config.in_channels, height_px // side, width_px // side)
            noisy_BCHW, timesteps_B = torch.empty(shape), torch.zeros(batch, dtype=torch.long)
            states = text_states(base, config, batch)
        sizes = [Sizes((height_px, width_px), (0, 0), (height_px, width_px))] * batch
        predicted_BCHW = base.predict(noisy_BCHW, timesteps_B, states, sizes)
        kernels.end_autocast()
        del states
        (predicted_BCHW - torch.empty_like(noisy_BCHW)).square().mean().backward()
        del predicted_BCHW, noisy_BCHW
        given = [p.grad for p in parameters if p.grad is not None]
        gradients = {recorder.known[grad.untyped_storage()._cdata] for grad in given}
    if it.adapter is not None:
        it.adapter.apply_dropout()
    blocks = tuple(_block(*size, n in gradients) for n, size in enumerate(recorder.sizes))
    shapes = tuple((tuple(p.shape), p.grad is not None) for p in parameters)
    found = Trace(blocks, tuple(recorder.events), shapes)
    for parameter in parameters:
        parameter.grad = None
    return found


def _set_kind(it: Subject, kind: torch.dtype) -> None:
    """Trained weights as a number type, without gradients; DoRA's magnitudes are always fp32."""
    fp32 = (
        [] if it.adapter is None else [layer.weights.get(adapters.MAGNITUDE) for layer in it.adapter.layers]
    )
    magnitudes = {id(weight) for weight in fp32}
    for parameter in it.trainable():
        parameter.grad = None
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in magnitudes else kind)


def text_states(base: Base, config: TrainConfig, batch: int) -> TextStates:
    """Cached states as they come to the card, or the encoders' own if one of them is trained."""
    windows = (config.max_token_length or 75) // 75
    if config.trains_text_encoder:
        ids_BWL = torch.zeros((batch, windows, base.caption_tokens + 2), dtype=torch.long)
        updates = torch.set_grad_enabled(config.updates_text_encoder)
        with updates, _replaced(base, "token_windows", lambda *_: ids_BWL):
            return base.encode_text([""] * batch, config.clip_skip, config.max_token_length)
    width = int(base.unet.config.cross_attention_dim)
    hidden_BLD = torch.empty(batch, windows * 75 + 2, width)
    if not base.facts.has_pooled_text:
        return TextStates(hidden_BLD)
    return TextStates(hidden_BLD, torch.empty(batch, base.text_encoders[1].config.projection_dim))
