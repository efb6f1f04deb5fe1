"""The cache: every image and caption is encoded once over all trials; nothing stale or damaged is used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_base
from trainer.bases.base import Base
from trainer.config import TrainConfig
from trainer.data import cache
from trainer.data.buckets import Bucket, Fit
from trainer.data.dataset import Dataset, read_dataset
from trainer.data.epoch import load_pixels
from trainer.errors import DataError, MachineError, OutOfMemory

CONFIG = TrainConfig(
    resolution=64, bucket_reso_steps=8, network_train_unet_only=True, vae_batch_size=2, optimizer_type="AdamW"
)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base("sd15")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(5):
        pixels = draw.integers(0, 256, (64, 64 + 8 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a zed, number {number // 2}")
    return folder


def same(first: cache.Prepared, second: cache.Prepared) -> bool:
    return first.latents.keys() == second.latents.keys() and all(
        torch.equal(first.latents[name], second.latents[name]) for name in first.latents
    )


def counts(prepared: cache.Prepared) -> tuple[int, int]:
    return prepared.encoded_images, prepared.encoded_captions


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_over_trials_every_image_and_caption_is_encoded_once(base: Base, images: Path) -> None:
    store = cache.Store()
    data = read_dataset(images, CONFIG)
    first = cache.prepare(base, data, CONFIG, store=store)
    assert counts(first) == (5, 3)
    trial = CONFIG.with_values({"learning_rate": 3e-4, "network_dim": 8, "train_batch_size": 1, "seed": 9})
    second = cache.prepare(base, data, trial, store=store)
    assert counts(second) == (0, 0) and same(first, second)


def test_over_processes_they_come_from_the_disk_bit_by_bit(base: Base, images: Path, tmp_path: Path) -> None:
    data = read_dataset(images, CONFIG)
    first = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert len(files_in(tmp_path / "cache")) == 8
    second = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert counts(second) == (0, 0) and same(first, second)
    captions = [item.caption for item in data.items]
    states, again = first.text(captions), second.text(captions)
    assert states is not None and again is not None
    assert torch.equal(states.hidden_BLD, again.hidden_BLD) and states.hidden_BLD.shape[0] == 5


def test_a_latent_is_the_vaes_own_sample_unscaled(base: Base, images: Path) -> None:
    data = read_dataset(images, CONFIG)
    prepared = cache.prepare(base, data, CONFIG)
    item = data.items[0]
    pixels, sizes = load_pixels(item, CONFIG)
    generator = torch.Generator().manual_seed(int(item.sha256[:15], 16))
    expected = base.encode_images(pixels[None], [generator])[0]
    latent = prepared.latents[item.sha256]
    assert torch.allclose(latent, expected, atol=1e-5)
    assert latent.dtype == torch.float32 and latent.shape == (4, 8, 8) and not latent.requires_grad
    assert prepared.sizes[item.sha256] == sizes


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cached_text_is_what_the_encoders_say(images: Path, family: str, tmp_path: Path) -> None:
    model = tiny_base(family)
    data = read_dataset(images, CONFIG)
    cache.prepare(model, data, CONFIG, tmp_path / "cache")
    states = cache.prepare(model, data, CONFIG, tmp_path / "cache").text(
        ["a zed, number 1", "a zed, number 0"]
    )
    assert states is not None
    for row, caption in enumerate(["a zed, number 1", "a zed, number 0"]):
        expected = model.encode_text([caption])
        assert torch.equal(states.hidden_BLD[row], expected.hidden_BLD[0])
        if family == "sdxl":
            assert states.pooled_BP is not None and expected.pooled_BP is not None
            assert torch.equal(states.pooled_BP[row], expected.pooled_BP[0])
        else:
            assert states.pooled_BP is None


@pytest.mark.parametrize("values", [{"shuffle_caption": True}, {"network_train_unet_only": False}])
def test_text_that_changes_every_step_is_not_cached(base: Base, images: Path, values: dict[str, Any]) -> None:
    config = CONFIG.with_values(values)
    prepared = cache.prepare(base, read_dataset(images, config), config)
    assert prepared.text(["a zed, number 0"]) is None and prepared.encoded_captions == 0


def edit_image(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")


def edit_caption(folder: Path) -> None:
    (folder / "0.txt").write_text("edited")


@pytest.mark.parametrize(("edit", "encoded"), [(edit_image, (2, 0)), (edit_caption, (0, 1))])
def test_what_was_edited_is_encoded_anew_and_only_that(
    base: Base, images: Path, tmp_path: Path, edit: Callable[[Path], None], encoded: tuple[int, int]
) -> None:
    """An image brings the other one of its VAE batch along; the batch is always the same."""
    first = cache.prepare(base, read_dataset(images, CONFIG), CONFIG, tmp_path / "cache")
    edit(images)
    second = cache.prepare(base, read_dataset(images, CONFIG), CONFIG, tmp_path / "cache")
    assert counts(second) == encoded
    kept = first.latents.keys() & second.latents.keys()
    assert all(torch.equal(first.latents[name], second.latents[name]) for name in kept)


def test_other_settings_that_change_a_latent_are_another_key(
    base: Base, images: Path, tmp_path: Path
) -> None:
    data = read_dataset(images, CONFIG)
    cache.prepare(base, data, CONFIG, tmp_path / "cache")
    for values in (
        {"resolution": 56},
        {"enable_bucket": False},  # the same bucket for square images, but not the same crop for wide ones
        {"bucket_no_upscale": False, "min_bucket_reso": 32},
        {"resolution": 56, "resize_interpolation": "nearest"},
    ):
        config = CONFIG.with_values(values)
        fresh = cache.prepare(base, data, config)
        assert same(cache.prepare(base, data, config, tmp_path / "cache"), fresh)
    skipped = CONFIG.with_values({"clip_skip": 2})
    assert cache.prepare(base, data, skipped, tmp_path / "cache").encoded_captions == 3


def test_the_same_bucket_reached_by_another_resizing_is_another_key(base: Base, images: Path) -> None:
    item = read_dataset(images, CONFIG).items[0]
    fits = [Fit(Bucket(64, 64), width, height) for width, height in ((64, 64), (70, 64), (64, 70))]
    fits.append(Fit(Bucket(64, 56), 64, 64))
    assert len({cache.latent_key(item, fit, base, torch.float32) for fit in fits}) == 4
    assert len({cache.latent_key(item, fits[0], base, kind) for kind in (torch.float32, torch.float16)}) == 2


def test_folders_may_be_resized_in_their_own_ways(base: Base, images: Path) -> None:
    """resize_interpolation of a subset, and of the run for the rest: same image, same bucket, other latents."""
    config = CONFIG.with_values({"resolution": 56})
    data = read_dataset(images, config)
    item = data.items[0]
    own = replace(item, own=(("resize_interpolation", "nearest"),))
    both = cache.prepare(base, replace(data, items=(item, own)), config)
    assert len(both.latents) == 2 and both.encoded_images == 2
    latents = [both.view(base, each, config, 0, 0).latent for each in (item, own)]
    assert not torch.equal(*latents)
    nearest = config.with_values({"resize_interpolation": "nearest"})
    alone = cache.prepare(base, replace(data, items=(item,)), nearest).view(base, item, nearest, 0, 0).latent
    assert torch.allclose(alone, latents[1], atol=1e-5)


def test_another_base_shares_nothing(base: Base, images: Path, tmp_path: Path) -> None:
    data = read_dataset(images, CONFIG)
    cache.prepare(base, data, CONFIG, tmp_path / "cache")
    other = cache.prepare(tiny_base("sd15", seed=1), data, CONFIG, tmp_path / "cache")
    assert counts(other) == (5, 3)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 0x10
    path.write_bytes(data)


def swap_with_another(path: Path) -> None:
    size = path.stat().st_size  # a latent of the same shape: only the key inside tells them apart
    other = next(p for p in path.parent.iterdir() if p != path and p.stat().st_size == size)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        swap_with_another,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_file_is_encoded_anew_without_a_word(
    base: Base, images: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    data = read_dataset(images, CONFIG)
    first = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    item = data.items[0]
    fit = cache.fit_of(item, CONFIG)
    assert fit is not None
    key = cache.latent_key(item, fit, base, torch.float32)
    path = cache.Store(tmp_path / "cache")._path(key)
    damage(path)
    if path.is_dir():
        with pytest.raises(MachineError, match="directory"):
            cache.prepare(base, data, CONFIG, tmp_path / "cache")
        return
    second = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert second.encoded_images == 2 and same(first, second), "the whole VAE batch, bitwise as before"
    assert cache.prepare(base, data, CONFIG, tmp_path / "cache").encoded_images == 0


def test_a_file_with_numbers_that_are_not_finite_is_not_used(
    base: Base, images: Path, tmp_path: Path
) -> None:
    data = read_dataset(images, CONFIG)
    first = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    store = cache.Store(tmp_path / "cache")
    item = data.items[0]
    fit = cache.fit_of(item, CONFIG)
    assert fit is not None
    store.put(cache.latent_key(item, fit, base, torch.float32), {"latent": torch.full((4, 8, 8), torch.nan)})
    assert same(cache.prepare(base, data, CONFIG, tmp_path / "cache"), first)


def test_without_a_disk_cache_nothing_of_images_is_written(base: Base, images: Path, tmp_path: Path) -> None:
    config = CONFIG.with_values({"cache_latents_to_disk": False})
    cache.prepare(base, read_dataset(images, config), config, tmp_path / "cache")
    assert len(files_in(tmp_path / "cache")) == 3


def test_an_interrupted_run_keeps_what_it_had_encoded(base: Base, images: Path, tmp_path: Path) -> None:
    data = read_dataset(images, CONFIG)
    whole = cache.prepare(base, data, CONFIG)

    def stop(done: int, total: int) -> None:
        assert total == 5
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prepare(base, data, CONFIG, tmp_path / "cache", on_image=stop)
    rest = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert rest.encoded_images == 3 and same(rest, whole)


def test_copies_of_an_image_are_encoded_once(base: Base, images: Path) -> None:
    for ending in ("png", "txt"):
        (images / f"copy.{ending}").write_bytes((images / f"0.{ending}").read_bytes())
    prepared = cache.prepare(base, read_dataset(images, CONFIG), CONFIG)
    assert prepared.encoded_images == 5 and len(prepared.latents) == 5


def test_a_full_disk_is_a_machine_error(
    base: Base, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = read_dataset(images, CONFIG)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MachineError, match="disk full"):
        cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


def test_a_file_in_the_place_of_the_folder_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(MachineError, match="cache"):
        cache.Store(tmp_path / "cache")


# A VAE that overflows


class Overflowing:
    """encode_images of a base whose VAE gives NaN for some images, in some number types."""

    def __init__(self, base: Base, images: set[int], kinds: set[torch.dtype]) -> None:
        self.real = base.encode_images
        self.base, self.images, self.kinds = base, images, kinds
        self.seen: list[tuple[torch.dtype, int]] = []

    def __call__(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        self.seen.append((self.base.vae.dtype, len(pixels)))
        latents = self.real(pixels, generators).clone()
        for row, generator in enumerate(generators):
            if generator.initial_seed() in self.images and self.base.vae.dtype in self.kinds:
                latents[row, 0, 0, 0] = torch.nan
        return latents


def overflowing(
    monkeypatch: pytest.MonkeyPatch, data: Dataset, name: str, kinds: set[torch.dtype]
) -> tuple[Base, Overflowing]:
    model = tiny_base("sd15")
    torch.nn.Module.to(model.vae, torch.float16)
    seeds = {int(item.sha256[:15], 16) for item in data.items if item.path.name == name}
    encode = Overflowing(model, seeds, kinds)
    monkeypatch.setattr(model, "encode_images", encode)
    return model, encode


def test_an_image_that_overflows_half_precision_is_encoded_in_fp32(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_dataset(images, CONFIG)
    model, encode = overflowing(monkeypatch, data, "2.png", {torch.float16})
    prepared = cache.prepare(model, data, CONFIG)
    assert all(latent.isfinite().all() for latent in prepared.latents.values())
    assert encode.seen.count((torch.float32, 1)) == 1
    assert model.vae.dtype == torch.float16, "the VAE is as it was"


def test_an_image_that_overflows_fp32_too_is_named(
    images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = read_dataset(images, CONFIG)
    model, _ = overflowing(monkeypatch, data, "2.png", {torch.float16, torch.float32})
    with pytest.raises(DataError, match=r"no finite latent for .*2\.png"):
        cache.prepare(model, data, CONFIG, tmp_path / "cache")
    assert model.vae.dtype == torch.float16


def test_no_half_vae_never_encodes_in_half_precision(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.with_values({"no_half_vae": True})
    data = read_dataset(images, config)
    model, encode = overflowing(monkeypatch, data, "2.png", {torch.float16})
    cache.prepare(model, data, config)
    assert {kind for kind, _ in encode.seen} == {torch.float32}


def test_out_of_memory_while_encoding_names_the_setting(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    model = tiny_base("sd15")
    monkeypatch.setattr(model, "encode_images", exhausted)
    with pytest.raises(OutOfMemory, match="vae_batch_size 2"):
        cache.prepare(model, read_dataset(images, CONFIG), CONFIG)


def test_out_of_memory_while_encoding_captions_is_named(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    model = tiny_base("sd15")
    monkeypatch.setattr(model, "encode_text", exhausted)
    with pytest.raises(MachineError, match=r"while the text encoder of .* encodes captions") as caught:
        cache.prepare(model, read_dataset(images, CONFIG), CONFIG)
    assert "close other programs" in caught.value.hint and "gradient_checkpointing" not in caught.value.hint


def test_text_states_that_are_not_finite_are_neither_kept_nor_used(images: Path, tmp_path: Path) -> None:
    model, data = tiny_base("sd15"), read_dataset(images, CONFIG)
    good = cache.prepare(model, data, CONFIG, tmp_path / "cache")
    store = cache.Store(tmp_path / "cache")
    assert good.states is not None
    spoilt = {"hidden": torch.full_like(next(iter(good.states.values())).hidden_BLD, torch.nan)}
    assert store.get("none", cache._is_text) is None
    store.put("none", spoilt)
    assert store.get("none", cache._is_text) is None
    with torch.no_grad():
        next(model.text_encoders[0].parameters()).fill_(torch.inf)
    with pytest.raises(DataError, match="text encoder gives no finite states for 'a zed, number"):
        cache.prepare(model, data, CONFIG)


def test_an_image_too_small_is_refused_before_anything_is_encoded(base: Base, images: Path) -> None:
    data = read_dataset(images, CONFIG)
    small = replace(data.items[0], width_px=4, height_px=4)
    with pytest.raises(DataError, match="fill no bucket"):
        cache.prepare(base, replace(data, items=(small, *data.items[1:])), CONFIG)
