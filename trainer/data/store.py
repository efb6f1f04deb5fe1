"""Tensors by key, in memory and on disk: what the cache keeps, and how a damaged file is noticed."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import MachineError
from trainer.files import make_folder, sweep, write_atomic

Tensors = dict[str, Tensor]
T = TypeVar("T")


class Store:
    """Tensors by key.  What was read or made once stays in memory; with a folder it also stays on disk.

    A worker keeps one store over its trials.  ``halve``: where RAM is short, only a part stays in memory, and the
    rest is read from its files at each use, which gives the same tensors.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[str, Tensors] = {}
        self._share = 1.0  # of what is on disk that stays in memory
        self._shelves: weakref.WeakSet[Shelf[object]] = weakref.WeakSet()
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
        if self.keeps(key):
            self._memory[key] = tensors
        return tensors

    def put(self, key: str, tensors: Tensors, *, on_disk: bool = True) -> None:
        """Keep the tensors of a key."""
        if on_disk and self.folder is not None:
            facts = {"key": key, "sha256": digest(tensors)}
            write_atomic(self._path(key), safetensors.torch.save(tensors, metadata=facts))
        if self.keeps(key):
            self._memory[key] = tensors

    def keeps(self, key: str) -> bool:
        """Whether the tensors of a key stay in memory: by chance, which the key decides; all that are not on disk."""
        if self._share == 1.0:
            return True
        chance = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
        return chance < self._share or not self._is_on_disk(key)

    def again(self, key: str) -> Tensors:
        """The tensors of a key that do not stay in memory.  Raises MachineError if their file is gone or damaged."""
        tensors = None if self.folder is None else read_tensors(self._path(key), key)
        if tensors is None:
            raise MachineError(
                f"a file of the cache in {self.folder} is gone or damaged",
                "the same command makes it again and goes on",
            )
        return tensors

    def halve(self) -> int:
        """Keep half as much in memory; less where chance would keep everything, as it may with few keys.  The bytes
        that are given back; 0 if nothing more can be read from disk."""
        gone: list[str] = []
        while not gone:
            self._share /= 2
            gone = [key for key in self._memory if not self.keeps(key)]
            if not any(map(self._is_on_disk, self._memory)):
                break
        freed = sum(tensor.nbytes for key in gone for tensor in self._memory[key].values())
        for key in gone:
            del self._memory[key]
        for shelf in self._shelves:
            shelf.drop()
        return freed

    def shelf(self, made: Callable[[Tensors], T]) -> Shelf[T]:
        """An empty dict of what is ``made`` of this store's tensors."""
        shelf = Shelf(self, made)
        self._shelves.add(shelf)  # type: ignore[arg-type]
        return shelf

    def _is_on_disk(self, key: str) -> bool:
        return self.folder is not None and self._path(key).is_file()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


class Shelf(dict[str, T], Generic[T]):
    """Values by name, each made of the tensors of a store's key.  Those that the store does not keep in memory are made
    anew from its files at each use; iterating gives only the others."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, store: Store, made: Callable[[Tensors], T]) -> None:
        super().__init__()
        self._store, self._made = store, made
        self._keys: dict[str, str] = {}

    def add(self, name: str, key: str, tensors: Tensors) -> None:
        """A value; ``key``: where its tensors are in the store."""
        self._keys[name] = key
        if self._store.keeps(key):
            self[name] = self._made(tensors)

    def drop(self) -> None:
        """Forget what the store does not keep."""
        for name, key in self._keys.items():
            if not self._store.keeps(key):
                self.pop(name, None)

    def __missing__(self, name: str) -> T:
        return self._made(self._store.again(self._keys[name]))

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict, whose own ``get`` would not make values anew."""
        return self[name] if name in self else default  # noqa: SIM401 – this is get

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._keys

    def __len__(self) -> int:
        return max(super().__len__(), len(self._keys))


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
