"""Epoch: what training sees of a dataset – buckets, batches in order, pixels, views and captions.

Owns what depends on (seed, epoch, image, occurrence).  Reading a dataset is ``dataset``'s.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.data.augment import Colour, drawn_colour, drawn_crop
from trainer.data.buckets import Bucket, BucketRules, Fit
from trainer.data.captions import START, CaptionRules, Moment, listed, shown
from trainer.data.dataset import Dataset, Item
from trainer.data.images import fit_pixels, fit_values, read_picture
from trainer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.bases import Sizes

MIRRORED = ":mirrored"  # added to the key of an image in the name of its mirrored view


@dataclass(frozen=True)
class Batch:
    """Images of one bucket that are trained together: indices into ``Dataset.items``, repeats included."""

    items: tuple[int, ...]
    bucket: Bucket


def assign_buckets(items: Iterable[Item], config: TrainConfig) -> dict[str, Bucket]:
    """Item.key → bucket.  DataError names images too small for any."""
    fits = {item: fit_of(item, config) for item in items}
    small = [item for item, fit in fits.items() if fit is None]
    if small:
        first = small[0]
        rules = BucketRules.of(config, first.own)
        raise DataError(
            f"{len(small)} images fill no bucket of {rules.step_px} px steps: "
            f"{listed([item.path for item in small])} "
            f"({first.width_px}×{first.height_px} px at resolution {rules.size})",
            "lower bucket_reso_steps, set bucket_no_upscale = false, or use larger images",
        )
    return {item.key: fit.bucket for item, fit in fits.items() if fit is not None}


def fit_of(item: Item, config: TrainConfig) -> Fit | None:
    """How an item is trained, by the rules of its dataset; None if it fills no bucket.

    With random_crop and without buckets, an image that is large enough is not resized (as in sd-scripts)."""
    rules = BucketRules.of(config, item.own)
    whole = Fit(Bucket(rules.width_px, rules.height_px), item.width_px, item.height_px)
    if not rules.enabled and item.setting(config, "random_crop") and whole.covers:
        return whole
    return rules.fit(item.width_px, item.height_px)


@dataclass(frozen=True)
class Drawn:
    """How an item is trained one time, where that is drawn at random: its crop, side and colours."""

    fit: Fit
    is_mirrored: bool
    colour: Colour
    seed: int  # of the VAE's sample


def drawn_for(item: Item, config: TrainConfig, epoch: int, occurrence: int) -> Drawn:
    """What is drawn for an item the ``occurrence``-th time (from 0) in an epoch."""
    fit = fit_of(item, config)
    assert fit is not None, "assign_buckets refuses images that fill no bucket"
    draw = _generator("view", config.seed, epoch, item.sha256, occurrence)
    fit = drawn_crop(item, config, fit, draw)
    colour = drawn_colour(item, config, draw)
    is_mirrored = view_for(item, config, epoch, occurrence).endswith(MIRRORED)
    return Drawn(fit, is_mirrored, colour, draw.getrandbits(60))


def load_pixels(item: Item, config: TrainConfig, drawn: Drawn | None = None) -> tuple[Tensor, Sizes]:
    """Pixels (3, H, W) of an item in its bucket, float32 in [-1, 1], and what SDXL is told about them: around the
    centre, or as ``drawn``."""
    import torch  # here, so that listing a dataset stays instant

    picture = read_picture(item.path)
    if picture.sha256 != item.sha256:
        raise DataError(f"{shown(item.path)} was changed since it was read", "start again")
    fit = drawn.fit if drawn else fit_of(item, config)
    assert fit is not None, "assign_buckets refuses images that fill no bucket"
    fitted = fit_pixels(picture, fit, item.setting(config, "resize_interpolation"))
    pixels_HW3 = torch.from_numpy((drawn.colour.apply(fitted) if drawn else fitted).copy())
    pixels_3HW = pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1
    is_mirrored = drawn is not None and drawn.is_mirrored
    return pixels_3HW.flip(-1) if is_mirrored else pixels_3HW, sizes_for(item, fit, mirrored=is_mirrored)


def load_mask(item: Item, config: TrainConfig, drawn: Drawn | None = None) -> Tensor | None:
    """The loss weights (H, W) of an item in its bucket, 0 to 1: its mask's red channel (as sd-scripts), or
    how opaque the image is.  None: everything counts."""
    import torch

    if item.mask is not None:
        picture = read_picture(item.mask)
        if picture.size_px != (item.width_px, item.height_px):
            raise DataError(
                f"the mask {shown(item.mask)} is not as large as {shown(item.path)}", "make them equal"
            )
        values = picture.pixels_HW3[..., 0]
    elif item.setting(config, "alpha_mask"):
        alpha = read_picture(item.path).alpha_HW
        if alpha is None:
            return None
        values = alpha
    else:
        return None
    fit = drawn.fit if drawn else fit_of(item, config)
    assert fit is not None, "assign_buckets refuses images that fill no bucket"
    method = item.setting(config, "resize_interpolation")
    mask_HW = torch.from_numpy(fit_values(values, fit, method).copy()).float() / 255
    return mask_HW.flip(-1) if drawn and drawn.is_mirrored else mask_HW


def sizes_for(item: Item, fit: Fit, *, mirrored: bool = False) -> Sizes:
    """What SDXL is told about an item.

    The crop offset is where the crop really starts, also a random one.  (sd-scripts reports the bars of a letterbox
    instead, which differ on images that lose more than a few pixels, and says nothing of a random crop.)
    """
    from trainer.bases import Sizes

    top, left = fit.crop_top_left
    if mirrored:
        left = fit.resized_width_px - fit.bucket.width_px - left
    return Sizes(
        original_hw=(item.height_px, item.width_px),
        crop_top_left=(top, left),
        target_hw=(fit.bucket.height_px, fit.bucket.width_px),
    )


def views(item: Item, config: TrainConfig) -> tuple[str, ...]:
    """The names of an item's latents: its key, and with flip_aug also that of the mirrored image."""
    return (item.key, item.key + MIRRORED) if item.setting(config, "flip_aug") else (item.key,)


