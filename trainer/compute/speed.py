"""Speed-ups of the U-Net that do not change the result: memory layout and compilation.

Attention needs no switch: diffusers and transformers call PyTorch's scaled_dot_product_attention, which uses
flash kernels if the GPU supports them.

torch.compile is applied to the transformer blocks, which are most of a U-Net and repeat up to 70 times in SDXL.  A
graph is compiled once for each width of a block and then used for all blocks, steps, buckets, batch sizes, ranks and
trials of a process: rank, batch size and number of pixels are dynamic, scale and dropout are inputs (``Compilable``).
Rank 1 and batch size 1 have graphs of their own: PyTorch treats a 1 as fixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes

from trainer.bases import Base
from trainer.compute.fp8 import is_fp8
from trainer.config import TrainConfig

COMPILED = ("BasicTransformerBlock",)
# Variants of one block: three widths, with dropout or not, text encoders trained or not, rank and batch 1 or more.
# PyTorch's own limit is 8, after which it computes without graphs.
MAX_VARIANTS = 64
SETTINGS = {
    "recompile_limit": MAX_VARIANTS,
    "automatic_dynamic_shapes": False,  # only what is marked is dynamic
    "force_parameter_static_shapes": False,  # the rank is
}
# use_duck_shape: a rank that equals the batch size in the first step may differ from it in the next


def without_graphs(config: TrainConfig) -> str:
    """The setting with which torch_compile has no effect, or an empty text."""
    if not config.torch_compile:
        return ""
    if config.network_type not in ("LoRA", "LoCon", "LoRA-FA"):
        return f"network_type = {config.network_type}"
    if config.rank_dropout and config.rank_dropout_rows:
        return "LyCORIS' rank_dropout"
    return next((name for name in ("fp8_base", "module_dropout", "use_scalar") if getattr(config, name)), "")


@runtime_checkable
class Compilable(Protocol):
    """A layer of an adapter that knows how to be part of a graph."""

    def to_be_compiled(self, wanted: bool) -> bool: ...


class _Block:
    """Calls a block's graph; what may differ from call to call is marked as dynamic.  Nothing else is: widths stay
    numbers, for which better kernels are made."""

    def __init__(self, block: nn.Module, backend: Any) -> None:
        self._graph = torch.compile(block._call_impl, backend=backend)

    def __call__(self, *args: Any, **options: Any) -> Any:
        for value in (*args, *options.values()):
            if isinstance(value, Tensor):
                for axis in range(value.dim() - 1):
                    torch._dynamo.maybe_mark_dynamic(value, axis)
        with torch._dynamo.config.patch(SETTINGS), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return self._graph(*args, **options)


@contextlib.contextmanager
def faster(base: Base, config: TrainConfig, backend: Any = "inductor") -> Iterator[None]:
    """Apply opt_channels_last and torch_compile during training; restores the base afterwards.  Graphs are kept for
    the next training in this process."""
    blocks = [m for m in base.unet.modules() if type(m).__name__ in COMPILED] if config.torch_compile else []
    if config.opt_channels_last:
        nn.Module.to(base.unet, memory_format=torch.channels_last)
    try:
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_compiled(block, backend))
            yield
    finally:
        if config.opt_channels_last:
            nn.Module.to(base.unet, memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _compiled(block: Any, backend: Any) -> Iterator[None]:
    """One block as a graph, if all of its layers can be part of one: in pieces it would hardly be faster."""
    layers = [module for module in block.modules() if isinstance(module, Compilable)]
    fit = [layer.to_be_compiled(True) for layer in layers]
    if all(fit) and not any(map(_interrupts, block.modules())):
        block._compiled_call_impl = _Block(block, backend)
    try:
        yield
    finally:
        block._compiled_call_impl = None
        for layer in layers:
            layer.to_be_compiled(False)


def _interrupts(module: Any) -> bool:
    """Whether a module is an adapter's layer of another kind, or in fp8."""
    return is_fp8(module) or (hasattr(module, "base_layer") and not isinstance(module, Compilable))
