"""torch.cuda and what else of torch knows CUDA, answered by the pretend card."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._foreach_utils

from tests.pretendcard import tensors
from tests.pretendcard.autocast import Casts
from tests.pretendcard.state import State
from tests.pretendcard.tensors import CardGenerator, CardTensor, card_device, check_index, set_current


class _Device:
    """torch.cuda.device: the current card for a while."""

    def __init__(self, device: Any) -> None:
        self._index = card_device(device).index

    def __enter__(self) -> None:
        self._before = tensors.current()
        if self._index >= 0:
            set_current(check_index(self._index))

    def __exit__(self, *error: object) -> None:
        set_current(self._before)


class Stream:
    """A stream on which everything is done at once."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = card_device(device)
        self.cuda_stream = 0

    def synchronize(self) -> None:
        tensors.state().waited("stream.synchronize")

    def wait_stream(self, stream: Any) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Event:
    """An event that has always happened.  Waiting for it is counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def record(self, stream: Any = None) -> None:
        return None

    def wait(self, stream: Any = None) -> None:
        return None

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        tensors.state().waited("event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _answers(card: State, *, bf16: bool, capability: tuple[int, int], name: str) -> dict[str, Any]:
    """name in torch.cuda → what answers it."""

    def memory(device: Any = None) -> Any:
        return card.memories[check_index(card_device(device).index)]

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        it = memory(device)
        return it.total - it.reserved, it.total

    def reset_peak(device: Any = None) -> None:
        it = memory(device)
        it.peak, it.reserved_peak = it.used, it.reserved

    def empty_cache() -> None:
        for it in card.memories:
            it.reserved = it.used

    def synchronize(device: Any = None) -> None:
        card.waited("torch.cuda.synchronize")

    def properties(device: Any = None) -> Any:
        major, minor = capability
        return SimpleNamespace(
            name=name,
            total_memory=memory(device).total,
            major=major,
            minor=minor,
            multi_processor_count=76,
            warp_size=32,
            max_threads_per_multi_processor=1536,
        )

    def manual_seed_all(seed: int) -> None:
        for each in generators:
            each.manual_seed(seed)

    def state_of(device: Any = "cuda") -> Any:
        return generators[card_device(device).index].get_state()

    def set_state(value: Any, device: Any = "cuda") -> None:
        generators[card_device(device).index].set_state(value)

    def memory_stats(device: Any = None) -> dict[str, int]:
        it = memory(device)
        return {
            "allocated_bytes.all.current": it.used,
            "allocated_bytes.all.peak": it.peak,
            "reserved_bytes.all.current": it.reserved,
            "reserved_bytes.all.peak": it.reserved_peak,
        }

    generators = tuple(CardGenerator(f"cuda:{index}") for index in range(len(card.memories)))
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "_initialized": True,
        "device_count": lambda: len(card.memories),
        "current_device": tensors.current,
        "set_device": lambda device: set_current(check_index(card_device(device).index)),
        "device": _Device,
        "_exchange_device": _exchanged,
        "_maybe_exchange_device": _exchanged,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda including_emulation=True: bf16,
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda device=None: memory(device).reserved,
        "max_memory_reserved": lambda device=None: memory(device).reserved_peak,
        "memory_allocated": lambda device=None: memory(device).used,
        "max_memory_allocated": lambda device=None: memory(device).peak,
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": empty_cache,
        "ipc_collect": lambda: None,
        "synchronize": synchronize,
        "default_generators": generators,
        "manual_seed": lambda seed: generators[tensors.current()].manual_seed(seed),
        "manual_seed_all": manual_seed_all,
        "get_rng_state": state_of,
        "set_rng_state": set_state,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "stream": lambda stream: contextlib.nullcontext(),
    }


def _accelerator_answers(card: State) -> dict[str, Any]:
    """name in torch.accelerator → what answers it, by torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: len(card.memories),
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": tensors.current,
        "current_stream": lambda device=None: Stream(device),
        "set_device_index": lambda device: set_current(check_index(card_device(device).index)),
        "synchronize": lambda device=None: card.waited("torch.accelerator.synchronize"),
        "empty_cache": lambda: torch.cuda.empty_cache(),
    }


def _exchanged(index: int) -> int:
    before = tensors.current()
    if index >= 0:
        set_current(index)
    return before


def _grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """torch._C._group_tensors_by_device_and_dtype with the devices that tensors say they are on."""
    groups: dict[Any, Any] = {}
    for number, first in enumerate(lists[0]):
        key = (first.device, first.dtype)
        if key not in groups:
            groups[key] = ([[] for _ in lists], [])
        for into, each in zip(groups[key][0], lists, strict=True):
            if each:
                into.append(each[number])
        if with_indices:
            groups[key][1].append(number)
    return groups


def _in_modes(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """A thread's run inside the card's modes, which belong to one thread each."""

    def inside(self: Any) -> None:
        if not tensors._active:
            return run(self)
        with tensors.DispatchMode(), tensors.FunctionMode():
            return run(self)

    return inside


def _applied(apply: Callable[..., Any]) -> Callable[..., Any]:
    """nn.Module._apply, which moves gradients by their data; those of another kind have to be new objects."""

    def moved(self: Any, fn: Any, recurse: bool = True) -> Any:
        own = [each for each in self._parameters.values() if each is not None and each.grad is not None]
        gradients = [each.grad for each in own]
        for each in own:
            each.grad = None
        done = apply(self, fn, recurse)
        with torch.no_grad():
            for each, gradient in zip(own, gradients, strict=True):
                each.grad = fn(gradient)
        return done

    return moved


@contextlib.contextmanager
def installed(card: State, **answers: Any) -> Iterator[None]:
    """torch knows the card inside."""
    if tensors._active:
        raise RuntimeError("a pretend card is active already")
    casts = Casts()
    tensors._active.append(card)
    lists = (
        importlib.import_module("torch.optim.optimizer")._foreach_supported_types,
        torch.utils._foreach_utils._foreach_supported_types,
    )
    try:
        with contextlib.ExitStack() as stack:
            set_current(0)
            for name, answer in _answers(card, **answers).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            for name, answer in _accelerator_answers(card).items():
                stack.enter_context(mock.patch.object(torch.accelerator, name, answer))
            for owner, name, value in (
                (torch, "Generator", CardGenerator),
                (torch, "clear_autocast_cache", casts.clear),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
                (torch.nn.Module, "_apply", _applied(torch.nn.Module._apply)),
                (threading.Thread, "run", _in_modes(threading.Thread.run)),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            for supported in lists:
                supported.append(CardTensor)  # type: ignore[arg-type]
                stack.callback(supported.remove, CardTensor)  # type: ignore[arg-type]
            stack.enter_context(tensors.DispatchMode())
            stack.enter_context(tensors.FunctionMode())
            yield
    finally:
        tensors._active.remove(card)
        casts.close()
