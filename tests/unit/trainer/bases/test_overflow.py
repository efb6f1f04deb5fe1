"""A VAE that overflows in fp16 draws what it draws in fp32, and the base remembers it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import make_vae_overflow, save_folder, tiny_base
from trainer.bases import Base, load_base

FAMILIES = ("sd15", "sdxl")


def loud(family: str = "sd15", dtype: torch.dtype = torch.float16) -> Base:
    base = tiny_base(family)
    with torch.no_grad():
        base.vae.decoder.conv_out.weight.mul_(10)
    make_vae_overflow(base.vae)
    nn.Module.to(base.vae, dtype)
    return base


def latents(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(3))


def seen_types(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Fills with the VAE's dtype and the number of images of every decoding."""
    seen: list[tuple[torch.dtype, int]] = []
    real = base.vae.decode

    def decode(given: Tensor, **options: object) -> object:
        seen.append((base.vae.dtype, len(given)))
        return real(given, **options)

    monkeypatch.setattr(base.vae, "decode", decode)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_louder_vae_computes_the_same_in_fp32_and_overflows_in_fp16(family: str) -> None:
    plain, changed = tiny_base(family), loud(family, torch.float32)
    with torch.no_grad():
        plain.vae.decoder.conv_out.weight.mul_(10)
    ours, theirs = (base.decode_latents(latents())[0].astype(int) for base in (plain, changed))
    assert ours.std() > 5 and np.abs(ours - theirs).max() <= 1
    half = loud(family)
    assert not half.vae.decode(latents().half() / half.latent_scale).sample.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overflow_is_decoded_again_in_fp32_said_once_and_remembered(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, said, noted = loud(family), [], []
    base.say = said.append
    base.on_overflow.append(lambda: noted.append(1))
    seen = seen_types(base, monkeypatch)
    first, finite = base.decode_latents(latents())
    right = loud(family, torch.float32).decode_latents(latents())[0].astype(int)
    assert (
        finite == [True] * 3 and np.abs(first.astype(int) - right).max() <= 3
    )  # the weights were rounded to fp16
    assert seen == [(torch.float16, 3)] + [(torch.float32, 1)] * 3
    assert base.vae_overflows and base.vae.dtype == torch.float16
    del seen[:]
    again, _ = base.decode_latents(latents())
    assert (again == first).all() and seen == [(torch.float32, 1)] * 3, "fp16 is not tried again"
    assert len(noted) == 1 and len(said) == 1
    assert f"the VAE of tiny-{family} overflows in fp16" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_decoded_at_once_as_before(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loud("sd15", dtype)
    base.vae_overflows = True  # found out by an earlier run in fp16
    seen = seen_types(base, monkeypatch)
    assert base.decode_latents(latents())[1] == [True] * 3
    assert seen == [(dtype, 3)]


def test_a_vae_that_does_not_overflow_stays_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("sd15")
    nn.Module.to(base.vae, torch.float16)
    seen = seen_types(base, monkeypatch)
    assert base.decode_latents(latents())[1] == [True] * 3
    assert seen == [(torch.float16, 3)] and not base.vae_overflows


def test_latents_that_are_not_finite_are_no_fault_of_the_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("sd15")
    nn.Module.to(base.vae, torch.float16)
    seen = seen_types(base, monkeypatch)
    broken = latents()
    broken[1] = torch.nan
    assert base.decode_latents(broken)[1] == [True, False, True]
    assert seen == [(torch.float16, 3)] and not base.vae_overflows


def test_the_caller_of_load_base_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    base = load_base(
        str(save_folder(loud("sd15", torch.float32), tmp_path / "loud")), dtype=torch.float16, say=said.append
    )
    base.decode_latents(latents())
    assert len(said) == 1 and "the VAE of loud overflows" in said[0]


def test_the_miniature_overflows_in_fp16_itself() -> None:
    half, whole = (load_base("mini-sd15", dtype=dtype) for dtype in (torch.float16, torch.float32))
    drawn, finite = half.decode_latents(latents())
    assert half.vae_overflows and finite == [True] * 3
    assert np.abs(drawn.astype(int) - whole.decode_latents(latents())[0]).mean() < 2
