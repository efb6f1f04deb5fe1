"""Which error is a failed allocation, which a lost CUDA context, and that a failed attempt holds no tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.outofmemory import FORMS, LOST
from trainer import oom
from trainer.errors import DeviceLost, MachineError, OutOfMemory, ToolError


def either(form: str) -> Exception:
    return (FORMS | LOST)[form]()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_failed_allocation_is_one(form: str) -> None:
    with pytest.raises(OutOfMemory, match="while drawing"), oom.memory_named("out of memory while drawing"):
        raise either(form)


@pytest.mark.parametrize("form", LOST)
def test_a_lost_context_is_the_machines_and_no_failed_allocation(form: str) -> None:
    assert not oom.is_out_of_memory(either(form))
    with pytest.raises(DeviceLost, match="CUDA context is lost") as caught, oom.memory_named("out of memory"):
        raise either(form)
    assert isinstance(caught.value, MachineError) and "resume" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        ValueError("CUDA out of memory"),  # no library's error: a text of the user's
        OSError(28, "No space left on device"),
        MachineError("the disk is full"),
    ],
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, oom.memory_named("out of memory"):
        raise error
    assert caught.value is error and error.__traceback__ is not None


class Card:
    """A GPU in use with so many bytes free; None: it no longer answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
        def mem_get_info() -> tuple[int, int]:
            if free is None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return free, 16 * 10**9

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)


UNCLEAR = ("cublas at first use", "cudnn at first use", "cudnn kernels", "cudnn plans")


@pytest.mark.parametrize("form", UNCLEAR)
def test_what_libraries_leave_unclear_is_memory_only_on_a_full_card(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = either(form)
    with monkeypatch.context() as patch:
        Card(patch, 200_000_000)
        assert oom.is_out_of_memory(error) and not oom.is_device_lost(error)
    with monkeypatch.context() as patch:
        Card(patch, 9_000_000_000)
        assert not oom.is_out_of_memory(error) and not oom.is_device_lost(error)
    with monkeypatch.context() as patch:
        Card(patch, None)
        assert not oom.is_out_of_memory(error) and oom.is_device_lost(error)


def failing(form: str) -> tuple[ToolError, weakref.ref[torch.Tensor]]:
    """The named error of an attempt, still held, and a tensor of it."""
    found: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        activations = torch.zeros(8)
        found.append(weakref.ref(activations))
        try:
            raise KeyError("first")
        except KeyError:
            raise either(form)  # noqa: B904  as a library does: with a context

    try:
        with oom.memory_named("out of memory"):
            attempt()
    except ToolError as error:
        kept = error
    return kept, found[0]


@pytest.mark.parametrize("form", ["torch", "cpu", "illegal access"])
def test_an_error_that_is_kept_holds_no_tensor_of_the_failed_attempt(form: str) -> None:
    error, tensor = failing(form)
    assert tensor() is None
    assert isinstance(error, OutOfMemory | DeviceLost)


def limited(fits: int, form: str, seen: list[int]) -> Callable[[Sequence[int]], list[int]]:
    def work(part: Sequence[int]) -> list[int]:
        seen.append(len(part))
        if len(part) > fits:
            raise either(form)
        return [2 * value for value in part]

    return work


@pytest.mark.parametrize("form", ["torch", "cudnn", "python"])
def test_work_goes_on_in_halves_where_memory_runs_out_and_stays_there(form: str) -> None:
    seen: list[int] = []
    fitting = oom.Fitting(8)
    parts = list(fitting.each(range(11), limited(3, form, seen)))
    assert [value for part in parts for value in part] == [2 * value for value in range(11)]
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]
    assert fitting.size == 2


def test_one_value_that_does_not_fit_and_any_other_error_are_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(oom.Fitting(4).each(range(4), limited(0, "torch", [])))
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="illegal"):
        list(oom.Fitting(4).each(range(4), limited(0, "illegal access", seen)))
    assert seen == [4]
