"""The optimizer over an adapter: its parameter groups, their rates step by step, and the weights it sees.

Does not own the table of optimizers (``trainer.optimizers``), how one is made (``optimizers``) or the rate of a step
(``schedules``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.adapters import Adapter, Target
from trainer.config import TrainConfig
from trainer.loop.optimizers import make
from trainer.loop.schedules import learning_rate

PLUS = " plus"  # ends the name of a LoRA+ group, as in sd-scripts' log


def build_optimizer(config: TrainConfig, adapter: Adapter) -> torch.optim.Optimizer:
    """The optimizer over one group for the U-Net and one for all text encoders, each at its own rate; with
    block rates one group for each rate of the U-Net's, with text_encoder_lr1/2 one for each encoder, with LoRA+ one
    more of each for its lora_up (sd-scripts' networks/lora.py and LyCORIS' kohya.py: prepare_optimizer_params).

    A group's ``base_lr`` is its full rate; ``set_rates`` gives it that of a step.
    """
    groups: dict[str, dict[str, Any]] = {}
    for layer in adapter.layers:
        name, lr, ratio = _group_of(config, layer.target)
        for ending, weight in layer.weights.items():
            if not weight.requires_grad:
                continue  # a frozen text encoder, or a half of LoRA-FA that stays as it was drawn
            is_plus = ratio != 1.0 and layer.kind.is_plus(ending)
            full = lr * ratio if is_plus else lr
            place = name + PLUS if is_plus else name
            group = groups.setdefault(place, {"params": [], "lr": full, "name": place, "base_lr": full})
            group["params"].append(weight)
    return make(list(groups.values()), config)


def _group_of(config: TrainConfig, target: Target) -> tuple[str, float, float]:
    """The group of a module: its name, its full rate, and that of lora_up relative to it."""
    unet_ratio, text_ratio = config.loraplus_ratios
    if target.component == "unet":
        name = "unet" if target.rate == 1.0 else f"unet_x{target.rate:g}"
        return name, config.effective_unet_lr * target.rate, unet_ratio
    first, second = config.effective_text_encoder_lrs
    is_second = target.component == "text_encoder_2"
    name = "text_encoder_2" if is_second and first != second else "text_encoder"
    return name, second if is_second else first, text_ratio


def set_rates(optimizer: torch.optim.Optimizer, rate_of: Callable[[float], float]) -> dict[str, float]:
    """Give every group its rate for the coming step, from its full rate; returns group name → rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group["base_lr"])
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def set_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Give every group ``multiplier`` × its full rate for the coming step; returns group name → rate."""
    return set_rates(optimizer, lambda full: full * multiplier)


def set_rates_of_step(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int, step: int
) -> dict[str, float]:
    """Give every group the schedule's rate for step ``step``, counted from 0; returns group name → rate."""
    return set_rates(optimizer, lambda full: learning_rate(config, total_steps, step, full))


def other_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> dict[str, float]:
    """Rates of LoRA+ groups, and d × lr of each group of an optimizer that finds its rate, under the names of
    sd-scripts' log (train_network.py:generate_step_logs)."""
    found = {}
    for group in optimizer.param_groups:
        name, rate = group["name"], rates[group["name"]]
        shown = name.replace("text_encoder", "textencoder")
        if name.endswith(PLUS):
            found[f"lr/{shown}"] = rate
        if "d" in group:
            found[f"lr/d*lr/{shown}"] = float(group["d"]) * rate
    return found


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has weights for training and others for use (``in_training``)."""
    return hasattr(optimizer, "eval")


@contextlib.contextmanager
def in_training(
    optimizer: torch.optim.Optimizer, weights: Sequence[torch.nn.Parameter], draw: torch.Generator | None
) -> Iterator[None]:
    """Inside, a schedule-free optimizer's weights are those it takes gradients at (y in arXiv 2405.15682); outside,
    the averaged ones (x) that are saved, sampled and validated. Between all steps, and not only before something is
    saved: so a resumed run computes exactly what an uninterrupted one does. Other optimizers have one set only.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    with in_fp32(weights, draw):
        optimizer.train()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with in_fp32(weights, draw):
            optimizer.eval()  # type: ignore[attr-defined]


# Weights in bf16 (full_bf16).  Eight bits of mantissa: an update below 2⁻⁹ of a weight is rounded away every time.
# So the update is made in fp32 and rounded up or down at random, with the chances that keep its mean
# (arXiv 2010.06192, section 3).  Only the optimizer's step sees fp32, when no activations are alive.


@contextlib.contextmanager
def in_fp32(weights: Sequence[torch.nn.Parameter], draw: torch.Generator | None = None) -> Iterator[None]:
    """Weights and their gradients as fp32; afterwards bf16 again, rounded stochastically with ``draw``.

    Also what an optimizer's state must be loaded in: optimizers cast it to the weights' type.
    """
    small = [weight for weight in weights if weight.dtype != torch.float32]
    if not small:
        yield
        return
    given = [weight for weight in small if weight.grad is not None]
    gradients = [weight.grad for weight in given if weight.grad is not None]
    for weight in given:
        weight.grad = None
    wide = _joined(
        [weight.data for weight in small]
    ).float()  # in one piece: a few kernels instead of some for each
    for weight, part in zip(small, _parts(wide, small), strict=True):
        weight.data = part
    if given:
        for weight, part in zip(given, _parts(_joined(gradients).float(), given), strict=True):
            weight.grad = part
    try:
        yield
    finally:
        updated = _joined([weight.data for weight in small])
        for weight, part in zip(small, _parts(stochastic_bf16(updated, draw), small), strict=True):
            weight.grad = None
            weight.data = part


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _parts(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pieces of a flat tensor in the shapes of others."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def stochastic_bf16(values: torch.Tensor, draw: torch.Generator | None) -> torch.Tensor:
    """fp32 as bf16: to either neighbour, the nearer one more often, so that the mean is the value itself.
    What bf16 can hold stays as it is."""
    bits = values.contiguous().view(torch.int32)
    dice = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draw)
    return ((bits + dice) & -65536).view(torch.float32).to(torch.bfloat16)


@contextlib.contextmanager
def without_waits(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, bitsandbytes does not wait for the GPU after every tensor (``sync_gpu`` in its optimizer.py). All its
    kernels run in one stream, so nothing but pages moved by the driver needs that."""
    if not type(optimizer).__module__.startswith("bitsandbytes.") or getattr(optimizer, "is_paged", False):
        yield
        return
    from bitsandbytes.optim import optimizer as library

    own, library.sync_gpu = library.sync_gpu, lambda tensor: None
    try:
        yield
    finally:
        library.sync_gpu = own


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move what the optimizer remembers of each weight to a device.  Single numbers stay where they are."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value.to(device)
