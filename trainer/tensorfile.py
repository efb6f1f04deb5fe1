"""safetensors files: headers are read with limits before anything is loaded, and content is written reproducibly.

The header is checked against the file size, so a truncated download, an oversized header or a renamed pickle
gives a clear error and is never loaded.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.errors import MissingModel, ModelFileError, first_line
from trainer.filekinds import beginning_of, what_file

LIBRARY_LIMIT_BYTES = 100_000_000  # of a header, in safetensors' own reader
# A header of that size is almost 1 GB when Python has parsed it.  Assumed: a file of 5,000 tensors (SDXL with EMA
# weights) has a header of 0.5 MB, and the tags of a large dataset are a few MB of metadata.
MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 30_000
MAX_COMMAS = 16 * MAX_TENSORS  # a tensor of 9 sides has 12
MAX_BRACKETS = 3 * MAX_TENSORS + 2
TYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
PICKLE_ENDINGS = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True)
class Header:
    """Names and shapes of the tensors in a file, its metadata, and each tensor's number type in safetensors' words."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    types: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ModelFileError. Reads only the header."""
    refuse_pickle(path)
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{path} is not a file", "check the path")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            # the length of a valid header may begin like another kind of file, as with a pickle's first byte, 0x80
            if not 2 <= length <= min(LIBRARY_LIMIT_BYTES, size - 8):
                raise _no_safetensors(path, size)
            if length > MAX_HEADER_BYTES:
                raise _too_large(path, length)
            content = file.read(length)
    except FileNotFoundError as error:
        raise MissingModel(f"cannot read {path}: {error.strerror}", "check the path") from None
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if _is_overfull(content):
        raise _broken(path, f"its header lists more than {MAX_TENSORS:,} tensors, or is none")
    try:
        text = content.decode()
        del content  # only one copy at a time
        entries = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise _broken(path, f"its header has the entry {str(error)[:80]!r} twice") from None
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise _broken(path, "its header is not a table of tensors")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata is not a table of texts")
    body = size - 8 - length
    shapes = {name: _shape(path, name, entry, body) for name, entry in entries.items()}
    return Header(shapes, metadata, {name: str(entry["dtype"]) for name, entry in entries.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped. Check the header first."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _broken(path, first_line(error)[:160]) from None


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's content.  Unlike in the library's ``save``, the metadata is sorted, so that equal
    content gives equal bytes."""
    content = safetensors.torch.save(dict(tensors))
    length = struct.unpack("<Q", content[:8])[0]
    entries = {"__metadata__": _writable(metadata), **json.loads(content[8 : 8 + length])}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _writable(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata, sorted, as UTF-8 can hold it. Words of a command line in a locale without UTF-8 (LC_ALL=C) arrive
    as undecoded bytes; a finished training must not end at them."""
    plain = {
        name: value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for name, value in metadata.items()
    }
    return dict(sorted(plain.items()))


def with_metadata(path: Path, extra: Mapping[str, str]) -> bytes:
    """The content of a file with added metadata; the tensor bytes are unchanged."""
    read_header(path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    metadata = {**(entries.pop("__metadata__", None) or {}), **extra}
    header = json.dumps(
        {"__metadata__": _writable(metadata), **entries}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def refuse_pickle(path: Path) -> None:
    """Raise ModelFileError for a file with a pickle extension. Loading one can run arbitrary code, so
    it is never opened."""
    if path.suffix.lower() in PICKLE_ENDINGS:
        raise ModelFileError(
            f"{path.name} is a pickle ({path.suffix}), which could run arbitrary code; it was not opened",
            "download the .safetensors version, or convert it in an environment you trust",
        )


def _shape(path: Path, name: str, entry: Any, body_bytes: int) -> tuple[int, ...]:
    """The shape of one tensor, checked against its offsets and the file's size."""
    try:
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        width = TYPE_BYTES[entry["dtype"]]
    except (TypeError, ValueError, KeyError):
        raise _broken(path, f"the entry {name[:80]!r} is malformed") from None
    if any(
        type(number) is not int for number in (*shape, start, end)
    ):  # JSON also allows 1e999, true and "1"
        raise _broken(path, f"the entry {name[:80]!r} is malformed")
    if any(side < 0 for side in shape) or not 0 <= start <= end or end - start != math.prod(shape) * width:
        raise _broken(path, f"the entry {name[:80]!r} contradicts itself")
    if end > body_bytes:
        raise _broken(
            path, f"it ends {end - body_bytes:,} bytes too early: the download or copy is incomplete"
        )
    return shape


class _Twice(Exception):
    """A name that is twice in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object.  Readers differ in which of two equal names they take, so there may be none."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Twice(next(name for name, count in counts.items() if count > 1))
    return found


def _is_overfull(header: bytes) -> bool:
    """Whether a header has more brackets or commas, outside its texts, than ``MAX_TENSORS`` tensors: parsed, it would
    take a hundred times its size."""
    if header.count(b",") <= MAX_COMMAS and header.count(b"{") + header.count(b"[") <= MAX_BRACKETS:
        return False
    commas = brackets = end = 0
    for text in _TEXT.finditer(header):
        start, end = end, text.end()
        commas += header.count(b",", start, text.start())
        brackets += header.count(b"{", start, text.start()) + header.count(b"[", start, text.start())
    commas += header.count(b",", end)
    brackets += header.count(b"{", end) + header.count(b"[", end)
    return commas > MAX_COMMAS or brackets > MAX_BRACKETS


def _too_large(path: Path, length: int) -> ModelFileError:
    """The error for a length that no header has: most often, the file is of another kind."""
    if known := what_file(beginning_of(path)):
        return ModelFileError(f"{path} is {known[0]}", known[1])
    return _broken(path, f"its header has {length / 1e6:.0f} MB, more than any model's")


def _no_safetensors(path: Path, size: int) -> ModelFileError:
    """The error for a file whose first eight bytes are no header length of a safetensors file."""
    if size == 0:
        return _broken(path, "it is empty (0 bytes)")
    if known := what_file(beginning_of(path)):
        return ModelFileError(f"{path} is {known[0]}", known[1])
    return _broken(path, "its header does not fit into the file: it is truncated or not a safetensors file")


def _broken(path: Path, why: str) -> ModelFileError:
    return ModelFileError(f"{path} cannot be loaded: {why}", "download or copy it again")
