"""Encoded images and captions, made once and shared by all trials: in memory, and on disk by content.

Owns what a cached tensor's key is made of, the files that hold them, and the order of encoding.  A key covers
everything that decides the result – image bytes, sizes, base, number type – so nothing can be stale: an
edited image or another resolution gives another key. A damaged file is silently encoded again.

Shapes: B batch, C latent channels, H W pixels, h w latent sides, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.bases import WINDOW_TOKENS, Base, Sizes, TextStates
from trainer.compute import holds_fp8
from trainer.config import TrainConfig
from trainer.data import preflight
from trainer.data.augment import is_drawn_anew
from trainer.data.buckets import Bucket, Fit
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import (
    MIRRORED,
    Drawn,
    assign_buckets,
    caption_variants,
    drawn_for,
    fit_of,
    load_mask,
    load_pixels,
    sizes_for,
    view_for,
    views,
)
from trainer.data.store import Shelf, Store, Tensors
from trainer.errors import DataError, MachineError, OutOfMemory
from trainer.oom import memory_named
from trainer.text import clean_text

FORMAT = 1  # raised when pixels or encoding change, so that old files are not found


class View(NamedTuple):
    """An image as it is trained one time: its unscaled latent (C, h, w), what SDXL is told, and its mask (h, w)."""

    latent: Tensor
    sizes: Sizes
    mask: Tensor | None


@dataclass
class Prepared:
    """A dataset ready to train on.  Tensors are fp32 on CPU; a caption's states have the encoders' number type.

    ``latents`` (C, h, w) are unscaled VAE samples by view (``view_for``: Item.key, or that of the mirrored
    image), ``sizes`` likewise; images that random_crop or color_aug change each time have none.  ``masks`` (h, w)
    are weights of the loss, 0 to 1, for views that have one.  The counters say what this call had to encode.
    """

    dataset: Dataset
    buckets: dict[str, Bucket]
    latents: dict[str, Tensor]
    sizes: dict[str, Sizes]
    states: dict[str, TextStates] | None
    masks: dict[str, Tensor] = field(default_factory=dict)
    store: Store | None = None
    encoded_images: int = 0
    encoded_captions: int = 0

    @property
    def encodes_anew(self) -> bool:
        """Whether the VAE is needed while training: some images are others each time."""
        return any(item.key not in self.latents for item in self.dataset.items)

    def view(self, base: Base, item: Item, config: TrainConfig, epoch: int, occurrence: int) -> View:
        """An item as it is trained the ``occurrence``-th time (from 0) in an epoch: kept, or encoded anew."""
        if is_drawn_anew(item, config):
            return _encoded_anew(base, item, config, drawn_for(item, config, epoch, occurrence))
        name = view_for(item, config, epoch, occurrence)
        return View(self.latents[name], self.sizes[name], self.masks.get(name))

    def text(self, captions: Sequence[str]) -> TextStates | None:
        """The states of some captions (B, L, D), (B, P) – or None where they must be encoded in every step."""
        if self.states is None:
            return None
        return TextStates.join([self.states[caption] for caption in captions])


def prepare(
    base: Base,
    dataset: Dataset,
    config: TrainConfig,
    folder: Path | None = None,
    *,
    store: Store | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Encode what is not cached yet.  ``store`` (kept over trials) comes before ``folder`` (a store for this call).

    ``on_image(done, total)`` is called after each group of images.  Raises DataError with the name of an
    image that the VAE cannot encode even in fp32; OutOfMemory for images, where fewer at once help; and MachineError
    if memory runs out for a caption, since no setting changes what one needs.
    """
    preflight.check(base, config)
    store = store or Store(folder)
    latents = store.shelf(lambda tensors: tensors["latent"])
    prepared = Prepared(dataset, assign_buckets(dataset.items, config), latents, {}, None, store=store)
    _prepare_images(prepared, base, config, store, on_image or (lambda done, total: None))
    _prepare_masks(prepared, base, config)
    captions = None if config.trains_text_encoder else caption_variants(dataset.items, config)
    if captions is not None:
        try:
            with memory_named(
                f"out of memory while the text encoder of {base.name} encodes captions, one at a time"
            ):
                _prepare_captions(prepared, base, config, store, captions)
        except OutOfMemory as error:
            raise MachineError(error.message, error.hint) from None
    return prepared


# Images


