"""Recorder: the sequence of allocations and frees on the meta device, and how each size depends on the ranks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Functions that run thousands of times in a step and whose result follows from the shapes, strides and dtypes of the
# arguments alone. torch computes that in Python on the meta device (torch._refs), so it is remembered.
_PURE = frozenset(
    {
        _aten.mul.Tensor,
        _aten.add.Tensor,
        _aten.div.Tensor,
        _aten.gelu.default,
        _aten.gelu_backward.default,
        _aten.new_empty.default,
    }
)
_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Recorder(TorchDispatchMode):
    """Tracks every storage from its first tensor to its last."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self.sizes: list[tuple[int, int, bool]] = []
        self.known: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._forms: dict[Any, _Form] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PURE:
            result = self._remembered(function, args, kwargs or {})
        else:
            result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.see(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self.see(part)
        return result

    def see(self, tensor: Tensor, *, is_new: bool = True) -> None:
        """Register a tensor. ``is_new = False``: it existed before the step and is not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        number = -1
        if is_new:
            number = self._allocate(storage.nbytes(), tensor.element_size())
        self.known[key] = number
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _remembered(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        """What ``function`` returns on the meta device; computed by torch only for new kinds of arguments."""
        kind = (function, *map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        form = self._forms.get(kind)
        if form is not None:
            return torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
        result: Tensor = function(*args, **kwargs)
        if result.is_meta and all(arg.is_meta for arg in args if isinstance(arg, Tensor)):
            form = (tuple(result.shape), result.stride(), result.dtype)
            same = torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
            if same.untyped_storage().nbytes() == result.untyped_storage().nbytes():
                self._forms[kind] = form
        return result

    def workspace(self, size_bytes: int) -> None:
        """Record memory that a kernel uses while it runs."""
        self.events.append(~self._allocate(size_bytes, 1, is_workspace=True))

    def _allocate(self, size_bytes: int, element_bytes: int, *, is_workspace: bool = False) -> int:
        self.sizes.append((size_bytes, size_bytes // element_bytes, is_workspace))
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def _gone(self, key: int) -> None:
        number = self.known.pop(key)
        del self._references[key]
        if number >= 0:
            self.events.append(~number)


def _kind(value: Any) -> Any:
    """What a result's form can depend on. 1, 1.0 and True are different kinds of numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return (type(value), tuple(value) if isinstance(value, list) else value)
