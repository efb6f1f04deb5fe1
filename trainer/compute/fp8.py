"""The frozen base in 8 bits: linear and convolution weights as float8 (E4M3) with one fp32 scale per output.

Owns the layers' number format and their forward and backward passes.  A weight is widened when it is used and
thrown away again – also for the backward pass, which keeps the 8 bits only: a cast outside autograd would
keep a wide copy of every weight alive and cost more than it saves.  Does not own when a base is converted
(``hpo.train.placement``) or how an adapter is put on top (``adapter``).

sd-scripts' fp8_base casts without a scale; most weights of a U-Net are below 2⁻⁶, where E4M3 has less than
three bits of mantissa left.  The scale puts each output's largest weight at the format's largest number.
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
    """A weight as 8 bits and its scale (out, 1 …), fp32: weight ≈ 8 bits × scale."""
    axes = tuple(range(1, weight.dim()))
    peak = weight.float().abs().amax(dim=axes, keepdim=True)
    scale = torch.where(peak > 0, peak / LARGEST, torch.ones_like(peak))
    return (weight.float() / scale).to(FORMAT), scale


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """8 bits × scale as ``dtype``."""
    return (weight.to(torch.float32) * scale).to(dtype)


def weight_of(layer: Any) -> Tensor:
    """A layer's weight as it computes with it: fp32 if it is kept in 8 bits, else as it is."""
    weight: Tensor = layer.weight.detach()
    return widened(weight, getattr(layer, SCALE), torch.float32) if is_fp8(layer) else weight


def is_fp8(layer: Any) -> bool:
    return SCALE in getattr(layer, "_buffers", ())


def holds_fp8(model: nn.Module) -> bool:
    """Whether any layer of a network is kept in 8 bits."""
    return any(is_fp8(module) for module in model.modules())


def convert(model: nn.Module) -> None:
    """Put every linear and convolution layer of a network into 8 bits, in place; the modules stay the same
    objects.  What was lost does not come back."""
    for module in model.modules():
        if type(module) in _CLASSES:
            layer: Any = module
            weight, scale = quantized(layer.weight.detach())
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.register_buffer(SCALE, scale, persistent=False)
            layer.__class__ = _CLASSES[type(module)]


def nbytes(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
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
    """Input and bias in the type that autocast would use, else the input's."""
    kind = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
    return x.to(kind), None if bias is None else bias.to(kind)


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear whose weight is kept in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_fp8(self):  # PEFT makes an adapter's layers of the class that it finds
            return super().forward(input)
        x, bias = _compute(input, self.bias)
        result: Tensor = _Linear.apply(x, self.weight, getattr(self, SCALE), bias)
        return result


class Fp8Conv2d(nn.Conv2d):
    """A frozen nn.Conv2d whose weight is kept in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_fp8(self):
            return super().forward(input)
        assert self.padding_mode == "zeros"
        x, bias = _compute(input, self.bias)
        how = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _Conv2d.apply(x, self.weight, getattr(self, SCALE), bias, how)
        return result


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}
