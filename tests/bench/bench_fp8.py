"""What fp8 base weights cost a step beside its products: bytes that are read and written to widen weights and to
apply their scales, counted on the published sizes without memory; and what products of fp8 with fp8 would change.

    python -m tests.bench.bench_fp8 bytes       # SD1.5 512 px batch 4 and SDXL 1024 px batch 1
    python -m tests.bench.bench_fp8 accuracy    # on the miniature: losses and outputs

``bytes`` counts two forwards (one of them recomputed) and one backward pass, as with gradient checkpointing.
``accuracy`` compares, with the U-Net in fp32: the scale of earlier versions (the largest weight of an output / 448),
today's power of two, and activations in fp8 too (one scale a row, as ``torch._scaled_mm`` would take them).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.fullsize import meta_base
from tests.tiny import tiny_config, tiny_prepared
from trainer.bases import Base, Sizes, TextStates, load_base
from trainer.compute import fp8

BEFORE = 1 + 4 + 4 + 4 + 4 + 2  # a weight to fp32, times the scale, to bf16
WIDEN = 1 + 2
SCALE = 2 + 2  # read and written in bf16


@dataclass
class Use:
    """One forward pass of a layer: numbers in its weight and its output."""

    weight: int
    outputs: int

    def before(self) -> int:
        """Bytes of two forwards and a backward pass in earlier versions."""
        return 3 * BEFORE * self.weight

    def now(self) -> int:
        return 3 * (WIDEN * self.weight + SCALE * min(self.weight, self.outputs))

    def always_on_output(self) -> int:
        return 3 * (WIDEN * self.weight + SCALE * self.outputs)


def uses(family: str, side_px: int, batch: int) -> list[Use]:
    """Every linear and convolution layer of a U-Net in one forward pass."""
    base = meta_base(family)
    found: list[Use] = []

    def seen(module: Any, _inputs: Any, output: Tensor) -> None:
        found.append(Use(module.weight.numel(), output.numel()))

    hooks = [
        module.register_forward_hook(seen)
        for module in base.unet.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    side = side_px // base.latent_factor_px
    width = int(base.unet.config.cross_attention_dim)
    pooled = (
        torch.empty(batch, base.text_encoders[1].config.projection_dim, device="meta")
        if base.facts.has_pooled_text
        else None
    )
    with torch.no_grad():
        base.predict(
            torch.empty(batch, base.unet.config.in_channels, side, side, device="meta"),
            torch.zeros(batch, dtype=torch.long, device="meta"),
            TextStates(torch.empty(batch, 77, width, device="meta"), pooled),
            [Sizes(*[(side_px, side_px)] * 3)] * batch,
        )
    for hook in hooks:
        hook.remove()
    return found


def count() -> None:
    print(
        "| step | before | scale on the output | on the smaller (now) | now / before |\n|---|---|---|---|---|"
    )
    for family, side_px, batch in (("sd15", 512, 4), ("sdxl", 1024, 1)):
        found = uses(family, side_px, batch)
        before, output, now = (
            sum(getattr(use, name)() for use in found) for name in ("before", "always_on_output", "now")
        )
        print(
            f"| {family}, {side_px} px, batch {batch} | {before / 1e9:.1f} GB | {output / 1e9:.1f} GB "
            f"| {now / 1e9:.1f} GB | {now / before:.2f} |"
        )


def _by_largest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The quantization of earlier versions, in fp32."""
    peak = weight.float().abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    scale = torch.where(peak > 0, peak / fp8.LARGEST, torch.ones_like(peak))
    return (weight.float() / scale).to(fp8.FORMAT), scale


def _rows_in_fp8(x: Tensor) -> Tensor:
    """Activations as a product of fp8 with fp8 would take them: one scale for each row."""
    peak = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return (x / peak * fp8.LARGEST).to(fp8.FORMAT).to(x.dtype) * (peak / fp8.LARGEST)


def _forms(name: str) -> Iterator[tuple[str, Base]]:
    yield "unchanged", load_base(name, device="cpu", dtype=torch.float32)
    base = load_base(name, device="cpu", dtype=torch.float32)
    for module in base.unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            eight, scale = _by_largest(module.weight.detach())
            module.weight.data = eight.float() * scale
    yield "largest weight / 448 (before)", base
    base = load_base(name, device="cpu", dtype=torch.float32)
    fp8.convert(base.unet)
    yield "power of two (now)", base
    for module in base.unet.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, inputs: (_rows_in_fp8(inputs[0]), *inputs[1:]))
    yield "activations of linear layers in fp8 too", base


@torch.no_grad()
def accuracy(name: str, images: int = 32) -> None:
    print("| base weights | loss | change of the output |\n|---|---|---|")
    expected = torch.empty(0)
    for words, base in _forms(name):
        prepared = tiny_prepared(base, tiny_config(), images=images)
        draw = torch.Generator().manual_seed(3)
        latents = torch.stack(list(prepared.latents.values())) * base.latent_scale
        noise = torch.randn(latents.shape, generator=draw)
        times = torch.arange(images) * (1000 // images)
        angle = (times / 1000 * math.pi / 2).view(-1, 1, 1, 1)
        noisy = latents * angle.cos() + noise * angle.sin()
        states = prepared.text([item.caption for item in prepared.dataset.items])
        assert states is not None
        found = base.predict(noisy, times, states, list(prepared.sizes.values()))
        expected = found if words == "unchanged" else expected
        change = float((found - expected).norm() / expected.norm())
        print(f"| {words} | {float((found - noise).square().mean()):.6f} | {change:.4f} |")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["bytes", "accuracy"])
    parser.add_argument("--base", default="mini-sd15", help="accuracy: the base")
    given = parser.parse_args(words)
    count() if given.part == "bytes" else accuracy(given.base)


if __name__ == "__main__":
    main()
