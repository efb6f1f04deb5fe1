"""The frozen base in fp8: linear and convolution weights as float8 (E4M3) with one scale per output.

Owns the layers' number format and their forward and backward passes.  A weight is widened for each use and
discarded afterwards, also in the backward pass, which saves only the fp8 weight: with an ordinary cast,
autograd would keep a wide copy of every weight and cost more memory than fp8 saves. Does not own when a base
is converted (``hpo.train.placement``) or how an adapter is injected (``trainer.adapters``).

sd-scripts' fp8_base casts without a scale; most weights of a U-Net are below 2⁻⁶, where E4M3 has less than three
bits of mantissa left.  The scale is the smallest power of two with which every weight of an output fits the format.
Fp8 numbers and powers of two are exact in bf16, and a power of two can be multiplied before or after a product with
the same result: so a weight is widened without fp32, and the scale goes onto the smaller of weight and output.  In
fp16, where an output without its scale could overflow, it always goes onto the weight.

There are no products of fp8 with fp8 (``torch._scaled_mm``): docs/train.md says why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448
SCALE = "fp8_scale"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in fp8 and its scale (out, 1 …), powers of two in bf16: weight ≈ fp8 × scale."""
    axes = tuple(range(1, weight.dim()))
    peak = weight.float().abs().amax(dim=axes, keepdim=True)
    mantissa, exponent = torch.frexp(peak / LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # 0.5 × 2ⁿ is a power of two itself
    scale = torch.ldexp(torch.ones_like(peak), exponent.clamp(min=-100))
    scale = torch.where(peak > 0, scale, torch.ones_like(peak))
    return (weight.float() / scale).to(FORMAT), scale.to(torch.bfloat16)


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 × scale as ``dtype``, which must be wider than fp8."""
    return weight.to(dtype).mul_(scale)


def scales_output(outputs: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the scale is multiplied onto the ``outputs`` numbers of a product (or onto their gradient) instead of
    the weight: never in fp16, else where there are fewer of them."""
    return dtype != torch.float16 and outputs < weight.numel()


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
        if not scales_output(x.numel() // weight.shape[1] * weight.shape[0], weight, x.dtype):
            return nn.functional.linear(x, widened(weight, scale, x.dtype), bias)
        each = scale.view(-1)
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias / each).mul_(each)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad = gradients[0].to(ctx.kind)
        if scales_output(grad.numel(), weight, ctx.kind):
            return (grad * scale.view(-1)) @ weight.to(ctx.kind), None, None, None
        return grad @ widened(weight, scale, ctx.kind), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kind, ctx.shape, ctx.how = x.dtype, x.shape, how
        outputs = x.numel() // x.shape[1] * weight.shape[0] // math.prod(how[0])  # but for its border
        if not scales_output(outputs, weight, x.dtype):
            return nn.functional.conv2d(x, widened(weight, scale, x.dtype), bias, *how)
        each = scale.view(-1)
        bias = None if bias is None else bias / each
        return nn.functional.conv2d(x, weight.to(x.dtype), bias, *how).mul_(each.view(-1, 1, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad = gradients[0].to(ctx.kind)
        if scales_output(grad.numel(), weight, ctx.kind):
            grad, wide = grad * scale.view(-1, 1, 1), weight.to(ctx.kind)
        else:
            wide = widened(weight, scale, ctx.kind)
        return conv2d_input(ctx.shape, wide, grad, *ctx.how), None, None, None, None


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
