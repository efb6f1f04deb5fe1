"""Locks: one alone or many together, never on a file that is gone, and troubles are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.study.locks import Lock
from tests.faults.zygote import attempt, finish, start
from trainer.errors import MachineError


def test_many_share_a_lock_and_the_last_one_may_have_it_alone(tmp_path: Path) -> None:
    path, here, go = tmp_path / "x.lock", os.pipe(), os.pipe()

    def share() -> None:
        assert Lock(path).try_acquire(shared=True)
        os.write(here[1], b"x")
        os.read(go[0], 1)

    lock = Lock(path)
    assert lock.try_acquire(shared=True)
    other = start(share)
    os.read(here[0], 1)
    assert not lock.try_alone()
    os.write(go[1], b"x")
    assert finish(other) == 0
    assert lock.try_alone()

    def refused() -> None:
        assert not Lock(path).try_acquire(shared=True)

    assert attempt(refused) == 0
    lock.release()


def test_a_lock_on_a_deleted_file_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "x.lock", []
    open_file = os.open

    def deleted_meanwhile(*words: object) -> int:
        descriptor = open_file(*words)  # type: ignore[arg-type]
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", deleted_meanwhile)
    lock = Lock(path)
    assert lock.try_acquire()
    assert len(opened) == 2 and path.is_file()
    lock.release()


def test_a_place_without_room_for_locks_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"cannot write .*x\.lock"):
        Lock(tmp_path / "file" / "x.lock").try_acquire()
