"""Survey: the full content of a dataset folder, whatever is wrong in it.

Owns the reading: every image is decoded, every caption decoded, and failures are kept too.
``trainer.data.findings`` judges them. Training reads with ``trainer.data.dataset``, which stops at the first
mistake.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config import TrainConfig
from trainer.data.captions import CaptionFiles, check_inside, has_other_captions, read_text, shown
from trainer.data.dataset import Item
from trainer.data.folders import KOHYA_FOLDER, MAX_REPEATS, held_out_folder, subject_of_names, words_of
from trainer.data.images import is_image, read_picture
from trainer.data.litter import visible
from trainer.errors import DataError, MissingData

READERS = 4  # threads that decode; each holds one image
HASH_SIDE = 16  # a look is 16 × 16 comparisons of neighbours
THUMB_SIDE = 8
# Image formats that people have and that are not supported.
OTHER_PICTURES = frozenset(
    {".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jxl", ".psd", ".svg"}
)
CAPTION_EXTENSIONS = frozenset({".txt", ".caption"})


@dataclass(frozen=True, eq=False)
class Look:
    """What an image looks like, small: bits (256) of brightness rising to the right, and a thumbnail (8, 8, 3)."""

    bits: np.ndarray
    thumb: np.ndarray


@dataclass(frozen=True)
class Photo:
    """One image that can be read.  ``mode`` and the rest are the file's own (``trainer.data.images.Picture``)."""

    path: Path
    repeats: int
    width_px: int
    height_px: int
    sha256: str
    mode: str
    has_alpha: bool
    is_turned: bool
    frames: int
    look: Look
    is_held_out: bool = False
    caption: str | None = None  # None: no caption, or one that cannot be read

    @property
    def short_px(self) -> int:
        return min(self.width_px, self.height_px)

    @property
    def item(self) -> Item:
        return Item(self.path, self.caption or "", self.repeats, self.width_px, self.height_px, self.sha256)


@dataclass(frozen=True)
class Broken:
    """A file that cannot be used, and why."""

    path: Path
    error: DataError


@dataclass(frozen=True)
class Survey:
    """Everything found in a folder, sorted by path.  ``uncaptioned`` have no caption, ``named`` get the words of their
    folder's name instead of one; ``other`` are pictures of formats that are not read; ``orphans`` captions without an
    image."""

    root: Path
    photos: tuple[Photo, ...]
    broken: tuple[Broken, ...]
    broken_captions: tuple[Broken, ...]
    uncaptioned: tuple[Path, ...]
    named: tuple[Path, ...]
    empty_captions: tuple[Path, ...]
    other: tuple[Path, ...]
    orphans: tuple[Path, ...]
    trigger: str | None = None
    class_word: str | None = None

    @property
    def trained(self) -> tuple[Photo, ...]:
        """The images to train on."""
        return tuple(photo for photo in self.photos if not photo.is_held_out)

    @property
    def held_out(self) -> tuple[Photo, ...]:
        return tuple(photo for photo in self.photos if photo.is_held_out)


def survey(root: Path, config: TrainConfig, *, default_repeats: int = 1) -> Survey:
    """Read everything that training would read.  Raises DataError only if the folder itself cannot be listed."""
    root = Path(root)
    if not root.is_dir():
        raise MissingData(
            f"the dataset folder {shown(root)} does not exist", "give the folder that holds the images"
        )
    try:
        folders = _folders(root, default_repeats)
        listing = {folder: visible(folder) for folder, _ in folders}
    except OSError as error:
        raise DataError(f"cannot read {shown(root)}: {error.strerror}", "check its permissions") from error
    jobs = [(path, repeats) for folder, repeats in folders for path in listing[folder] if is_image(path)]
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda job: _photo(job[0], job[1], root), jobs))
    captions = CaptionFiles()
    texts = [
        _caption(found, root, config, captions)
        if isinstance(found, Photo) and not found.is_held_out
        else None
        for found in read
    ]
    photos = []
    for found, text in zip(read, texts, strict=True):
        if isinstance(found, Photo):
            photos.append(replace(found, caption=text if isinstance(text, str) else None))
    wanted = [
        (found.path, text)
        for found, text in zip(read, texts, strict=True)
        if isinstance(found, Photo) and not found.is_held_out
    ]
    trigger, class_word = subject_of_names(folder.resolve().name for folder, repeats in folders if repeats)
    files = [path for paths in listing.values() for path in paths]
    uncaptioned = [path for path, text in wanted if text is None]
    named = _named([path for path, _ in wanted], uncaptioned, config.caption_extension, captions)
    return Survey(
        root=root,
        photos=tuple(photos),
        broken=tuple(found for found in read if isinstance(found, Broken)),
        broken_captions=tuple(text for _, text in wanted if isinstance(text, Broken)),
        uncaptioned=tuple(path for path in uncaptioned if path not in named),
        named=tuple(path for path in uncaptioned if path in named),
        empty_captions=tuple(path for path, text in wanted if text == ""),
        other=tuple(path for path in files if path.suffix.lower() in OTHER_PICTURES),
        orphans=tuple(_orphans(files)),
        trigger=trigger,
        class_word=class_word,
    )