def _prepare_images(
    prepared: Prepared, base: Base, config: TrainConfig, store: Store, on_image: Callable[[int, int], None]
) -> None:
    items = [item for item in prepared.dataset.items if not is_drawn_anew(item, config)]
    upright = _groups(items, prepared.buckets, config.vae_batch_size)
    turned = [item for item in items if len(views(item, config)) > 1]
    jobs = [(group, False) for group in upright]
    jobs += [(group, True) for group in _groups(turned, prepared.buckets, config.vae_batch_size)]
    total = sum(len(group) for group, _ in jobs)
    for group, mirrored in jobs:
        _prepare_group(prepared, base, config, store, group, mirrored)
        on_image(len(prepared.latents), total)


def _prepare_group(
    prepared: Prepared, base: Base, config: TrainConfig, store: Store, group: Sequence[Item], mirrored: bool
) -> None:
    kind, latents_kept = _kind(base, config), prepared.latents
    assert isinstance(latents_kept, Shelf)
    missing: dict[str, str] = {}
    for item in group:
        fit = fit_of(item, config)
        assert fit is not None, "assign_buckets refuses images that fill no bucket"
        view = _view(item, mirrored)
        prepared.sizes[view] = sizes_for(item, fit, mirrored=mirrored)
        method = item.setting(config, "resize_interpolation")
        key = latent_key(item, fit, base, kind, mirrored=mirrored, method=method)
        cached = store.get(key, partial(_is_latent, bucket=fit.bucket, cell_px=base.latent_factor_px))
        if cached is None:
            missing[view] = key
        else:
            latents_kept.add(view, key, cached)
    if missing:
        # The whole group, always: the last bits of a latent may depend on the rest of the VAE's batch.
        pixels_BCHW = torch.stack([load_pixels(item, config)[0] for item in group])
        seeds = [int(item.sha256[:15], 16) for item in group]
        with memory_named(
            f"out of memory while encoding images at vae_batch_size {config.vae_batch_size}",
            "lower vae_batch_size or resolution",
        ):
            latents = _encode(base, pixels_BCHW.flip(-1) if mirrored else pixels_BCHW, group, kind, seeds)
        prepared.encoded_images += len(group)
        for item, latent in zip(group, latents, strict=True):
            if (view := _view(item, mirrored)) in missing:
                kept = (
                    config.cache_latents_to_disk and not base.encoded_in_tiles
                )  # another card may need none
                store.put(missing[view], {"latent": latent}, on_disk=kept)
                latents_kept.add(view, missing[view], {"latent": latent})


def _view(item: Item, mirrored: bool) -> str:
    return item.key + MIRRORED if mirrored else item.key


def _prepare_masks(prepared: Prepared, base: Base, config: TrainConfig) -> None:
    """Weights of the loss at the size of the latents: the mean over each latent's pixels (as sd-scripts)."""
    for item in prepared.dataset.items:
        mask_HW = None if is_drawn_anew(item, config) else load_mask(item, config)
        if mask_HW is None:
            continue
        small_hw = _small_mask(mask_HW, base)
        for view in views(item, config):
            prepared.masks[view] = small_hw.flip(-1) if view.endswith(MIRRORED) else small_hw


def _small_mask(mask_HW: Tensor, base: Base) -> Tensor:
    """A mask at the size of the latents."""
    return torch.nn.functional.avg_pool2d(mask_HW[None], base.latent_factor_px)[0]


def _encoded_anew(base: Base, item: Item, config: TrainConfig, drawn: Drawn) -> View:
    """One image as it was drawn. Images are encoded one by one: a split batch then has the same latents."""
    pixels_3HW, sizes = load_pixels(item, config, drawn)
    mask_HW = load_mask(item, config, drawn)
    mask_hw = None if mask_HW is None else _small_mask(mask_HW, base)
    (latent,) = _encode(base, pixels_3HW[None], [item], _kind(base, config), [drawn.seed])
    return View(latent, sizes, mask_hw)


def _kind(base: Base, config: TrainConfig) -> torch.dtype:
    return torch.float32 if config.no_half_vae else base.vae.dtype


def latent_key(
    item: Item, fit: Fit, base: Base, kind: torch.dtype, *, mirrored: bool = False, method: str | None = None
) -> str:
    """Everything that decides a latent. ``method`` is resize_interpolation."""
    size = [fit.resized_width_px, fit.resized_height_px, fit.bucket.width_px, fit.bucket.height_px]
    crop = "centre mirrored" if mirrored else "centre"
    return _key("latent", item.sha256, size, crop, base.identity, str(kind), *([method] if method else []))


