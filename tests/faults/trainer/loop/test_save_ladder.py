"""A checkpoint while the process dies or the disk is full, at every call of the system that writes it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.zygote import attempt
from tests.tiny import tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.errors import MachineError
from trainer.files import sweep
from trainer.loop import checkpoint
from trainer.loop.checkpoint import Progress, Run
from trainer.loop.optim import build_optimizer

pytestmark = pytest.mark.faults
CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "close")


def make_run(weight: float) -> Run:
    torch.set_num_threads(1)
    config = tiny_config()
    adapter = inject(tiny_base("sd15"), config)
    for parameter in adapter.trainable():
        parameter.data.fill_(weight)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(config, "base", "data", adapter, build_optimizer(config, adapter), scaler)


def at_call(
    number: int, act: Callable[[], None], names: tuple[str, ...] = CALLS, for_ever: bool = False
) -> list[int]:
    """Before the n-th call of the system from here on: ``act``.  ``for_ever``: before all later ones, too.  Returns the
    number of calls made so far, which goes on being counted."""
    made = [0]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            made[0] += 1
            if made[0] == number or (for_ever and made[0] > number):
                act()
            return original(*args, **more)

        setattr(os, name, wrapped)

    for name in names:
        wrap(name)
    return made


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(run: Run, folder: Path, number: int, act: Callable[[], None], **more: Any) -> None:
    """A save with a fault.  Exits with 0 if it came to no such call, else with 3 if it was whole all the same."""
    made = at_call(number, act, **more)
    try:
        checkpoint.save(folder, run, Progress(2))
    except MachineError as error:
        assert "disk full" in error.message and "free some space" in error.hint
        raise SystemExit(MachineError.exit_code) from None
    raise SystemExit(3 if made[0] >= number else 0)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    folder = tmp_path / "before"
    folder.mkdir()
    checkpoint.save(folder, make_run(1.0), Progress(1))
    return folder


def restored(folder: Path, run: Run) -> int:
    """The step that is restored; its weights are those that were saved in it."""
    step = checkpoint.restore(folder, run).step
    weights = {float(w) for parameter in run.adapter.trainable() for w in parameter.detach().unique()}
    assert weights == {float(step)}
    return step


def test_a_kill_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    before: Path, tmp_path: Path
) -> None:
    """A2 · weight 5 · A run is killed while it saves a checkpoint, at any call of the system → The checkpoint before or
    the new one is there and whole. What is incomplete is removed at the next start.
    """
    run, reader = make_run(2.0), make_run(0.0)
    found, number, code = [], 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        folder = tmp_path / f"{number}"
        shutil.copytree(before, folder)
        code = attempt(save, run, folder, number, die)
        sweep(folder)
        assert not list(folder.glob(".tmp*"))
        found.append(restored(folder, reader))
    assert code == 0 and number > 20, "the ladder ends where nothing is left to kill"
    assert found == sorted(found) and found[0] == 1 and found[-1] == 2


def test_a_full_disk_at_any_call_of_a_save_keeps_the_checkpoint_before(before: Path, tmp_path: Path) -> None:
    """B1 · weight 5 · The disk is full while a checkpoint is saved → The checkpoint before stays, nothing incomplete is
    left, and the error says how much room is needed. With room, the same command goes on.
    """
    run, reader = make_run(2.0), make_run(0.0)
    full = {"names": ("write", "fsync", "mkdir"), "for_ever": True}
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        folder = tmp_path / f"{len(codes)}"
        shutil.copytree(before, folder)
        codes.append(attempt(lambda f=folder: save(run, f, len(codes) + 1, no_room, **full)))
        assert codes[-1] in (0, 3, MachineError.exit_code)
        assert not list(folder.glob(".tmp*"))
        assert restored(folder, reader) in ((1, 2) if codes[-1] == MachineError.exit_code else (2,))
    assert codes.count(MachineError.exit_code) > 5
    checkpoint.save(tmp_path / "0", run, Progress(2))
    assert restored(tmp_path / "0", reader) == 2
