"""Dataset: a folder of captioned images as values – items, reference images, batches.

Owns reading of images and the split into training and reference images.  Regularisation and validation images are
``trainer.data.items``'.  Kohya's folder layout is ``trainer.data.folders``,
decoding ``trainer.data.images``, bucket arithmetic ``trainer.data.buckets``, captions
``trainer.data.captions``, dataset files ``trainer.data.subsets``.  Imports no torch until pixels are asked for.

Everything drawn at random is a function of (seed, epoch, …): no state, so a resumed run sees the same batches.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig
from trainer.data.captions import read_captions, shown
from trainer.data.folders import (
    HELD_OUT,
    FolderPart,
    held_out_folder,
    images_in,
    no_folder,
    parts_of,
    regularisation,
    subject_of_parts,
)
from trainer.data.images import IMAGE_EXTENSIONS, read_picture
from trainer.data.items import Item, balanced, set_apart
from trainer.errors import DataError
from trainer.files import sha256_file
from trainer.findings import report
from trainer.text import clean_text

if TYPE_CHECKING:
    pass

MAX_REFERENCES = 8
REFERENCE_SHARE = 0.2
MIN_REFERENCES = 2  # likeness is measured between them (evaluation.encoders.require_references)
_READERS = 4  # threads that decode; each holds one image
Facts = tuple[int, int, str, tuple[str, ...]]  # of an image: width, height in px, sha256 of the file, traits


@dataclass(frozen=True)
class Dataset:
    """The items of a folder, sorted by path, and what the folder says about its subject.

    ``held_out`` are the images of the folder's ``held_out/``; ``notes`` is messages for the user.
    """

    root: Path
    items: tuple[Item, ...]
    trigger: str | None = None
    class_word: str | None = None
    held_out: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """sha256 of what is trained on: every image's bytes, caption, repeats and own settings, in order.
        Not of file names."""
        content = [(item.sha256, item.caption, item.repeats, *_particulars(item)) for item in self.items]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _particulars(item: Item) -> list[Any]:
    """What an item has beyond an image and a caption; usually nothing."""
    if not (item.own or item.is_reg or item.mask or item.dataset):
        return []
    place = [item.dataset] if item.dataset else []
    return [item.own, item.is_reg, sha256_file(item.mask) if item.mask else "", *place]


# Reading a folder


def read_dataset(
    folder: Path,
    config: TrainConfig,
    *,
    trigger: str | None = None,
    class_word: str | None = None,
    default_repeats: int = 1,
    known: Mapping[Path, Facts] | None = None,
) -> Dataset:
    """Read and check a dataset: kohya's layout, one ``N_trigger class`` folder, or plain images with
    captions; and the regularisation images of reg_data_dir.

    Every image is decoded once and every caption read, so that nothing can fail later.  ``trigger`` and
    ``class_word`` replace what folder names say; ``default_repeats`` is for plain folders; images in
    ``known`` were decoded already.  Raises DataError.
    """
    root = Path(folder)
    if not root.is_dir():
        raise no_folder(root)
    try:
        parts, notes = parts_of(root, default_repeats)
        held_out = held_out_folder(root)
        held_paths = images_in(held_out, held_out.parent) if held_out else []
        if config.reg_data_dir:
            reg_parts, reg_notes = regularisation(Path(config.reg_data_dir))
            parts, notes = parts + reg_parts, notes + reg_notes
    except OSError as error:
        raise DataError(f"cannot read {shown(root)}: {error.strerror}", "check its permissions") from error
    found = assemble(root, parts, notes, config, held_paths, known=known)
    return replace(
        found,
        trigger=trigger if trigger is not None else found.trigger,
        class_word=class_word if class_word is not None else found.class_word,
    )


def assemble(
    root: Path,
    parts: Sequence[FolderPart],
    notes: Sequence[str],
    config: TrainConfig,
    held_paths: Sequence[Path] = (),
    *,
    known: Mapping[Path, Facts] | None = None,
) -> Dataset:
    """The dataset of some folders: captions and masks found, every image decoded."""
    captions: dict[int, Mapping[Path, str]] = {}  # place of a part → its captions
    said = list(notes)
    for places in _by_captions(parts):
        part = parts[places[0]]
        images = list(dict.fromkeys(path for place in places for path in parts[place].images))
        extension = part.setting(config, "caption_extension")
        lines = part.setting(config, "enable_wildcard")
        texts, more = read_captions(
            images,
            extension,
            part.root or root,
            instead=part.words,
            is_of_name=part.is_of_name,
            all_lines=lines,
        )
        captions |= dict.fromkeys(places, texts)
        said += more
    for place, part in enumerate(parts):
        if part.texts:
            captions[place] = dict(zip(part.images, part.texts, strict=True))
    facts = _all_facts([path for part in parts for path in part.images] + list(held_paths), known or {})
    items = tuple(
        Item(
            path,
            captions[place][path],
            part.repeats,
            *facts[path][:3],
            part.own,
            part.is_reg,
            _mask(path, part, config),
            part.dataset,
            facts[path][3],
            part.tagged(path),
        )
        for place, part in enumerate(parts)
        for path in part.images
    )
    held_out = tuple(Item(path, "", 1, *facts[path][:3]) for path in held_paths)
    _check_held_out(items, held_out)
    items, apart = set_apart(items, config)
    if apart:
        held_out += apart
        said.append(f"{len(apart)} images are set apart for the validation loss (validation_split)")
    items, more = balanced(items)
    trigger, class_word = subject_of_parts([part for part in parts if not part.is_reg])
    return Dataset(root, items, trigger, class_word, held_out, tuple(dict.fromkeys([*said, *more])))


def _all_facts(paths: Sequence[Path], known: Mapping[Path, Facts]) -> dict[Path, Facts]:
    """The facts of every image, each decoded once. Raises DataError if any cannot be read; all are findings."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(lambda path: known.get(path) or _facts_or_error(path), distinct))
    report(fact for fact in read if isinstance(fact, DataError))
    return {path: fact for path, fact in zip(distinct, read, strict=True) if not isinstance(fact, DataError)}


