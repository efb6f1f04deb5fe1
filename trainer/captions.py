"""Caption files: one beside each image, checked before anything is trained.

Owns finding, decoding and checking them, and how files of a dataset are named in errors.  What a caption
becomes in training (shuffled tags) is ``trainer.dataset``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, DataError
from trainer.files import clean_text

MAX_CAPTION_BYTES = 65_536  # assumed: encoders read 75 to 225 tokens, about 1 kB
_EXTENSION = re.compile(r"\.\w[\w.-]*")
LISTED = 5  # file names shown in an error


def read_captions(images: Sequence[Path], extension: str, root: Path) -> tuple[dict[Path, str], list[str]]:
    """The caption of every image, and notes.  Missing, empty or unreadable ones are errors that list the
    files."""
    if not _EXTENSION.fullmatch(extension):
        raise ConfigError(f"caption_extension = {clean_text(extension)!r} is no file ending", "write .txt")
    found = {path: _caption_file(path, extension) for path in images}
    missing = [path for path, file in found.items() if file is None]
    if missing:
        what = (
            "no image has a caption"
            if len(missing) == len(images)
            else f"{len(missing)} images have no caption"
        )
        raise DataError(f"{what} ({extension}): {listed(missing)}", _other_extension_hint(missing, extension))
    captions, empty, long = {}, [], []
    for path, file in found.items():
        assert file is not None
        check_inside(file, root)
        lines = [line.strip() for line in _read_text(file).splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            empty.append(file)
            continue
        if len(lines) > 1:
            long.append(file)
        captions[path] = lines[0]
    if empty:
        raise DataError(f"{len(empty)} captions are empty: {listed(empty)}", "write what the images show")
    notes = []
    if long:
        notes.append(
            f"{len(long)} captions have several lines, the first is used, as kohya does: {listed(long)}"
        )
    return captions, notes


def _caption_file(image: Path, extension: str) -> Path | None:
    """The caption beside an image: ``name.txt``, or ``name.png.txt``."""
    for candidate in (image.with_suffix(extension), image.with_name(image.name + extension)):
        if candidate.is_file():
            return candidate
    return None


def _other_extension_hint(missing: Sequence[Path], extension: str) -> str:
    for other in (".txt", ".caption"):
        if other != extension and any(_caption_file(path, other) for path in missing):
            return f'there are {other} files: set caption_extension = "{other}"'
    return f"put a {extension} file with the same name beside each image"


def _read_text(file: Path) -> str:
    try:
        size_bytes = file.stat().st_size
        if size_bytes > MAX_CAPTION_BYTES:
            raise DataError(
                f"the caption {shown(file)} has {size_bytes} bytes", "a caption is one line of text"
            )
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {shown(file)}: {error.strerror}", "check its permissions") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption {shown(file)} is not UTF-8: byte {data[error.start]:#04x} at {error.start}",
            "save it as UTF-8",
        ) from error
    if "\0" in text:
        raise DataError(f"the caption {shown(file)} has a NUL byte", "save it as plain UTF-8 text")
    return text


def check_inside(path: Path, root: Path) -> None:
    """Refuse a file that a link makes stand for one outside the dataset: the folder may be a stranger's."""
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