def _groups(items: Sequence[Item], buckets: Mapping[str, Bucket], size: int) -> list[list[Item]]:
    """Distinct images of one bucket, ``size`` at a time."""
    members: dict[Bucket, dict[str, Item]] = {}
    for item in items:
        members.setdefault(buckets[item.key], {})[item.key] = item
    groups = []
    for bucket in sorted(members):
        distinct = list(members[bucket].values())
        groups += [distinct[start : start + size] for start in range(0, len(distinct), size)]
    return groups


def _is_latent(tensors: Tensors, bucket: Bucket, cell_px: int) -> bool:
    latent = tensors.get("latent")
    return (
        latent is not None
        and latent.dtype == torch.float32
        and latent.ndim == 3
        and tuple(latent.shape[1:]) == (bucket.height_px // cell_px, bucket.width_px // cell_px)
        and bool(latent.isfinite().all())
    )


def _encode(
    base: Base, pixels_BCHW: Tensor, group: Sequence[Item], kind: torch.dtype, seeds: Sequence[int]
) -> list[Tensor]:
    """Latents of a group.  One that is not finite in half precision – SDXL's VAE is known for it –
    is done in fp32."""
    latents = _vae_sample(base, pixels_BCHW, seeds, kind)
    broken = [row for row, latent in enumerate(latents) if not latent.isfinite().all()]
    if broken and kind != torch.float32:
        again = _vae_sample(base, pixels_BCHW[broken], [seeds[row] for row in broken], torch.float32)
        for row, latent in zip(broken, again, strict=True):
            latents[row] = latent
        if all(latent.isfinite().all() for latent in again):
            base.say_once(
                f"the VAE of {base.name} overflows in half precision: such images are encoded again in fp32"
            )
    for item, latent in zip(group, latents, strict=True):
        if not latent.isfinite().all():
            raise DataError(
                f"the base's VAE gives no finite latent for {clean_text(str(item.path))}",
                "check the image; if all images fail, the base file is damaged",
            )
    return latents


def _vae_sample(base: Base, pixels_BCHW: Tensor, seeds: Sequence[int], kind: torch.dtype) -> list[Tensor]:
    """One unscaled VAE sample per image, fp32 on CPU, each from a generator of its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with base.vae_as(kind):
        latents_BCHW = base.encode_images(pixels_BCHW.to(base.device), generators)
    return [
        latent.clone(memory_format=torch.contiguous_format)
        for latent in latents_BCHW.to("cpu", torch.float32)
    ]


# Captions


def _prepare_captions(
    prepared: Prepared, base: Base, config: TrainConfig, store: Store, captions: Sequence[str]
) -> None:
    shelf = prepared.states = store.shelf(
        lambda tensors: TextStates(tensors["hidden"], tensors.get("pooled"))
    )
    encoder = base.text_encoders[0]
    longer: list[Any] = (
        [config.max_token_length] if config.max_token_length not in (None, WINDOW_TOKENS) else []
    )
    longer += ["weighted"] if config.weighted_captions else []
    for caption in captions:
        key = _key(
            "text",
            caption,
            base.identity,
            config.clip_skip,
            "float8" if holds_fp8(encoder) else str(next(encoder.parameters()).dtype),
            *longer,
        )
        tensors = store.get(key, _is_text)
        if tensors is None:
            with torch.no_grad():
                states = base.encode_captions([caption], config)
            tensors = {"hidden": states.hidden_BLD.cpu().contiguous()}
            if states.pooled_BP is not None:
                tensors["pooled"] = states.pooled_BP.cpu().contiguous()
            if not _is_finite(tensors):
                raise DataError(
                    f"the base's text encoder gives no finite states for {clean_text(caption)[:80]!r}",
                    "if all captions fail, the base file is damaged; else mixed_precision = bf16 or no helps",
                )
            store.put(key, tensors)
            prepared.encoded_captions += 1
        shelf.add(caption, key, tensors)


def _is_text(tensors: Tensors) -> bool:
    hidden = tensors.get("hidden")
    return hidden is not None and hidden.ndim == 3 and hidden.shape[0] == 1 and _is_finite(tensors)


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _key(*parts: Any) -> str:
    return json.dumps([FORMAT, *parts])
