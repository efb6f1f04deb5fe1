"""Mirrored views and masks: made once, beside the image as it is, and the loop finds them by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.tiny import tiny_base
from trainer.config import TrainConfig
from trainer.data import cache
from trainer.data.dataset import read_dataset
from trainer.data.epoch import MIRRORED, view_for

CONFIG = TrainConfig(resolution=64, enable_bucket=False)


def picture(folder: Path) -> Path:
    """One image, opaque on its left half only."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[:, :32, 3] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "a.txt").write_text("z")
    return folder


def test_flip_aug_trains_both_views_and_each_is_encoded_once(tmp_path: Path) -> None:
    config = CONFIG.with_values({"flip_aug": True})
    data = read_dataset(picture(tmp_path / "images"), config)
    base, item = tiny_base("sd15"), data.items[0]
    prepared = cache.prepare(base, data, config, tmp_path / "cache")
    assert prepared.latents.keys() == prepared.sizes.keys() == {item.sha256, item.sha256 + MIRRORED}
    assert not torch.equal(prepared.latents[item.sha256], prepared.latents[item.sha256 + MIRRORED])
    assert {view_for(item, config, epoch, 0) for epoch in range(20)} == prepared.latents.keys()
    assert cache.prepare(base, data, config, tmp_path / "cache").encoded_images == 0
    assert {view_for(item, CONFIG, epoch, 0) for epoch in range(20)} == {item.sha256}


def test_what_is_transparent_or_masked_black_weighs_nothing(tmp_path: Path) -> None:
    config = CONFIG.with_values({"alpha_mask": True, "flip_aug": True})
    data = read_dataset(picture(tmp_path / "images"), config)
    base, name = tiny_base("sd15"), data.items[0].sha256
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    found = cache.prepare(base, data, config).masks
    assert torch.equal(found[name], left) and torch.equal(found[name + MIRRORED], left.flip(-1))

    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray((left.numpy() * 255).astype(np.uint8)).resize((64, 64), 0).save(masks / "a.png")
    config = CONFIG.with_values({"masked_loss": True, "conditioning_data_dir": str(masks)})
    masked = read_dataset(tmp_path / "images", config)
    assert torch.equal(cache.prepare(base, masked, config).masks[name], left)
    assert masked.content_hash != read_dataset(tmp_path / "images", CONFIG).content_hash
