"""What makes sampling fast changes no image: number types, writing beside drawing, slices, and tiles where asked."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.images import sampling
from evaluation.images.sampling import INDEX_NAME, default_config, sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts import Prompt, PromptSet
from tests.smallcard import on_card
from tests.tiny import in_type, tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.bases import Base, needs
from trainer.errors import MachineError

PROMPTS = PromptSet(tuple(Prompt(f"zkw {n}", f"cat {n}", "altered") for n in range(3)), (0, 1))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=2, batch_size=2)
LARGE = 10**9


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_writing_beside_drawing_stores_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("sd15")
    sample(base, PROMPTS, CONFIG, tmp_path / "one", identity="w")
    on_card(base, LARGE)
    threads = set()
    write = sampling._Store.write

    def noted(self: Any, images: Any) -> None:
        threads.add(threading.current_thread() is threading.main_thread())
        write(self, images)

    monkeypatch.setattr(sampling._Store, "write", noted)
    sample(base, PROMPTS, CONFIG, tmp_path / "two", identity="w")
    assert threads == {False}
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert list(json.loads((tmp_path / "two" / INDEX_NAME).read_text())["images"]) == list(
        json.loads((tmp_path / "one" / INDEX_NAME).read_text())["images"]
    )


def test_what_was_drawn_is_stored_when_a_stop_comes(tmp_path: Path) -> None:
    base = tiny_base("sd15")
    on_card(base, LARGE)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(base, PROMPTS, CONFIG, tmp_path, identity="w", on_image=stop)
    rows = json.loads((tmp_path / INDEX_NAME).read_text())["images"]
    assert len(rows) == 4 == len(list(tmp_path.glob("*.png"))) and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("chunk", [0, 2])
def test_an_image_that_cannot_be_stored_ends_the_call_with_its_error(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("sd15")
    on_card(base, LARGE)
    count = iter(range(10))
    write = sampling._Store.write

    def full(self: Any, images: Any) -> None:
        if next(count) == chunk:
            raise MachineError("the disk is full", "free some space")
        write(self, images)

    monkeypatch.setattr(sampling._Store, "write", full)
    with pytest.raises(MachineError, match="the disk is full"):
        sample(base, PROMPTS, CONFIG, tmp_path, identity="w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_an_adapter_computes_in_the_type_of_the_base(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("sd15")
    in_type(base, dtype)
    adapter = inject(base, tiny_config(network_type=kind))
    seen: set[tuple[bool, torch.dtype]] = set()

    def inside(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.add((torch.is_autocast_enabled("cpu"), output.dtype))

    layer = adapter.layers[0].wrapped
    handle = layer.register_forward_hook(inside)
    sample(base, PROMPTS, CONFIG)
    handle.remove()
    adapter.remove()
    assert seen == {(kind == "LoHa" and dtype != torch.float32, dtype)}
    assert not torch.is_autocast_enabled("cpu")


def latents(base: Base, count: int, side_px: int) -> torch.Tensor:
    shape = (count, 4, side_px // base.latent_factor_px, side_px // base.latent_factor_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_card_decodes_large_images_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base("sdxl")
    given = latents(base, 3, 64)
    expected, _ = base.decode_latents(given)
    monkeypatch.setattr(needs, "ALONE_FROM_PX", 64 * 64)
    card = on_card(base, LARGE)
    sizes = []
    inner = base.vae.decode
    monkeypatch.setattr(base.vae, "decode", lambda z, **how: (sizes.append(len(z)), inner(z, **how))[1])
    found, finite = base.decode_latents(given)
    assert sizes == [1, 1, 1] and finite == [True] * 3
    assert np.abs(found.astype(int) - expected).max() <= 1, "as another batch size: rounding, nothing else"
    assert card.moved == [] and not base.vae.use_tiling


def test_images_are_encoded_as_many_at_once_as_fit_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("sdxl")
    pixels = torch.rand((5, 3, 64, 64), generator=torch.Generator().manual_seed(2)) * 2 - 1

    def encoded() -> torch.Tensor:
        return base.encode_images(pixels, [torch.Generator().manual_seed(n) for n in range(5)])

    expected = encoded()
    each = needs.encode_bytes(base.vae.config, 64, 64, 4)
    card = on_card(base, LARGE)
    card.size = 2 * each + sum(p.numel() * 4 for p in base.vae.parameters())
    sizes = []
    inner = base.vae.encode
    monkeypatch.setattr(base.vae, "encode", lambda x, **how: (sizes.append(len(x)), inner(x, **how))[1])
    assert torch.allclose(encoded(), expected, atol=1e-6) and sizes == [2, 2, 1]
    assert card.residents() == [f"{base.name} vae"]


def test_tiles_are_used_where_a_whole_image_does_not_fit_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, said = tiny_base("sd15"), []
    base.say = said.append
    monkeypatch.setattr(needs, "SMALLEST_TILE_PX", 64)
    given = latents(base, 1, 192)
    whole, _ = base.decode_latents(given)
    card = on_card(base, LARGE)
    assert (base.decode_latents(given)[0] == whole).all() and said == []
    before = base.vae.tile_sample_min_size, base.vae.tile_latent_min_size
    card.size = sum(p.numel() * 4 for p in base.vae.parameters())
    card.size += needs.decode_bytes(base.vae.config, 192, 192, 4) // 3
    tiled, finite = base.decode_latents(given)
    base.decode_latents(given)
    assert tiled.shape == whole.shape and finite == [True]
    difference = np.abs(tiled.astype(int) - whole)
    assert difference.max() > 0, "tiles were not used"
    assert difference.mean() < 40  # a random VAE has no smooth seams
    assert len(said) == 1 and "decodes 192×192 px in tiles of 64 px" in said[0] and "seams" in said[0]
    assert (
        base.vae.tile_sample_min_size,
        base.vae.tile_latent_min_size,
    ) == before and not base.vae.use_tiling


def test_chunks_of_a_card_depend_on_its_size_and_those_of_a_cpu_do_not() -> None:
    base = tiny_base("sd15")
    assert default_config(base, width_px=512, height_px=512).batch_size == 8
    card = on_card(base, 16 * 10**9)
    assert default_config(base, width_px=512, height_px=512).batch_size == 16
    card.leave(base.unet)
    assert default_config(base, width_px=512, height_px=512).batch_size == 16, "what is free does not matter"
    assert default_config(base, width_px=1024, height_px=1024).batch_size == 4
