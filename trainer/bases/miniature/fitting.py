"""One training loop for every network of the miniature: resumable, kill-safe, seeded.

A checkpoint is one safetensors file, replaced atomically, that holds weights, averaged weights, optimizer moments
and (in its header) the step. Randomness is keyed by step, so a resumed run continues as if nothing had happened.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAVE_SECONDS = 120.0
LOG_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """How long and how hard one network is trained."""

    name: str
    steps: int
    lr: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.99
    ema: float = 0.0
    clip: float = 1.0
    muon_lr: float = (
        0.0  # > 0: inner matrices and convolutions by Muon at this rate, the rest by AdamW at `lr`
    )

    def rate(self, step: int) -> float:
        """Linear warmup, then a cosine down to 2 %."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def save_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, scratch, metadata)
    with open(scratch, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(scratch, path)


def finished(plan: Plan, work: Path) -> bool:
    path = work / f"{plan.name}.safetensors"
    if not path.exists():
        return False
    with safe_open(path, "pt") as handle:
        return int(handle.metadata()["step"]) >= plan.steps


def load_weights(name: str, module: nn.Module, work: Path, *, averaged: bool) -> None:
    """The weights of a finished (or running) training into the module."""
    prefix = "ema." if averaged else "model."
    with safe_open(work / f"{name}.safetensors", "pt") as handle:
        names = list(handle.keys())
        state = {k.removeprefix(prefix): handle.get_tensor(k) for k in names if k.startswith(prefix)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing[:3], unexpected[:3])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearest half-orthogonal matrix, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315  # kellerjordan.github.io/posts/muon
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix update is orthogonalised; convolutions count as (out, in x h x w)."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(state["momentum"], group["momentum"])
                flat = ahead.reshape(len(p), -1)
                update = orthogonalised(flat) * max(1.0, flat.shape[0] / flat.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"])


def new_optimizers(
    plan: Plan, named: list[tuple[str, nn.Parameter]]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates. The first and last layers and the embeddings stay with AdamW."""
    outer = ("conv_in", "conv_out", "embedding", "heads", "quant_conv", "text_encoder")
    inner = [p for n, p in named if plan.muon_lr and p.ndim >= 2 and not any(o in n for o in outer)]
    taken = {id(p) for p in inner}
    decay = [p for _, p in named if p.ndim >= 2 and id(p) not in taken]
    flat = [p for _, p in named if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": plan.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, betas=(0.9, plan.beta2))
    found: list[tuple[torch.optim.Optimizer, float]] = [(adam, plan.lr)]
    if inner:
        found.append((Muon(inner, plan.muon_lr, weight_decay=plan.weight_decay), plan.muon_lr))
    return found


def fit(
    plan: Plan,
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    work: Path,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Train `module`'s trainable parameters; leave the (averaged) final weights in it."""
    path = work / f"{plan.name}.safetensors"
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    optimizers = new_optimizers(plan, named)
    average = {n: p.detach().clone() for n, p in module.state_dict().items()} if plan.ema else {}
    start = 0
    if path.exists():
        with safe_open(path, "pt") as handle:
            start, names = int(handle.metadata()["step"]), list(handle.keys())
            module.load_state_dict(
                {k[6:]: handle.get_tensor(k) for k in names if k.startswith("model.")}, strict=True
            )
            for n in average:
                average[n].copy_(handle.get_tensor("ema." + n))
            stored = {k for k in names if k.startswith("opt.")}
            for optimizer, _ in optimizers:
                for n, p in named:
                    keys = [k for k in ("exp_avg", "exp_avg_sq", "momentum") if f"opt.{n}.{k}" in stored]
                    if keys and any(p is q for group in optimizer.param_groups for q in group["params"]):
                        moments = {
                            k: handle.get_tensor(f"opt.{n}.{k}").to(p.device).view_as(p).clone() for k in keys
                        }
                        steps = {} if "momentum" in keys else {"step": torch.tensor(float(start))}
                        optimizer.state[p] = {**steps, **moments}
        print(f"{plan.name}: resumed at step {start}", flush=True)

    def save(step: int) -> None:
        tensors = {"model." + n: t for n, t in module.state_dict().items()}
        tensors |= {"ema." + n: t for n, t in average.items()}
        for n, p in named:
            for optimizer, _ in optimizers:
                state = optimizer.state.get(p, {}) if step < plan.steps else {}
                tensors |= {f"opt.{n}.{k}": t for k, t in state.items() if k != "step"}
        save_atomic(tensors, path, {"step": str(step)})
        if on_save is not None:
            on_save(step)

    module.train()
    began = saved = time.monotonic()
    running, count = 0.0, 0
    for step in range(start, plan.steps):
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * plan.rate(step)
        torch.manual_seed(step)
        loss = loss_of_step(step)
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if plan.clip:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], plan.clip)
        for optimizer, _ in optimizers:
            optimizer.step()
        if plan.ema:
            momentum = min(plan.ema, (1 + step) / (10 + step))
            state = module.state_dict()
            floats = [n for n in average if average[n].is_floating_point()]
            torch._foreach_lerp_([average[n] for n in floats], [state[n] for n in floats], 1 - momentum)
        running, count = running + float(loss.detach()), count + 1
        if (step + 1) % LOG_STEPS == 0 or step + 1 == plan.steps:
            per_step = (time.monotonic() - began) / (step + 1 - start)
            eta = per_step * (plan.steps - step - 1)
            print(
                f"{plan.name} {step + 1}/{plan.steps} loss {running / count:.5f} "
                f"{per_step:.3f} s/step ETA {eta / 60:.1f} min",
                flush=True,
            )
            running, count = 0.0, 0
        if time.monotonic() - saved > SAVE_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if start < plan.steps:
        save(plan.steps)
    if plan.ema:
        module.load_state_dict(average)
