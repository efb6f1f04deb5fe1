"""A plain folder of images → kohya's layout: ``OUT/10_trigger class/`` with a ``.txt`` caption beside each image.

Owns which files are copied under which names.  The source is only read; the copies are independent files. The
result appears in one step or not at all.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.data.captions import CaptionFiles, check_inside, listed, read_text, shown
from trainer.data.folders import HELD_OUT, MAX_REPEATS
from trainer.data.images import is_image, read_picture
from trainer.data.litter import is_litter, litter_notes, visible
from trainer.data.survey import CAPTION_EXTENSIONS, OTHER_PICTURES, READERS
from trainer.errors import ConfigError, DataError, MissingData
from trainer.files import atomic_folder, machine_error, require_space, sweep
from trainer.text import clean_text

CAPTION = ".txt"
_NAME = re.compile(r"[^\s/\\\x00-\x1f\x7f.][^\s/\\\x00-\x1f\x7f]{0,63}")
_CLASS = re.compile(r"[^/\\\x00-\x1f\x7f]{0,100}")


@dataclass(frozen=True)
class Wish:
    """What the layout shall say: trigger word, class word, repeats, images set apart, and whether images that
    cannot be read are left out."""

    trigger: str
    class_word: str = ""
    repeats: int = 10
    held_out: int = 0
    skip_corrupt: bool = False

    @property
    def folder(self) -> str:
        return f"{self.repeats}_{self.trigger} {self.class_word}".strip()

    @property
    def words(self) -> str:
        return f"{self.trigger} {self.class_word}".strip()

    def check(self) -> None:
        """ConfigError for what cannot be a folder's name or would be read back as something else."""
        if not _NAME.fullmatch(self.trigger) or clean_text(self.trigger) != self.trigger:
            raise ConfigError(
                f"--trigger {shown(self.trigger)[:80]!r} cannot be a trigger word in a folder's name",
                "give one word without spaces or slashes; what the subject is goes into --class",
            )
        if not _CLASS.fullmatch(self.class_word) or clean_text(self.class_word) != self.class_word:
            raise ConfigError(
                f"--class {shown(self.class_word)[:80]!r} cannot be in a folder's name", "give a word or two"
            )
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise ConfigError(f"--repeats {self.repeats}", f"give 1 to {MAX_REPEATS}")


@dataclass(frozen=True)
class LayoutSource:
    """One image to copy: its caption's text (None: it has none), its content, its name in the layout."""

    path: Path
    caption: str | None
    sha256: str
    stem: str
    is_held_out: bool


@dataclass(frozen=True)
class Built:
    """The result. ``notes`` are messages for the user."""

    folder: Path
    images: int
    held_out: int
    notes: tuple[str, ...]


def build(source: Path, out: Path, wish: Wish) -> Built:
    """Copy.  Raises ConfigError, DataError naming every image that cannot be read, or MachineError."""
    wish.check()
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise MissingData(
            f"the folder {shown(source)} does not exist", "give the folder that holds the images"
        )
    _check_places(source, out)
    try:
        paths = list(_images(source))
    except OSError as error:
        raise DataError(f"cannot read {shown(source)}: {error.strerror}", "check its permissions") from error
    if not paths:
        raise DataError(f"no images in {shown(source)} or its folders", "give the folder that holds them")
    found, notes = _read(paths, source, wish)
    found = _set_apart(_named(found, source), wish.held_out)
    trained = [entry for entry in found if not entry.is_held_out]
    if not trained:
        raise DataError("no image is left to train on", "set fewer apart, or give more images")
    notes += _notes(found, source, wish)
    try:
        require_space(out, sum(entry.path.stat().st_size for entry in found))
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, out) from error
    sweep(out.parent)
    with atomic_folder(out) as temporary:
        for entry in found:
            _copy(entry, temporary / (HELD_OUT if entry.is_held_out else wish.folder), wish)
    return Built(out / wish.folder, len(trained), len(found) - len(trained), tuple(notes))


def _check_places(source: Path, out: Path) -> None:
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"{shown(out)} is there and is no folder", "give a new folder")
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{shown(out)} is not empty", "give a new folder: nothing is written over")
        if out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{shown(out)} lies inside {shown(source)}",
                "give a folder elsewhere: the source stays as it is",
            )
    except OSError as error:
        raise machine_error(error, out) from error


def _images(source: Path) -> Iterator[Path]:
    """The images of a folder and all folders in it, sorted, without litter; links to folders are not
    followed."""
    for place, names in _places(source):
        for name in sorted(names):
            if not is_litter(name) and is_image(place / name):
                yield place / name


