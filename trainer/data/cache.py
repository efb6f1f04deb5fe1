"""Encoded images and captions, made once and shared by all trials: in memory, and on disk by content.

Owns what a cached tensor's key is made of, the files that hold them, and the order of encoding.  A key covers
everything that decides the result – image bytes, sizes, base, number type – so nothing can be stale: an
edited image or another resolution gives another key. A damaged file is silently encoded again.

Shapes: B batch, C latent channels, H W pixels, h w latent sides, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.bases import WINDOW_TOKENS, Base, Sizes, TextStates
from trainer.compute import holds_fp8
from trainer.config import TrainConfig
from trainer.data import preflight
from trainer.data.buckets import Bucket, Fit
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import (
    MIRRORED,
    assign_buckets,
    caption_variants,
    fit_of,
    load_mask,
    load_pixels,
    sizes_for,
    views,
)
from trainer.errors import DataError, OutOfMemory
from trainer.files import make_folder, sweep, write_atomic
from trainer.oom import out_of_memory_named
from trainer.text import clean_text

FORMAT = 1  # raised when pixels or encoding change, so that old files are not found
Tensors = dict[str, Tensor]


class Store:
    """Tensors by key.  What was read or made once stays in memory; with a folder it also stays on disk.

    A worker keeps one store over its trials.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        if folder is not None:
            make_folder(folder)
            sweep(folder)

    def get(self, key: str, fits: Callable[[Tensors], bool]) -> Tensors | None:
        """The tensors of a key, or None if there are none, the file is damaged, or they are not what ``fits``."""
        tensors = self._memory.get(key)
        if tensors is None and self.folder is not None:
            tensors = read_tensors(self._path(key), key)
        if tensors is None or not fits(tensors):
            return None
        self._memory[key] = tensors
        return tensors

    def put(self, key: str, tensors: Tensors, *, on_disk: bool = True) -> None:
        """Keep the tensors of a key."""
        self._memory[key] = tensors
        if on_disk and self.folder is not None:
            facts = {"key": key, "sha256": digest(tensors)}
            write_atomic(self._path(key), safetensors.torch.save(tensors, metadata=facts))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def read_tensors(path: Path, key: str) -> Tensors | None:
    """The tensors in a file if it is whole and was written for this key, else None."""
    with suppress(OSError, SafetensorError, ValueError), safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 – not a dict
        if facts.get("key") == key and facts.get("sha256") == digest(tensors):
            return tensors
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes, types and bytes; safetensors itself does not notice a flipped bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass
class Prepared:
    """A dataset ready to train on.  Tensors are fp32 on CPU; a caption's states have the encoders' number type.

    ``latents`` (C, h, w) are unscaled VAE samples by view (``view_for``: Item.key, or that of the
    mirrored image), ``sizes`` likewise.  ``masks`` (h, w) are weights of the loss, 0 to 1, for views that
    have one.  The counters say what this call had to encode.
    """

    dataset: Dataset
    buckets: dict[str, Bucket]
    latents: dict[str, Tensor]
    sizes: dict[str, Sizes]
    states: dict[str, TextStates] | None
    masks: dict[str, Tensor] = field(default_factory=dict)
    encoded_images: int = 0
    encoded_captions: int = 0

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
    image that the VAE cannot encode even in fp32, and OutOfMemory.
    """
    preflight.check(base, config)
    store = store or Store(folder)
    prepared = Prepared(dataset, assign_buckets(dataset.items, config), {}, {}, None)
    _prepare_images(prepared, base, config, store, on_image or (lambda done, total: None))
    _prepare_masks(prepared, base, config)
    captions = None if config.trains_text_encoder else caption_variants(dataset.items, config)
    if captions is not None:
        with out_of_memory_named(config):
            _prepare_captions(prepared, base, config, store, captions)
    return prepared


# Images


def _prepare_images(
    prepared: Prepared, base: Base, config: TrainConfig, store: Store, on_image: Callable[[int, int], None]
) -> None:
    items = prepared.dataset.items
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
    kind = torch.float32 if config.no_half_vae else base.vae.dtype
    missing: dict[str, str] = {}
    for item in group:
        fit = fit_of(item, config)
        assert fit is not None, "assign_buckets refuses images that fill no bucket"
        view = _view(item, mirrored)
        prepared.sizes[view] = sizes_for(item, fit, mirrored=mirrored)
        key = latent_key(item, fit, base, kind, mirrored=mirrored)
        cached = store.get(key, partial(_is_latent, bucket=fit.bucket, cell_px=base.latent_factor_px))
        if cached is None:
            missing[view] = key
        else:
            prepared.latents[view] = cached["latent"]
    if missing:
        # The whole group, always: the last bits of a latent may depend on the rest of the VAE's batch.
        latents = _encode(base, group, config, kind, mirrored)
        prepared.encoded_images += len(group)
        for item, latent in zip(group, latents, strict=True):
            if (view := _view(item, mirrored)) in missing:
                store.put(missing[view], {"latent": latent}, on_disk=config.cache_latents_to_disk)
                prepared.latents[view] = latent


def _view(item: Item, mirrored: bool) -> str:
    return item.key + MIRRORED if mirrored else item.key


def _prepare_masks(prepared: Prepared, base: Base, config: TrainConfig) -> None:
    """Weights of the loss at the size of the latents: the mean over each latent's pixels (as sd-scripts)."""
    for item in prepared.dataset.items:
        mask_HW = load_mask(item, config)
        if mask_HW is None:
            continue
        side_px = base.latent_factor_px
        small_hw = torch.nn.functional.avg_pool2d(mask_HW[None], side_px)[0]
        for view in views(item, config):
            prepared.masks[view] = small_hw.flip(-1) if view.endswith(MIRRORED) else small_hw


