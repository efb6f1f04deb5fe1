"""safetensors files: headers read with limits before anything is loaded, and content written reproducibly.

A header is checked against the file's size here, so that a truncated download, a header that claims
gigabytes, or a pickle under another name is one clear line and never an attempt to load it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from trainer.errors import ModelFileError, first_line

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_TENSORS = 100_000  # SDXL with EMA weights has about 5,000
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
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
PICKLE_ENDINGS = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True)
class Header:
    """Names and shapes of a file's tensors, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, or ModelFileError.  Reads at most the header."""
    refuse_pickle(path)
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{path} is not a file", "check the path")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            fits = 2 <= length <= min(MAX_HEADER_BYTES, size - 8)
            # only then: the length of a sound header may well begin with a pickle's first byte, 0x80
            if not fits and (start[:2] == b"PK" or start[:1] == b"\x80"):
                raise ModelFileError(
                    f"{path} is a pickle file with the name of a safetensors file",
                    "it was not opened; convert it",
                )
            if not fits:
                raise _broken(
                    path, "its header does not fit into the file: it is cut off or no safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", "check the path") from None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise _broken(path, "its header is not a table of tensors")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata is not a table of texts")
    body = size - 8 - length
    return Header({name: _shape(path, name, entry, body) for name, entry in entries.items()}, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, memory-mapped: read when used.  Check the header first."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _broken(path, first_line(error)[:160]) from None


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's content.  Unlike the library's own ``save`` the metadata is in sorted order, so
    equal content gives equal bytes."""
    content = safetensors.torch.save(dict(tensors))
    length = struct.unpack("<Q", content[:8])[0]
    entries = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + length])}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def with_metadata(path: Path, extra: Mapping[str, str]) -> bytes:
    """A file's content with more metadata; its tensors stay byte for byte where they are."""
    read_header(path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    metadata = {**(entries.pop("__metadata__", None) or {}), **extra}
    header = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def refuse_pickle(path: Path) -> None:
    """ModelFileError for a file whose ending says pickle: loading one can run any code, so it is never opened."""
    if path.suffix.lower() in PICKLE_ENDINGS:
        raise ModelFileError(
            f"{path.name} is a pickle ({path.suffix}): loading it could run any code, so it was not opened",
            "get the .safetensors version, or convert it in a place you trust",
        )


def _shape(path: Path, name: str, entry: Any, body_bytes: int) -> tuple[int, ...]:
    """The shape of one tensor, checked against its offsets and the file's size."""
    try:
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        width = TYPE_BYTES[entry["dtype"]]
    except (TypeError, ValueError, KeyError):
        raise _broken(path, f"the entry {name[:80]!r} is malformed") from None
    if any(type(number) is not int for number in (*shape, start, end)):  # JSON has 1e999, true and "1" too
        raise _broken(path, f"the entry {name[:80]!r} is malformed")
    if any(side < 0 for side in shape) or not 0 <= start <= end or end - start != math.prod(shape) * width:
        raise _broken(path, f"the entry {name[:80]!r} contradicts itself")
    if end > body_bytes:
        raise _broken(path, f"it ends {end - body_bytes:,} bytes too early: the download or copy was cut off")
    return shape


def _broken(path: Path, why: str) -> ModelFileError:
    return ModelFileError(f"{path} cannot be loaded: {why}", "download or copy it again")