def view_for(item: Item, config: TrainConfig, epoch: int, occurrence: int) -> str:
    """The view that an item is trained with the ``occurrence``-th time (from 0) in an epoch."""
    choices = views(item, config)
    if len(choices) == 1:
        return choices[0]
    return _generator("flip", config.seed, epoch, item.sha256, occurrence).choice(choices)


def epoch_batches(
    dataset: Dataset, buckets: Mapping[str, Bucket], config: TrainConfig, epoch: int
) -> list[Batch]:
    """The batches of an epoch in order: repeats duplicated, buckets and batches shuffled, partial batches kept.

    Each dataset has buckets and a batch size of its own; the batches of all are shuffled together (sd-scripts'
    DatasetGroup)."""
    members: dict[tuple[int, Bucket], list[int]] = {}
    for index, item in enumerate(dataset.items):
        members.setdefault((item.dataset, buckets[item.key]), []).extend([index] * item.repeats)
    draw = _generator("batches", config.seed, epoch)
    batches = []
    for place, bucket in sorted(members):
        order = members[place, bucket]
        size = dataset.items[order[0]].setting(config, "train_batch_size")
        draw.shuffle(order)
        batches += [Batch(tuple(order[start : start + size]), bucket) for start in range(0, len(order), size)]
    draw.shuffle(batches)
    return batches


def caption_for(item: Item, config: TrainConfig, epoch: int, occurrence: int, now: Moment = START) -> str:
    """The caption an item is trained with the ``occurrence``-th time (from 0) in an epoch (from 0)."""
    draw = _generator("caption", config.seed, epoch, item.sha256, occurrence)
    return CaptionRules.of(config, item.own).apply(item.caption, epoch, draw, now)


def caption_variants(items: Iterable[Item], config: TrainConfig) -> tuple[str, ...] | None:
    """Every caption that ``caption_for`` can return, or None where tags are drawn or there are too many."""
    texts: dict[str, None] = {}
    for item in items:
        variants = CaptionRules.of(config, item.own).variants(item.caption)
        if variants is None:
            return None
        texts |= dict.fromkeys(variants)
    return tuple(texts)


def _generator(*key: object) -> random.Random:
    """Random numbers that depend on nothing but the key."""
    return random.Random(hashlib.sha256(json.dumps(key).encode()).digest())
