"""What a file is that should be a model and is not, from its first bytes.

A download often leaves something else under the model's name: a web page, a Git LFS pointer, an archive.  Only the
beginning is read, and nothing is unpacked or run.
"""

from __future__ import annotations

import re
from pathlib import Path

_BYTES = 4096  # enough for every mark below
_PICKLE_HINT = (
    "it was not loaded; download the .safetensors version, or convert it in an environment you trust"
)
# Beginning of a file → (what it is, what to do).
_MARKS = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, a text that stands for the file",
        "run git lfs pull, or download the file itself",
    ),
    (
        rb"(?is)\s*(?:<!doctype html|<html|<head|<\?xml|<!--)",
        "a web page",
        "use the page's download link; some sites want a login or a token",
    ),
    (
        rb"\s*\{\s*\"(?:error|message|detail|statusCode|code)\"",
        "an error message of a web server",
        "download the file again; some sites want a login or a token",
    ),
    (rb"\x89PNG\r\n", "a picture (PNG)", "give the model file"),
    (rb"\xff\xd8\xff", "a picture (JPEG)", "give the model file"),
    (rb"GIF8", "a picture (GIF)", "give the model file"),
    (rb"RIFF....WEBP", "a picture (WebP)", "give the model file"),
    (rb"....ftyp", "a video or picture (MP4, AVIF, HEIC)", "give the model file"),
    (rb"\x1aE\xdf\xa3", "a video (WebM, MKV)", "give the model file"),
    (rb"%PDF", "a PDF document", "give the model file"),
    (rb"GGUF", "a GGUF file", "download the .safetensors version"),
    (
        rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ",
        "an archive",
        "unpack it and give the .safetensors file in it",
    ),
    (rb"\x7fELF|MZ", "a program", "do not run it; download the model again"),
)


def what_file(start: bytes) -> tuple[str, str] | None:
    """(what a file with this beginning is, what to do), or None if that is not known."""
    if start[:2] == b"PK":
        if b"data.pkl" in start:
            return "a pickle file with the name of a safetensors file", _PICKLE_HINT
        return "a zip archive", "unpack it and give the .safetensors file in it"
    for pattern, what, hint in _MARKS:
        if re.match(pattern, start, re.DOTALL):
            return what, hint
    if start[:1] == b"\x80" and start[4:8].strip(b"\0"):  # not the length of a header, in a file that was cut
        return "a pickle file with the name of a safetensors file", _PICKLE_HINT
    if start and not start.strip(b"\0"):
        return "empty: its beginning is only zeros", "the download or copy was interrupted; do it again"
    if start and _is_text(start):
        return "a text file", "give the model file"
    return None


def beginning_of(path: Path) -> bytes:
    """The first bytes of a file, for ``what_file``.  Raises OSError."""
    with path.open("rb") as file:
        return file.read(_BYTES)


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # cut within a character
            return False
        text = start[: error.start].decode()
    return all(character.isprintable() or character in "\r\n\t" for character in text)
