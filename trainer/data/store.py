"""Tensors by key, in memory and on disk: what the cache keeps, and how a damaged file is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.files import make_folder, sweep, write_atomic

Tensors = dict[str, Tensor]


class Store:
    """Tensors by key.  What was read or made once stays in memory; with a folder it also stays on disk.

    A worker keeps one store over its trials.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        if folder is not None:
            make_folder(folder)
            sweep(folder)

    def get(self, key: str, fits: Callable[[Tensors], bool]) -> Tensors | None:
        """The tensors of a key, or None if there are none, the file is damaged, or they are not what ``fits``."""
        tensors = self._memory.get(key)
        if tensors is None and self.folder is not None:
            tensors = read_tensors(self._path(key), key)
        if tensors is None or not fits(tensors):
            return None
        self._memory[key] = tensors
        return tensors

    def put(self, key: str, tensors: Tensors, *, on_disk: bool = True) -> None:
        """Keep the tensors of a key."""
        self._memory[key] = tensors
        if on_disk and self.folder is not None:
            facts = {"key": key, "sha256": digest(tensors)}
            write_atomic(self._path(key), safetensors.torch.save(tensors, metadata=facts))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def read_tensors(path: Path, key: str) -> Tensors | None:
    """The tensors in a file if it is whole and was written for this key, else None."""
    with suppress(OSError, SafetensorError, ValueError), safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 – not a dict
        if facts.get("key") == key and facts.get("sha256") == digest(tensors):
            return tensors
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes, types and bytes; safetensors itself does not notice a flipped bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
