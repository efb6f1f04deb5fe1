"""random_crop and color_aug: another image each time, encoded anew, and the same again after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.bases.base import Base
from trainer.config import TrainConfig
from trainer.data import Dataset, cache, read_dataset
from trainer.data.epoch import drawn_for, load_mask, load_pixels
from trainer.data.store import digest
from trainer.errors import Interrupted
from trainer.events import Step
from trainer.loop import Conduct
from trainer.loop.loop import train

CONFIG = tiny_config(random_crop=True, color_aug=True, flip_aug=True, enable_bucket=True, resolution=88)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images that lose a part to the crop; every pixel tells its place."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        rows, columns = np.mgrid[0:88, 0:80].astype(np.uint8)
        pixels = np.stack([rows, columns, np.full_like(rows, 60 * number), rows], axis=2)
        pixels[..., 3] = np.where(columns < 40, 255, 0)
        Image.fromarray(pixels[..., :3] if number else pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("zed")
    return folder


def test_nothing_is_cached_and_every_view_is_a_function_of_seed_epoch_and_image(
    images: Path, tmp_path: Path
) -> None:
    base, data = tiny_base("sd15"), read_dataset(images, CONFIG)
    prepared = cache.prepare(base, data, CONFIG, tmp_path / "cache")
    assert prepared.encodes_anew and not prepared.latents and not prepared.sizes
    assert prepared.encoded_images == 0
    item = data.items[1]
    seen = [prepared.view(base, item, CONFIG, epoch, turn) for epoch in range(6) for turn in range(2)]
    assert len({view.latent.numpy().tobytes() for view in seen}) == 12, "a sample of its own each time"
    again = cache.prepare(base, data, CONFIG).view(base, item, CONFIG, 3, 1)
    assert torch.equal(again.latent, seen[7].latent) and again.sizes == seen[7].sizes
    other = prepared.view(base, item, CONFIG.with_values({"seed": 7}), 3, 1)
    assert not torch.equal(other.latent, seen[7].latent)


def test_the_crop_is_where_sdxl_is_told_and_where_the_mask_is(images: Path) -> None:
    config = CONFIG.with_values({"color_aug": False, "alpha_mask": True})
    item = read_dataset(images, config).items[0]
    places = set()
    for epoch in range(40):
        drawn = drawn_for(item, config, epoch, 0)
        pixels, sizes = load_pixels(item, config, drawn)
        mask = load_mask(item, config, drawn)
        assert mask is not None and pixels.shape[1:] == mask.shape == (64, 64)
        opaque = mask == 1
        # left of column 40 the image is opaque; elsewhere it is white
        shown = ((pixels + 1) * 127.5).round()
        assert (shown[:, ~opaque] == 255).all()
        top, left = sizes.crop_top_left
        columns, rows = shown[1][opaque], shown[0][opaque]
        assert rows.min() == top
        assert columns.numel() == 0 or columns.max() == 39
        if drawn.is_mirrored:
            left = drawn.fit.resized_width_px - 64 - left
        assert int(opaque.sum(dim=1)[0]) == 40 - left
        places.add((top, left))
    assert len(places) > 20


def test_without_buckets_a_large_image_keeps_its_scale(images: Path) -> None:
    config = tiny_config(random_crop=True)
    item = read_dataset(images, config).items[1]
    pixels, sizes = load_pixels(item, config, drawn_for(item, config, 0, 0))
    shown = ((pixels + 1) * 127.5).round().int()
    top, left = sizes.crop_top_left
    assert shown[0, :, 0].tolist() == list(range(top, top + 64))
    assert shown[1, 0].tolist() == list(range(left, left + 64))
    small = replace(item, width_px=60)
    assert drawn_for(small, config, 0, 0).fit.resized_width_px == 64


def one_run(base: Base, data: Dataset, config: TrainConfig, **how: object) -> tuple[list[float], str]:
    adapter = inject(base, config)
    losses = []
    try:
        prepared = cache.prepare(base, data, config)
        for event in train(config, base, adapter, prepared, Conduct(**how)):  # type: ignore[arg-type]
            losses += [event.loss] if isinstance(event, Step) else []
        return losses, digest({str(n): w.detach() for n, w in enumerate(adapter.trainable())})
    except Interrupted:
        return losses, ""
    finally:
        adapter.remove()


def test_a_stopped_run_goes_on_bitwise_and_a_split_batch_has_the_same_images(
    images: Path, tmp_path: Path
) -> None:
    base = tiny_base("sdxl")
    config = CONFIG.with_values({"max_train_epochs": 3, "network_train_unet_only": True})
    data = read_dataset(images, config)
    whole, expected = one_run(base, data, config)
    assert len(whole) == 6 and len(set(whole)) == 6
    calls = iter([False, False, False, True])
    first, _ = one_run(base, data, config, checkpoints=tmp_path / "c", should_stop=lambda: next(calls))
    rest, found = one_run(base, data, config, checkpoints=tmp_path / "c")
    assert 0 < len(first) < 6 and first + rest == whole and found == expected
    split, _ = one_run(base, data, config.with_values({"micro_batch_size": 1}))
    assert split == pytest.approx(whole, rel=1e-4)
    assert one_run(base, data, config.with_values({"random_crop": False, "color_aug": False}))[0] != whole


def test_a_folder_may_crop_at_random_alone(images: Path) -> None:
    base, plain = tiny_base("sd15"), tiny_config()
    data = read_dataset(images, plain)
    mixed = replace(data, items=(replace(data.items[0], own=(("random_crop", True),)), *data.items[1:]))
    prepared = cache.prepare(base, mixed, plain)
    assert prepared.latents.keys() == {item.sha256 for item in data.items[1:]} and prepared.encodes_anew
    assert not cache.prepare(base, data, plain).encodes_anew
