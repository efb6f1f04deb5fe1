"""Captions: the files beside the images, and what a caption becomes each time it is trained.

Owns finding, decoding and checking the files, how files of a dataset are named in errors, and kohya's rules:
prefix, dropping, wildcards, shuffled tags.  ``trainer.data.dataset`` owns the random numbers.
"""

from __future__ import annotations

import codecs
import errno
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError, DataError
from trainer.findings import piece
from trainer.reading import read_small, size_words
from trainer.text import clean_text

MAX_CAPTION_BYTES = 65_536  # assumed: encoders read 75 to 225 tokens, about 1 kB
_EXTENSION = re.compile(r"\.\w[\w.-]*")
_SAVE_AS_UTF8 = "save it as UTF-8 (in an editor: Save as, encoding UTF-8)"
LISTED = 5  # file names shown in an error


class CaptionFiles:
    """Finds the captions beside images; each folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[str]]] = {}

    def find(self, image: Path, extension: str) -> Path | None:
        """``name.txt`` or ``name.png.txt``, whatever the case of the ending (``CAPS.TXT``), and then of the name, if it
        is not the name of another image."""
        for candidate in (image.with_suffix(extension), image.with_name(image.name + extension)):
            if candidate.is_file():
                return candidate
        names = self._names(image.parent)
        for wanted in (image.stem + extension, image.name + extension):
            same = names.get(wanted.casefold(), [])
            stem = wanted.removesuffix(extension)
            close = [name for name in same if name.startswith(stem)]
            free = [name for name in same if not self._is_taken(image, name[: len(stem)])]
            if close or free:
                return image.with_name((close or free)[0])
        return None

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Names of files without regard to case → as they are written."""
        if folder not in self._folders:
            found: dict[str, list[str]] = {}
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    found.setdefault(path.name.casefold(), []).append(path.name)
            self._folders[folder] = found
        return self._folders[folder]

    def _is_taken(self, image: Path, stem: str) -> bool:
        """Whether a stem is exactly that of another file with the image's ending."""
        return f"{stem}{image.suffix}" in self._names(image.parent).get(
            f"{stem}{image.suffix}".casefold(), []
        )


def read_captions(
    images: Sequence[Path],
    extension: str,
    root: Path,
    *,
    instead: str = "",
    is_of_name: bool = False,
    all_lines: bool = False,
) -> tuple[dict[Path, str], list[str]]:
    """The caption of every image, and notes.  Missing, empty or unreadable ones are errors that list the files.

    ``instead`` is the caption of images without a file: kohya's class_tokens, or with ``is_of_name`` the words of the
    folder's name. The latter is no reason to pass over captions of another usual ending: then they are missing.
    ``all_lines`` keeps several lines, of which enable_wildcard draws one; else the first is used.
    """
    if not _EXTENSION.fullmatch(extension):
        raise ConfigError(f"caption_extension = {clean_text(extension)!r} is no file ending", "write .txt")
    files = CaptionFiles()
    found = {path: files.find(path, extension) for path in images}
    missing = [path for path, file in found.items() if file is None]
    if is_of_name and len(missing) == len(images) and has_other_captions(missing, extension, files):
        instead = ""
    if missing and not instead:
        what = (
            "no image has a caption"
            if len(missing) == len(images)
            else f"{len(missing)} images have no caption"
        )
        with piece():
            raise DataError(
                f"{what} ({extension}): {listed(missing)}", _other_extension_hint(missing, extension, files)
            )
    captions: dict[Path, str] = dict.fromkeys(missing, instead)
    empty, long, late = [], [], []
    for path, file in found.items():
        if file is None:
            continue
        lines = ["?"]  # if it cannot be read and findings are collected
        with piece():
            check_inside(file, root)
            lines = [line.strip() for line in read_text(file).splitlines()]
        is_late = bool(lines) and not lines[0]
        lines = [line for line in lines if line]
        if not lines:
            empty.append(file)
            continue
        if is_late and not all_lines:
            late.append(file)
        if len(lines) > 1 and not all_lines:
            long.append(file)
        captions[path] = "\n".join(lines) if all_lines else lines[0]
    if empty:
        with piece():
            raise DataError(f"{len(empty)} captions are empty: {listed(empty)}", "write what the images show")
        captions |= dict.fromkeys((path for path, file in found.items() if file in empty), "?")
    notes = []
    if missing and instead:
        whose = "the words of the folder's name, as in sd-scripts" if is_of_name else "class_tokens"
        notes.append(
            f"{len(missing)} images have no caption ({shown(extension)}) and get {shown(instead)!r}, {whose}: "
            f"{listed(missing)}"
        )
    if long:
        notes.append(
            f"{len(long)} captions have several lines, the first is used, as kohya does: {listed(long)}"
        )
    if late:
        notes.append(
            f"{len(late)} captions begin with a blank line, which sd-scripts takes as the caption; the first line with "
            f"text is used here: {listed(late)}"
        )
    return captions, notes + _shared_notes(found) + _rival_notes(found, extension, files)