def _facts_or_error(path: Path) -> Facts | DataError:
    try:
        return _image_facts(path)
    except DataError as error:
        return error


def _by_captions(parts: Sequence[FolderPart]) -> list[list[int]]:
    """Folders whose captions are found alike, read together: their places in ``parts``."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, part in enumerate(parts):
        if part.texts:
            continue
        own = dict(part.own)
        alike = (part.words, part.root, own.get("caption_extension"), own.get("enable_wildcard"))
        groups.setdefault(alike, []).append(place)
    return list(groups.values())


def _mask(image: Path, part: FolderPart, config: TrainConfig) -> Path | None:
    """The mask of an image: a file of its name in conditioning_data_dir, or in a folder there that is
    named like the image's."""
    folder = part.setting(config, "conditioning_data_dir")
    if not part.setting(config, "masked_loss") or not folder or part.is_reg:
        return None
    for place in (Path(folder), Path(folder) / image.parent.name):
        for extension in (image.suffix, *sorted(IMAGE_EXTENSIONS)):
            if (mask := place / f"{image.stem}{extension}").is_file():
                return mask
    raise DataError(f"{shown(image)} has no mask in {shown(folder)}", "masks are named like the images")


def _image_facts(path: Path) -> Facts:
    """The facts of an image, which is decoded completely."""
    picture = read_picture(path)
    return *picture.size_px, picture.sha256, picture.traits


def _check_held_out(items: Sequence[Item], held_out: Sequence[Item]) -> None:
    trained = {item.sha256: item.path for item in items}
    for item in held_out:
        if item.sha256 in trained:
            raise DataError(
                f"{shown(item.path)} is the same image as {shown(trained[item.sha256])}, trained on too",
                f"remove one: images in {HELD_OUT}/ judge the result and must be new to it",
            )


# Reference images


def split_references(dataset: Dataset, n: int | None = None) -> tuple[Dataset, Dataset]:
    """(what is trained on, reference images that judge it).

    With images in ``held_out/`` those are the references.  Else ``n`` images are set apart – min(8, 20 %) by default,
    which is none below five images – chosen by content hash, so that file names and new images change little.
    """
    if dataset.held_out:
        return dataset, replace(dataset, items=dataset.held_out, held_out=())
    distinct = sorted({item.sha256 for item in dataset.items if not item.is_reg})
    count = references_apart(len(distinct)) if n is None else n
    if count < 0 or count >= len(distinct):
        raise DataError(
            f"{count} reference images cannot be set apart from {len(distinct)} images",
            f"choose 0 to {len(distinct) - 1}",
        )
    chosen = set(distinct[:count])
    return (
        replace(dataset, items=tuple(item for item in dataset.items if item.sha256 not in chosen)),
        replace(dataset, items=_once(item for item in dataset.items if item.sha256 in chosen)),
    )


def _once(items: Iterable[Item]) -> tuple[Item, ...]:
    """Each image of several datasets once: from the first that has it."""
    found = tuple(items)
    first: dict[str, int] = {}
    for item in found:
        first.setdefault(item.sha256, item.dataset)
    return tuple(item for item in found if item.dataset == first[item.sha256])


def references_apart(images: int) -> int:
    """How many of ``images`` different images are held out as references."""
    return min(MAX_REFERENCES, int(images * REFERENCE_SHARE))


def tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """How often each tag is in the captions of a folder, or among the tags of a metadata file, regularisation images
    left out: sd-scripts' ss_tag_frequency, which A1111 shows."""
    tags: dict[str, Counter[str]] = {}
    for item in dataset.items:
        if not item.is_reg:
            place, text = item.tagged or (item.path.parent.name, item.caption)
            words = (clean_text(tag.strip().lower()) for tag in text.replace("\n", ",").split(","))
            tags.setdefault(place, Counter()).update(word for word in words if word)
    return {folder: dict(count) for folder, count in tags.items()}
