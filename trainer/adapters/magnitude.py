"""DoRA's magnitude.  W' = (W + ΔW) · m / ‖W + ΔW‖, one m per input (arXiv 2402.09353 eq. 5: the norm of each column) as
LyCORIS does with wd_on_output = False.  That is the form which ComfyUI and A1111 both read (docs/adapters.md).  Files
with one m per output (LyCORIS' default, PEFT) are read too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compute import weight_of

MAGNITUDE = "dora_scale"


def column_norm(weight: Tensor) -> Tensor:
    """‖W‖ of each input, (1, in) or (1, in, 1, 1), fp32."""
    ones = [1] * (weight.dim() - 2)
    return weight.float().transpose(0, 1).flatten(1).norm(dim=1).reshape(1, weight.shape[1], *ones)


def row_norm(weight: Tensor) -> Tensor:
    """‖W‖ of each output, (out, 1) or (out, 1, 1, 1), fp32."""
    return weight.float().flatten(1).norm(dim=1).reshape(weight.shape[0], *[1] * (weight.dim() - 1))


def attach_magnitude(layer: Any, kept_rows: Callable[[], Tensor | None]) -> None:
    """Scale what goes into the layer (one m per input) or what comes out of it without bias (one m per
    output).  As in PEFT and section 4.3 of the paper the norm is taken as a constant of the gradient.  The norm is
    that of what is computed: without the rows that dropout leaves out."""
    magnitude = layer.weights[MAGNITUDE]
    per_input = magnitude.shape[0] == 1
    base_layer = layer.wrapped.base_layer

    def scale() -> Tensor:
        with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
            weight = weight_of(base_layer).float()
            delta = layer.delta()
            if (rows := kept_rows()) is not None:
                delta = delta * rows[:, None]
            merged = weight + delta.reshape(weight.shape)
            norm = column_norm(merged) if per_input else row_norm(merged)
        return magnitude / norm.clamp(min=torch.finfo(torch.float32).eps)

    def scale_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if layer.wrapped.disable_adapters:
            return inputs
        return ((inputs[0] * scale()).to(inputs[0].dtype), *inputs[1:])

    def scale_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if layer.wrapped.disable_adapters:
            return output
        shape = (1, -1, 1, 1) if magnitude.dim() == 4 else (-1,)
        factor = scale().reshape(shape)
        if base_layer.bias is None:
            return (output * factor).to(output.dtype)
        bias = base_layer.bias.reshape(shape)
        return ((output - bias) * factor + bias).to(output.dtype)

    if per_input:
        layer.wrapped.register_forward_pre_hook(scale_input)
    else:
        layer.wrapped.register_forward_hook(scale_output)