def has_other_captions(images: Sequence[Path], extension: str, files: CaptionFiles) -> bool:
    """Whether an ending is one of the usual two and images have captions with the other. Endings such as
    ``.none-use-foldername`` (presets of kohya_ss) are meant to find none."""
    usual = (".txt", ".caption")
    return extension in usual and any(
        files.find(path, other) for other in usual if other != extension for path in images
    )


def _rival_notes(found: Mapping[Path, Path | None], extension: str, files: CaptionFiles) -> list[str]:
    """Images with captions of two endings, of which one is used."""
    notes = []
    for other in (".txt", ".caption"):
        both = [path for path, file in found.items() if file and (o := files.find(path, other)) and o != file]
        if both and other != extension:
            notes.append(
                f"{len(both)} images have a {other} file too, which is not used (caption_extension = {extension}): "
                f"{listed(both)}"
            )
    return notes


def _shared_notes(found: Mapping[Path, Path | None]) -> list[str]:
    """Images of one name that get one caption: ``a.jpg`` and ``a.png``."""
    images: dict[Path, list[Path]] = {}
    for path, file in found.items():
        if file is not None:
            images.setdefault(file, []).append(path)
    shared = [path for group in images.values() if len(group) > 1 for path in group]
    return (
        [f"{len(shared)} images share a caption with another of their name: {listed(shared)}"]
        if shared
        else []
    )


def _other_extension_hint(missing: Sequence[Path], extension: str, files: CaptionFiles) -> str:
    for other in (".txt", ".caption"):
        if other != extension and any(files.find(path, other) for path in missing):
            return f'there are {other} files: set caption_extension = "{other}"'
    return (
        f"put a {extension} file with the same name beside each image, or copy the folder with hpo dataset prepare, "
        "which writes trigger and class word"
    )


def read_text(file: Path) -> str:
    try:
        data = read_small(file, MAX_CAPTION_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DataError(
                f"the caption {shown(file)} is larger than {size_words(MAX_CAPTION_BYTES)}",
                "a caption is one line of text",
            ) from error
        raise DataError(f"cannot read {shown(file)}: {error.strerror}", "check its permissions") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"the caption {shown(file)} is UTF-16, not UTF-8", _SAVE_AS_UTF8)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption {shown(file)} is not UTF-8: byte {data[error.start]:#04x} at {error.start}"
            + _as_windows(data, error.start),
            _SAVE_AS_UTF8,
        ) from error
    if "\0" in text:
        what = "a NUL byte" if text.count("\0") < len(text) // 3 else "NUL bytes, as UTF-16 has them"
        raise DataError(f"the caption {shown(file)} has {what}", _SAVE_AS_UTF8)
    return text


def _as_windows(data: bytes, start: int) -> str:
    """What a byte beyond ASCII means in Windows-1252, the usual encoding of old Windows programs."""
    try:
        letter = data[start : start + 1].decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return f", {shown(letter)!r} if it is Windows-1252" if letter.isprintable() else ""


def check_inside(path: Path, root: Path) -> None:
    """Refuse a link that leads out of the dataset, since the folder may come from a stranger."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{shown(path)} is a link to nowhere", "remove it or put the file there") from error
    if not real.is_relative_to(root.resolve()):
        raise DataError(f"{shown(path)} is a link out of the dataset folder", "copy the file into the folder")


def listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(shown(path) for path in paths[:LISTED]) + more


def shown(path: Path | str) -> str:
    return clean_text(os.fspath(path))


# What a caption becomes

MAX_VARIANTS = 32  # assumed: captions of an image that are encoded in advance rather than in every step
_WILDCARD = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # stand for {{ and }} meanwhile; private characters, in no caption


@dataclass(frozen=True)
class Moment:
    """When a caption is trained: after ``step`` of the run's optimizer steps."""

    step: int = 0
    total_steps: int = 0


START = Moment()


