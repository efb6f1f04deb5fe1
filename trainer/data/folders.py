"""Image folders as kohya names them: which are trained on, how often, and what their names say.

Owns ``N_trigger class``, ``held_out/``, regularisation folders and the words for a folder without images;
images and captions are read by ``trainer.data.dataset``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.captions import check_inside, shown
from trainer.data.images import IMAGE_EXTENSIONS, is_image
from trainer.data.litter import litter_notes, visible
from trainer.errors import DataError, MissingData
from trainer.text import clean_text

HELD_OUT = "held_out"  # a folder of reference images inside the dataset; never trained on
MAX_REPEATS = 10_000  # assumed: more is a year or a serial number in a folder's name
KOHYA_FOLDER = re.compile(r"(\d{1,9})_(.*)", re.DOTALL)


@dataclass(frozen=True)
class FolderPart:
    """One folder of images, what its name says, and what a dataset file says of it.

    ``words`` is the caption of images that have none, ``is_of_name`` says that they are the folder's name; ``root`` is
    the folder that links may not lead out of (unset: the dataset's).  ``dataset`` counts the [[datasets]] of the file.
    ``texts`` are the captions where a metadata file has them, ``tags`` its tags, ``metadata`` its name.
    """

    images: tuple[Path, ...]
    repeats: int
    trigger: str | None = None
    class_word: str | None = None
    words: str = ""
    is_of_name: bool = False
    own: tuple[tuple[str, Any], ...] = ()
    is_reg: bool = False
    root: Path | None = None
    dataset: int = 0
    texts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: str = ""

    def tagged(self, image: Path) -> tuple[str, str] | None:
        """The metadata file that an image's caption comes from, and its tags there."""
        return (self.metadata, self._tags_of[image]) if self.metadata else None

    @cached_property
    def _tags_of(self) -> dict[Path, str]:
        return dict(zip(self.images, self.tags, strict=True))

    def setting(self, config: TrainConfig, name: str) -> Any:
        """A setting's value for this folder."""
        return dict(self.own).get(name, getattr(config, name))


def regularisation(root: Path) -> tuple[list[FolderPart], list[str]]:
    """The folders of reg_data_dir.  Images without a caption get the words of their folder's name."""
    if not root.is_dir():
        raise MissingData(
            f"the folder {shown(root)} of reg_data_dir does not exist", "give the folder that holds 1_class"
        )
    parts, notes = parts_of(root, 1)
    return [replace(part, is_reg=True, root=root) for part in parts], notes


def parts_of(root: Path, default_repeats: int) -> tuple[list[FolderPart], list[str]]:
    """The folders to train on, and notes about what is left out."""
    name = KOHYA_FOLDER.fullmatch(root.resolve().name)
    folders = [path for path in visible(root) if path.is_dir()]
    named = [(path, match) for path in folders if (match := KOHYA_FOLDER.fullmatch(path.name))]
    loose = images_in(root, root)
    notes = litter_notes([root, *(path for path, _ in named)])
    if named:
        parts = []
        for path, match in named:
            images = images_in(path, root)
            if int(match[1]) == 0 or not images:
                notes.append(f"{shown(path)} is left out: {'0 repeats' if images else 'no images in it'}")
            else:
                parts.append(_kohya_part(path, match, images))
        if loose:
            notes.append(f"{len(loose)} images directly in {shown(root)} are left out, as kohya does")
        others = [path for path in folders if not KOHYA_FOLDER.fullmatch(path.name) and path.name != HELD_OUT]
        notes += [
            f"{shown(path)} is left out: its name has no repeats in front, like 10_name" for path in others
        ]
        if not parts:
            raise _no_images(root, folders)
        return parts, notes
    if not loose:
        raise _no_images(root, folders)
    if name:
        return [_kohya_part(root, name, loose)], notes
    return [FolderPart(tuple(loose), default_repeats)], notes


def _kohya_part(folder: Path, match: re.Match[str], images: list[Path]) -> FolderPart:
    repeats = int(match[1])
    if repeats > MAX_REPEATS:
        raise DataError(
            f"the folder name {shown(folder)} means {repeats} repeats",
            f"start it with the repeats you want, for example 10_{match[2]}",
        )
    if repeats == 0:
        raise DataError(
            f"the folder name {shown(folder)} means 0 repeats", f"rename it, for example to 10_{match[2]}"
        )
    subject = subject_of(match[2])
    return FolderPart(tuple(images), repeats, *subject, words=_joined(*subject), is_of_name=True)


def words_of(folder: Path) -> str:
    """The caption of images without one: the words of a folder like ``10_luca man``; none for other folders."""
    match = KOHYA_FOLDER.fullmatch(folder.resolve().name)
    return _joined(*subject_of(match[2])) if match else ""


def _joined(trigger: str | None, class_word: str | None) -> str:
    return " ".join(word for word in (trigger, class_word) if word)


def named_subject(root: Path) -> tuple[str | None, str | None]:
    """Trigger and class word as the folder's names say them, without reading any image.  Raises DataError."""
    if not root.is_dir():
        raise no_folder(root)
    try:
        return subject_of_parts(parts_of(root, 1)[0])
    except OSError as error:
        raise DataError(f"cannot read {shown(root)}: {error.strerror}", "check its permissions") from error


def subject_of_parts(parts: Sequence[FolderPart]) -> tuple[str | None, str | None]:
    """Trigger and class word, each where all folders agree on it."""
    return common([part.trigger for part in parts]), common([part.class_word for part in parts])


def subject_of_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Trigger and class word in folder names like ``10_luca man``, each where all such names agree on it."""
    found = [subject_of(match[2]) for name in names if (match := KOHYA_FOLDER.fullmatch(name))]
    return common(trigger for trigger, _ in found), common(class_word for _, class_word in found)


def no_folder(root: Path) -> DataError:
    hint = "give the folder that holds the images"
    if root.exists():
        return DataError(f"{shown(root)} is a file", hint)
    return MissingData(f"the dataset folder {shown(root)} does not exist", hint)


def subject_of(name: str) -> tuple[str | None, str | None]:
    """Trigger and class word in what follows ``10_``."""
    words = clean_text(name).split(maxsplit=1)
    return words[0] if words else None, words[1].strip() if len(words) > 1 else None


def held_out_folder(root: Path) -> Path | None:
    """The ``held_out/`` of a dataset: in it, or next to it if it is one folder like ``10_luca man`` of a dataset."""
    inside = root / HELD_OUT
    if not inside.is_dir() and KOHYA_FOLDER.fullmatch(root.resolve().name):
        return _beside(root)
    return inside if inside.is_dir() else None


def held_out_of_subsets(folders: Sequence[Path]) -> list[Path]:
    """The images of ``held_out/`` in or next to the folders of a dataset file, each once, sorted."""
    places = [held_out_folder(folder) or _beside(folder) for folder in folders]
    distinct = {place.resolve(): place for place in places if place is not None}
    return sorted(path for place in distinct.values() for path in images_in(place, place.parent))


def _beside(folder: Path) -> Path | None:
    has_name = folder.name not in ("", "..")
    place = (folder if has_name else folder.resolve()).parent / HELD_OUT
    return place if place.is_dir() and place.resolve() != folder.resolve() else None


def images_in(folder: Path, root: Path) -> list[Path]:
    """Image files of a folder, sorted by name, without litter.  Links may not lead out of ``root``."""
    images = [path for path in visible(folder) if is_image(path)]
    for path in images:
        check_inside(path, root)
    return images


def _no_images(root: Path, folders: Sequence[Path]) -> DataError:
    """The error for a folder without images, with the most likely intention."""
    hint = f"images end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
    for path in folders:
        children = visible(path)
        if any(child.is_dir() and KOHYA_FOLDER.fullmatch(child.name) for child in children):
            hint = f"did you mean {shown(path)}, which has folders like 10_name?"
        elif path.name != HELD_OUT and any(child.suffix.lower() in IMAGE_EXTENSIONS for child in children):
            hint = f"give {shown(path)} itself, or rename it to 10_{shown(path.name)}"
    return DataError(f"no images to train on in {shown(root)}", hint)


def common(words: Iterable[str | None]) -> str | None:
    """The word that all agree on."""
    distinct = set(words)
    return next(iter(distinct)) if len(distinct) == 1 else None