def _named(
    images: Sequence[Path], uncaptioned: Sequence[Path], extension: str, files: CaptionFiles
) -> set[Path]:
    """The images without a caption that get the words of their folder's name, by the rules of ``read_captions``."""
    words = {path: words_of(path.parent) for path in images}
    found = set()
    for each in {words[path] for path in uncaptioned} - {""}:
        missing = [path for path in uncaptioned if words[path] == each]
        whole = len(missing) == sum(words[path] == each for path in images)
        if not (whole and has_other_captions(missing, extension, files)):
            found |= set(missing)
    return found


def _folders(root: Path, default_repeats: int) -> list[tuple[Path, int]]:
    """The folders that training reads, by the rules of ``trainer.data.dataset.parts_of``,
    and held_out/ (0 repeats)."""
    inside = [path for path in visible(root) if path.is_dir()]
    named = [(path, match) for path in inside if (match := KOHYA_FOLDER.fullmatch(path.name))]
    found = [(path, int(match[1])) for path, match in named if int(match[1])]
    if not named:
        match = KOHYA_FOLDER.fullmatch(root.resolve().name)
        found = [(root, int(match[1]) if match else default_repeats)]
    found = [(path, repeats if 1 <= repeats <= MAX_REPEATS else 1) for path, repeats in found]
    held_out = held_out_folder(root)
    return found + ([(held_out, 0)] if held_out else [])


def _photo(path: Path, repeats: int, root: Path) -> Photo | Broken:
    try:
        check_inside(path, root if repeats else path.parent.parent)  # held_out/ may lie next to the root
        picture = read_picture(path)
    except DataError as error:
        return Broken(path, error)
    width_px, height_px = picture.size_px
    return Photo(
        path,
        max(1, repeats),
        width_px,
        height_px,
        picture.sha256,
        picture.mode,
        picture.alpha_HW is not None,
        picture.is_turned,
        picture.frames,
        look_of(picture.pixels_HW3),
        is_held_out=repeats == 0,
    )


def look_of(pixels_HW3: np.ndarray) -> Look:
    """The look of an image: hardly changed by another size, quality or format."""
    image = Image.fromarray(pixels_HW3)
    grey = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX, reducing_gap=2)
    values = np.asarray(grey).astype(np.int16)
    small = image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX, reducing_gap=2)
    return Look((values[:, 1:] > values[:, :-1]).ravel(), np.asarray(small).astype(np.int16))


def _caption(photo: Photo, root: Path, config: TrainConfig, captions: CaptionFiles) -> str | Broken | None:
    """The caption as training reads it; "" for an empty one, None if there is none."""
    file = captions.find(photo.path, config.caption_extension)
    if file is None:
        return None
    try:
        check_inside(file, root)
        lines = [line.strip() for line in read_text(file).splitlines()]
    except DataError as error:
        return Broken(file, error)
    lines = [line for line in lines if line]
    return "\n".join(lines) if config.enable_wildcard else next(iter(lines), "")


def _orphans(files: Iterable[Path]) -> Iterable[Path]:
    """Captions whose image is gone."""
    files = list(files)
    images = [path for path in files if is_image(path)]
    stems = {_folded(path) for path in images} | {_folded(path.with_suffix("")) for path in images}
    return (
        path
        for path in files
        if path.suffix.lower() in CAPTION_EXTENSIONS and _folded(path.with_suffix("")) not in stems
    )


def _folded(path: Path) -> tuple[Path, str]:
    """A path without regard to the case of its name."""
    return path.parent, path.name.casefold()