def _places(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all folders in it, with the names of their files."""
    for place, folders, files in os.walk(source, onerror=_raise):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield Path(place), files


def _raise(error: OSError) -> None:
    raise error


def _read(paths: Sequence[Path], source: Path, wish: Wish) -> tuple[list[LayoutSource], list[str]]:
    """Every image decoded and its caption read; DataError names all that fail."""
    with ThreadPoolExecutor(READERS) as pool:
        captions = CaptionFiles()
        read = list(pool.map(lambda path: _source(path, source, captions), paths))
    images = [entry for entry in read if isinstance(entry, LayoutSource)]
    broken = [entry for entry in read if isinstance(entry, DataError)]
    if broken and not wish.skip_corrupt:
        raise DataError(
            f"{len(broken)} of {len(paths)} images cannot be used: "
            + "; ".join(error.message for error in broken),
            "fix or remove them, or skip them with --skip-corrupt",
        )
    return images, [f"left out: {error.message}" for error in broken]


def _source(path: Path, root: Path, captions: CaptionFiles) -> LayoutSource | DataError:
    try:
        check_inside(path, root)
        sha256 = read_picture(path).sha256
        file = next((f for e in (CAPTION, ".caption") if (f := captions.find(path, e))), None)
        text = None
        if file is not None:
            check_inside(file, root)
            text = read_text(file)
    except DataError as error:
        return error
    is_held_out = HELD_OUT in path.relative_to(root).parts[:-1]
    return LayoutSource(path, text, sha256, path.stem, is_held_out)


def _named(found: Sequence[LayoutSource], root: Path) -> list[LayoutSource]:
    """Stems that are unique without regard to case: two images of one stem would share a caption."""
    taken: set[str] = set()
    named = []
    for entry in found:
        above = [part for part in entry.path.relative_to(root).parts[:-1] if part != HELD_OUT]
        stem = next(stem for stem in _stems(entry.path.stem, above) if stem.lower() not in taken)
        taken.add(stem.lower())
        named.append(replace(entry, stem=stem))
    return named


def _stems(stem: str, above: Sequence[str]) -> Iterator[str]:
    """Names to try: its own, with its folders' in front, with a number behind."""
    yield stem
    yield "_".join([*above, stem])
    for number in itertools.count(2):
        yield f"{stem}-{number}"


def _set_apart(found: Sequence[LayoutSource], count: int) -> list[LayoutSource]:
    """``count`` more images held out, chosen by content, so that names and new images change little. Files
    with one content go together."""
    contents = sorted({entry.sha256 for entry in found if not entry.is_held_out})
    if count >= max(1, len(contents)):
        raise ConfigError(
            f"--held-out {count} of {len(contents)} images leaves none to train on", "set fewer apart"
        )
    chosen = set(contents[:count])
    return [replace(e, is_held_out=e.is_held_out or e.sha256 in chosen) for e in found]


def _notes(found: Sequence[LayoutSource], source: Path, wish: Wish) -> list[str]:
    notes = []
    bare = [entry.path for entry in found if entry.caption is None or not entry.caption.strip()]
    if bare:
        notes.append(f"without a caption, so {wish.words!r} is written: {listed(bare)}")
    renamed = [entry for entry in found if entry.stem != entry.path.stem]
    if renamed:
        names = ", ".join(f"{entry.path.name} → {entry.stem}{entry.path.suffix}" for entry in renamed[:5])
        more = f" and {len(renamed) - 5} more" if len(renamed) > 5 else ""
        notes.append(f"renamed, because the name is taken: {names}{more}")
    captions = CaptionFiles()
    both = [e.path for e in found if all(captions.find(e.path, ending) for ending in CAPTION_EXTENSIONS)]
    if both:
        notes.append(f"with two captions, of which the .txt is used: {listed(both)}")
    places = [place for place, _ in _places(source)]
    others = [path for place in places for path in visible(place) if path.suffix.lower() in OTHER_PICTURES]
    if others:
        notes.append(f"left out, because the format is not read: {listed(others)}")
    return notes + litter_notes(places)


def _copy(entry: LayoutSource, folder: Path, wish: Wish) -> None:
    folder.mkdir(exist_ok=True)
    target = folder / f"{entry.stem}{entry.path.suffix}"
    shutil.copyfile(entry.path, target)
    text = entry.caption if entry.caption and entry.caption.strip() else wish.words
    target.with_name(entry.stem + CAPTION).write_text(text, encoding="utf-8")
