"""The frozen base in fp8: linear and convolution weights as float8 (E4M3) with one fp32 scale per output.

Owns the layers' number format and their forward and backward passes.  A weight is widened for each use and
discarded afterwards, also in the backward pass, which saves only the fp8 weight: with an ordinary cast,
autograd would keep a wide copy of every weight and cost more memory than fp8 saves. Does not own when a base
is converted (``hpo.train.placement``) or how an adapter is injected (``trainer.adapters``).

sd-scripts' fp8_base casts without a scale; most weights of a U-Net are below 2⁻⁶, where E4M3 has less than three
bits of mantissa left.  The scale maps the largest weight of each output to the largest number of the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448
SCALE = "fp8_scale"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in fp8 and its fp32 scale (out, 1 …): weight ≈ fp8 × scale."""
    axes = tuple(range(1, weight.dim()))
    peak = weight.float().abs().amax(dim=axes, keepdim=True)
    scale = torch.where(peak > 0, peak / LARGEST, torch.ones_like(peak))
    return (weight.float() / scale).to(FORMAT), scale


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 × scale as ``dtype``."""
    return (weight.to(torch.float32) * scale).to(dtype)


def weight_of(layer: Any) -> Tensor:
    """The weight that a layer computes with: widened to fp32 if it is stored in fp8, else unchanged."""
    weight: Tensor = layer.weight.detach()
    return widened(weight, getattr(layer, SCALE), torch.float32) if is_fp8(layer) else weight


def is_fp8(layer: Any) -> bool:
    return SCALE in getattr(layer, "_buffers", ())


def holds_fp8(model: nn.Module) -> bool:
    """Whether any layer of a network is stored in fp8."""
    return any(is_fp8(module) for module in model.modules())


def convert(model: nn.Module) -> None:
    """Convert all linear and convolution layers of a network to fp8, in place; the module objects stay the
    same. The lost precision cannot be restored."""
    for module in model.modules():
        if type(module) in _CLASSES:
            layer: Any = module
            weight, scale = quantized(layer.weight.detach())
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.register_buffer(SCALE, scale, persistent=False)
            layer.__class__ = _CLASSES[type(module)]


def nbytes(model: nn.Module) -> int:
    """Total bytes of a network's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kind = x.dtype
        return nn.functional.linear(x, widened(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradients[0].to(ctx.kind) @ widened(weight, scale, ctx.kind), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kind, ctx.shape, ctx.how = x.dtype, x.shape, how
        return nn.functional.conv2d(x, widened(weight, scale, x.dtype), bias, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        wide = widened(weight, scale, ctx.kind)
        grad = conv2d_input(ctx.shape, wide, gradients[0].to(ctx.kind), *ctx.how)
        return grad, None, None, None, None


def _compute(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias in the autocast dtype, if active, else in that of the input."""
    kind = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
    return x.to(kind), None if bias is None else bias.to(kind)


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear with its weight stored in fp8."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_fp8(self):  # PEFT creates adapter layers with the class of the base layer
            return super().forward(input)
        x, bias = _compute(input, self.bias)
        result: Tensor = _Linear.apply(x, self.weight, getattr(self, SCALE), bias)
        return result


class Fp8Conv2d(nn.Conv2d):
    """A frozen nn.Conv2d with its weight stored in fp8."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_fp8(self):
            return super().forward(input)
        assert self.padding_mode == "zeros"
        x, bias = _compute(input, self.bias)
        how = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _Conv2d.apply(x, self.weight, getattr(self, SCALE), bias, how)
        return result


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}
