"""One captioned image, and which of them are trained on: as many regularisation images as training images, and what
validation_split sets apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.buckets import SIZE_SETTINGS
from trainer.errors import DataError


@dataclass(frozen=True)
class Item:
    """One captioned image.  Size as decoded and turned upright; sha256 of the file's bytes.

    ``own`` are (setting, value) pairs that its folder or its dataset has for itself (``trainer.data.subsets``);
    ``is_reg`` marks a regularisation image, whose loss weighs prior_loss_weight; ``mask`` is the file of its mask.
    ``dataset`` is the place of its [[datasets]] in a dataset file: each is batched apart. ``traits`` are what is odd
    about the file (``trainer.data.differences``); ``tagged`` the metadata file that its caption comes from, and the
    tags there.
    """

    path: Path
    caption: str
    repeats: int
    width_px: int
    height_px: int
    sha256: str
    own: tuple[tuple[str, Any], ...] = ()
    is_reg: bool = False
    mask: Path | None = None
    dataset: int = 0
    traits: tuple[str, ...] = ()
    tagged: tuple[str, str] | None = None

    @cached_property
    def key(self) -> str:
        """What its latent is found by: the image, and the sizes of its dataset where it has its own."""
        names = (*SIZE_SETTINGS, "resize_interpolation")
        sizes = [f"{name}={value}" for name, value in self.own if name in names]
        return ":".join([self.sha256, *sizes])

    def setting(self, config: TrainConfig, name: str) -> Any:
        """A setting's value for this image."""
        return dict(self.own).get(name, getattr(config, name))


def balanced(items: tuple[Item, ...]) -> tuple[tuple[Item, ...], list[str]]:
    """As many regularisation images as training images, repeats included, in each dataset: some are left out or
    repeated more (sd-scripts' DreamBoothDataset). Those of a dataset without training images are as many as all
    training images."""
    places = sorted({item.dataset for item in items})
    trained = [item for item in items if not item.is_reg]
    found: list[Item] = []
    notes = []
    for place in places:
        own = [item for item in trained if item.dataset == place]
        regular = [item for item in items if item.is_reg and item.dataset == place]
        used, more = _as_many(regular, sum(item.repeats for item in own or trained))
        found += [*own, *used]
        notes += more
        if used and not own:
            notes.append(
                f"[[datasets]] {place + 1} has only regularisation images: sd-scripts would use none of them"
            )
    return tuple(found), notes


def _as_many(regular: Sequence[Item], wanted: int) -> tuple[list[Item], list[str]]:
    """Regularisation images, so many with their repeats, and a note."""
    if not regular:
        return [], []
    used: list[Item] = []
    count = 0
    for item in regular:
        if count < wanted:
            used.append(item)
            count += item.repeats
    more, rest = divmod(max(0, wanted - count), len(used))
    used = [replace(item, repeats=item.repeats + more + (place < rest)) for place, item in enumerate(used)]
    note = f"{len(used)} of {len(regular)} regularisation images, {sum(i.repeats for i in used)} with repeats"
    return used, [note]


def set_apart(items: tuple[Item, ...], config: TrainConfig) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(what is trained on, what validation_split sets apart): ⌊share⌋ of each folder's images, as sd-scripts.

    Chosen by content and validation_seed, not by name or order; equal images stay together.
    """
    if not any(item.setting(config, "validation_split") for item in items):
        return items, ()
    folders: dict[tuple[Path, float, int], set[str]] = {}
    for item in items:
        if not item.is_reg:
            share, seed = (item.setting(config, name) for name in ("validation_split", "validation_seed"))
            place = (item.path.parent, share, config.seed if seed is None else seed)
            folders.setdefault(place, set()).add(item.sha256)
    apart: set[str] = set()
    for (_, share, seed), contents in folders.items():
        order = sorted(contents, key=lambda sha256: hashlib.sha256(f"{seed} {sha256}".encode()).digest())
        apart |= set(order[math.ceil(len(order) * (1 - share) - 1e-9) :])
    chosen = {item.sha256: item for item in items if item.sha256 in apart and not item.is_reg}
    if not chosen:
        raise DataError(
            f"validation_split = {config.validation_split:g} sets apart no image of {len(items)}",
            "raise it, or set it to 0",
        )
    return tuple(item for item in items if item.sha256 not in apart), tuple(chosen.values())