@dataclass(frozen=True)
class CaptionRules:
    """The caption settings of a run or of one of its folders (sd-scripts' process_caption)."""

    shuffle_caption: bool
    keep_tokens: int
    keep_tokens_separator: str
    caption_separator: str
    secondary_separator: str
    enable_wildcard: bool
    caption_prefix: str
    caption_suffix: str
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    token_warmup_min: int
    token_warmup_step: float

    @classmethod
    def of(cls, config: TrainConfig, own: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> CaptionRules:
        """The rules of a run; ``own`` are settings that a folder has for itself."""
        values = {f.name: getattr(config, f.name) for f in fields(cls)}
        return cls(**values | {name: value for name, value in dict(own).items() if name in values})

    @property
    def draws_tags(self) -> bool:
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    def apply(self, caption: str, epoch: int, draw: random.Random, now: Moment = START) -> str:
        """The caption as it is trained this time.  ``epoch`` counts from 0."""
        if self.caption_dropout_rate > 0 and draw.random() < self.caption_dropout_rate:
            return ""
        if self.caption_dropout_every_n_epochs > 0 and (epoch + 1) % self.caption_dropout_every_n_epochs == 0:
            return ""
        lines = caption.split("\n")
        text = self._framed(draw.choice(lines) if self.enable_wildcard and len(lines) > 1 else lines[0])
        if self.enable_wildcard:
            text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
            text = _WILDCARD.sub(lambda found: draw.choice(found[1].split("|")), text)
            text = text.replace(_OPEN, "{").replace(_CLOSE, "}")
        if self.draws_tags:
            text = self._drawn(text, draw, now)
        return self._joined(text)

    def variants(self, caption: str) -> tuple[str, ...] | None:
        """Every text that ``apply`` can make of a caption, or None if they are too many to list."""
        if self.draws_tags:
            return None
        lines = caption.split("\n")
        texts = [self._framed(lines[0])]
        if self.enable_wildcard:
            texts = []
            for line in map(self._framed, lines):
                parts = _WILDCARD.split(line.replace("{{", _OPEN).replace("}}", _CLOSE))
                choices = [part.split("|") if odd % 2 else [part] for odd, part in enumerate(parts)]
                combined = itertools.islice(itertools.product(*choices), MAX_VARIANTS + 1)
                texts += ["".join(parts).replace(_OPEN, "{").replace(_CLOSE, "}") for parts in combined]
                if len(texts) > MAX_VARIANTS:
                    return None
        dropped = [""] if self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0 else []
        return tuple(dict.fromkeys([*map(self._joined, texts), *dropped]))

    def _framed(self, caption: str) -> str:
        before = f"{self.caption_prefix} " if self.caption_prefix else ""
        after = f" {self.caption_suffix}" if self.caption_suffix else ""
        return before + caption + after

    def _joined(self, text: str) -> str:
        """Tags that belong together become tags of their own."""
        if not self.secondary_separator:
            return text
        return text.replace(self.secondary_separator, self.caption_separator)

    def _drawn(self, text: str, draw: random.Random, now: Moment) -> str:
        """Tags cut off by the warm-up, shuffled and dropped; those at fixed places stay."""
        front, tags, back = self._parts(text)
        tags = tags[: self._warm(len(tags), now)]
        if self.shuffle_caption:
            draw.shuffle(tags)
        if self.caption_tag_dropout_rate > 0:
            tags = [tag for tag in tags if draw.random() >= self.caption_tag_dropout_rate]
        return self._between.join(front + tags + back)

    @property
    def _between(self) -> str:
        """What stands between tags that were taken apart: the separator and a space (sd-scripts' process_caption since
        #2391; before, it was always a comma)."""
        mark = self.caption_separator.rstrip()
        return f"{mark} " if mark else self.caption_separator

    def _warm(self, count: int, now: Moment) -> int:
        """How many of the tags that move are in use: linear from token_warmup_min to all of them (sd-scripts'
        process_caption)."""
        length = self.token_warmup_step
        if 0 < length < 1:
            length = math.floor(length * now.total_steps)
        if now.step >= length:
            return count
        return max(0, math.floor(now.step * (count - self.token_warmup_min) / length) + self.token_warmup_min)

    def _parts(self, text: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, that move, that stay behind."""
        mark = self.keep_tokens_separator
        if mark and mark in text:
            front, middle, *rest = text.split(mark, 2)
            return self._tags(front), self._tags(middle), self._tags(rest[0]) if rest else []
        tags = self._tags(text)
        return tags[: self.keep_tokens], tags[self.keep_tokens :], []

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.caption_separator) if tag.strip()]