def latent_key(item: Item, fit: Fit, base: Base, kind: torch.dtype, *, mirrored: bool = False) -> str:
    """Everything that decides a latent."""
    size = [fit.resized_width_px, fit.resized_height_px, fit.bucket.width_px, fit.bucket.height_px]
    crop = "centre mirrored" if mirrored else "centre"
    return _key("latent", item.sha256, size, crop, base.identity, str(kind))


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
    base: Base, group: Sequence[Item], config: TrainConfig, kind: torch.dtype, mirrored: bool
) -> list[Tensor]:
    """Latents of a group.  One that is not finite in half precision – SDXL's VAE is known for it –
    is done in fp32."""
    pixels_BCHW = torch.stack([load_pixels(item, config)[0] for item in group])
    if mirrored:
        pixels_BCHW = pixels_BCHW.flip(-1)
    try:
        latents = _vae_sample(base, pixels_BCHW, group, kind)
        broken = [row for row, latent in enumerate(latents) if not latent.isfinite().all()]
        if broken and kind != torch.float32:
            again = _vae_sample(base, pixels_BCHW[broken], [group[row] for row in broken], torch.float32)
            for row, latent in zip(broken, again, strict=True):
                latents[row] = latent
            if all(latent.isfinite().all() for latent in again):
                base.say_once(
                    f"the VAE of {base.name} overflows in half precision: such images are encoded again in fp32"
                )
    except torch.OutOfMemoryError:
        raise OutOfMemory(
            f"out of memory while encoding images at vae_batch_size {config.vae_batch_size}",
            "lower vae_batch_size or resolution",
        ) from None
    for item, latent in zip(group, latents, strict=True):
        if not latent.isfinite().all():
            raise DataError(
                f"the base's VAE gives no finite latent for {clean_text(str(item.path))}",
                "check the image; if all images fail, the base file is damaged",
            )
    return latents


def _vae_sample(base: Base, pixels_BCHW: Tensor, group: Sequence[Item], kind: torch.dtype) -> list[Tensor]:
    """One unscaled VAE sample per image, fp32 on CPU, from a generator seeded by the image's content."""
    generators = [torch.Generator().manual_seed(int(item.sha256[:15], 16)) for item in group]
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
    prepared.states = {}
    encoder = base.text_encoders[0]
    longer = [config.max_token_length] if config.max_token_length not in (None, WINDOW_TOKENS) else []
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
                states = base.encode_text([caption], config.clip_skip, config.max_token_length)
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
        prepared.states[caption] = TextStates(tensors["hidden"], tensors.get("pooled"))


def _is_text(tensors: Tensors) -> bool:
    hidden = tensors.get("hidden")
    return hidden is not None and hidden.ndim == 3 and hidden.shape[0] == 1 and _is_finite(tensors)


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _key(*parts: Any) -> str:
    return json.dumps([FORMAT, *parts])
