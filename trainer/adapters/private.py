"""The metadata of a LoRA file that carries none (setting no_metadata), kept in the folder of its run.

A file is only taken for the one that was written if its sha256 is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from trainer.adapters.metadata import CONFIG_KEY
from trainer.files import sha256_file, write_atomic


def keep(note: Path, name: str, content: bytes, metadata: Mapping[str, str]) -> None:
    """Note what the file of this name and content would say. The note holds what was written last."""
    digest = hashlib.sha256(content).hexdigest()
    found = {"file": name, "sha256": digest, "metadata": dict(metadata)}
    write_atomic(note, json.dumps(found, indent=1))


def metadata_of(lora: Path, note: Path) -> Mapping[str, str]:
    """The metadata of a file, else what the run noted about it. Raises ModelFileError for an unreadable LoRA."""
    from trainer.tensorfile import read_header  # loads torch

    said = read_header(lora).metadata
    if CONFIG_KEY in said or not note.is_file():
        return said
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["file"] != lora.name or found["sha256"] != sha256_file(lora):
            return said
        return {str(name): str(text) for name, text in found["metadata"].items()} | said
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return said
