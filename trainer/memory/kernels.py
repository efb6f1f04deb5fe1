"""Kernels: what CUDA's kernels under autocast allocate and save for backward, on the meta device.

Owns the replacements of torch functions that support neither autocast nor fused attention there. Does not own
when they are used; see ``tracing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from trainer.compute.fp8 import scales_output
from trainer.memory.recorder import Recorder


class _Product(torch.autograd.Function):
    """Linear layers and convolutions: saves the input if the weight is trained, and the weight if the input
    needs a gradient. Convolutions always save both (torch's derivatives.yaml has one formula for all
    gradients), except those of ``trainer.compute.fp8``."""

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
        wide = weight.new_empty(weight.shape) if is_fp8 else None
        out = x.new_empty(shape)
        del wide
        if weight.dim() == 4:
            ctx.transposed = 2 * (x.numel() + out.numel() + weight.numel())
            recorder.workspace(ctx.transposed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _x, weight, bias = ctx.saved_tensors
        # an fp8 weight, widened for one use, or its scale on the gradient (``trainer.compute.fp8``)
        wide = weight.new_empty(weight.shape) if ctx.is_fp8 else None
        scaled = ctx.is_fp8 and scales_output(grad.numel(), weight, weight.dtype)
        scaled_grad = grad.new_empty(grad.shape) if scaled else None
        if len(ctx.weight_shape) == 4:
            ctx.recorder.workspace(ctx.transposed)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradients = (
            grad.new_empty(ctx.x_shape) if needs_x else None,
            grad.new_empty(ctx.weight_shape) if needs_weight else None,
            grad.new_empty(bias.shape) if needs_bias else None,
        )
        del wide, scaled_grad
        return *gradients, None, None, None


class _Norm(torch.autograd.Function):
    """Layer and group norm in fp32: saves the input and two statistics per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(rows), x.new_empty(rows), weight)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.empty_like(grad), None, None


class _Attention(torch.autograd.Function):
    """FlashAttention 2 (arXiv 2307.08691): saves q, k, v, the output and one fp32 number per row, but no L×L
    matrix. Backward accumulates dq in fp32."""

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


class Kernels:
    """The replaced functions.  ``low``: the autocast dtype, or None for fp32. ``fp8``: ids of the weights
    that are stored in fp8."""

    def __init__(self, recorder: Recorder, low: torch.dtype | None, fp8: frozenset[int]) -> None:
        self.recorder, self.low, self.fp8 = recorder, low, fp8
        self.casts: dict[int, Tensor] | None = {}  # autocast keeps casts of trained weights until it ends

    def patches(self) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        for name in ("linear", "conv2d", "layer_norm", "group_norm", "scaled_dot_product_attention"):
            yield name, getattr(self, name)

    def end_autocast(self) -> None:
        """End of the forward pass: cached casts are freed, and recomputation in backward caches none."""
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
        """CUDA's autocast runs norms in fp32 and returns fp32 (torch docs, amp op reference)."""
        if self.low is not None:
            x, weight = x.float(), None if weight is None else weight.float()
        return _Norm.apply(x, rows, weight)

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(self._low(q), self._low(k), self._low(v), self.recorder)


def _axis(value: Any, axis: int) -> int:
    return int(value if isinstance(value, int) else value[axis])


def inputs_elsewhere(module: Any, *inputs: Any) -> Any:
    """Stands in for ``trainer.compute.recompute._with_inputs_in_ram``: the inputs are not on the GPU."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype),
        lambda facts: torch.empty(facts[0], dtype=facts[1], device="meta"),
    ):
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, use_reentrant=False)
