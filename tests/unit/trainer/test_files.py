"""Files: after a crash or on a full disk, a path has the old or the new content, and no incomplete files remain."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import files
from trainer.errors import ConfigError, MachineError
from trainer.text import clean_text

OLD, NEW = b"old " * 1000, b"new " * 2000


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing_after(
    monkeypatch: pytest.MonkeyPatch, calls: int, number: int, names: tuple[str, ...], forever: bool
) -> Callable[[], int]:
    """Make the ``calls``-th call of some os functions fail, and all later ones; returns a counter of calls."""
    made = 0
    real = {name: getattr(os, name) for name in names}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real[name](*args, **kwargs)  # reading and removing folders work on a full disk
            made += 1
            if made == calls or (forever and made > calls):
                raise OSError(number, os.strerror(number))
            return real[name](*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, wrap(name))
    return lambda: made


# Atomic files


def test_a_file_is_replaced_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "a.json", "grün")
    files.write_atomic(tmp_path / "a.json", b"\x00new")
    assert (tmp_path / "a.json").read_bytes() == b"\x00new"
    assert listing(tmp_path) == ["a.json"]


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whichever_call_fails_the_old_file_or_the_new_one_is_there(
    tmp_path: Path, number: int, forever: bool
) -> None:
    outcomes = set()
    for rung in range(1, 20):
        target = tmp_path / "file"
        target.write_bytes(OLD)
        with pytest.MonkeyPatch.context() as patch:
            made = failing_after(patch, rung, number, ("open", "write", "fsync", "replace"), forever)
            try:
                files.write_atomic(target, NEW)
            except MachineError as error:
                assert str(target) in error.message
            else:
                assert made() < rung, "a failing call was ignored silently"
                break
        assert target.read_bytes() in (OLD, NEW)
        outcomes.add(target.read_bytes())
        assert listing(tmp_path) == ["file"]
    else:
        pytest.fail("the ladder never ended")
    assert OLD in outcomes


def test_a_short_write_goes_on_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    files.write_atomic(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == NEW


def test_a_full_disk_says_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "lora.safetensors"
    target.write_bytes(OLD)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(
            MachineError, match=r"disk full.*needs at least 1\.0 MB, has [\d.]+ [GMk]?B"
        ) as caught:
            files.write_atomic(target, b"x" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.exit_code == 5 and caught.value.hint
    assert target.read_bytes() == OLD and listing(tmp_path) == ["lora.safetensors"]


def test_ctrl_c_during_a_write_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "a", NEW)
    assert listing(tmp_path) == []


def test_a_missing_folder_is_a_machine_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file") as caught:
        files.write_atomic(tmp_path / "gone" / "a", b"")
    assert "moved or deleted" in caught.value.hint


# Appended lines


def test_a_torn_last_line_never_glues_to_the_next(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    files.append_line(log, '{"step": 1}')
    with log.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    files.append_line(log, '{"step": 3}')
    assert files.read_records(log) == [{"step": 1}, {"step": 3}]


def test_a_line_cut_by_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3 · weight 5 · The disk is full while a line of a log is written → The half line is taken back, so it is
    never read as data.
    """
    log = tmp_path / "train.jsonl"
    files.append_line(log, '{"step": 1}')
    before = log.read_bytes()
    real, calls = os.write, 0

    def half(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:5])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(MachineError, match="disk full"):
        files.append_line(log, '{"step": 2}')
    assert log.read_bytes() == before


def test_records_leave_out_what_is_not_whole(tmp_path: Path) -> None:
    log = tmp_path / "x.jsonl"
    log.write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n' + b"[" * 5000 + b'\n{"b": 2}\n{"c": 3}')
    assert files.read_records(log) == [{"a": 1}, {"b": 2}]
    assert files.read_records(tmp_path / "none") == []


# Folders


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "a.bin").write_bytes(OLD)
    (folder / "inner" / "b.bin").write_bytes(NEW)


def test_a_folder_appears_complete_and_verifies(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "step-1") as folder:
        fill(folder)
        assert not (tmp_path / "step-1").exists()
    assert listing(tmp_path) == ["step-1"]
    assert files.verify_folder(tmp_path / "step-1")
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert manifest["files"]["inner/b.bin"]["bytes"] == len(NEW)


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "step-1") as folder:
        fill(folder)
        raise ZeroDivisionError
    assert listing(tmp_path) == []


def test_whichever_call_fails_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    names = ("open", "write", "fsync", "replace", "mkdir", "rename")
    for rung in range(1, 60):
        target = tmp_path / f"step-{rung}"
        with pytest.MonkeyPatch.context() as patch:
            made = failing_after(patch, rung, errno.ENOSPC, names, forever=True)
            try:
                with files.atomic_folder(target) as folder:
                    fill(folder)
            except MachineError:
                pass
            else:
                assert made() < rung
                break
        assert files.verify_folder(target) if target.exists() else True
        assert not [name for name in listing(tmp_path) if name.startswith(".tmp")]
    else:
        pytest.fail("the ladder never ended")
    assert files.verify_folder(target)


def test_torch_and_safetensors_on_a_full_disk_are_machine_errors(tmp_path: Path) -> None:
    import safetensors.torch

    big = torch.zeros(100_000)
    savers = {
        "torch": lambda folder: torch.save(big, folder / "x.pt"),
        "safetensors": lambda folder: safetensors.torch.save_file({"x": big}, folder / "x.safetensors"),
    }
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        for name, save in savers.items():
            with (
                pytest.raises(MachineError, match="disk full"),
                files.atomic_folder(tmp_path / name) as folder,
            ):
                save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "a.bin").write_bytes(OLD[:-1]),
        lambda f: (f / "a.bin").write_bytes(b"X" + OLD[1:]),
        lambda f: (f / "inner" / "b.bin").unlink(),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "manifest.json").write_text("{"),
        lambda f: (f / "manifest.json").write_text("[" * 100_000),
        lambda f: (f / "manifest.json").write_text('{"format": 1, "files": [1]}'),
        lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {}}'),
        lambda f: (f / "manifest.json").write_text('{"format": 1, "files": {"a.bin": 3}}'),
        lambda f: ((f / "a.bin").rename(f / "c"), (f / "a.bin").symlink_to(f / "c")),
    ],
)
def test_a_damaged_folder_does_not_verify(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    with files.atomic_folder(tmp_path / "step-1") as folder:
        fill(folder)
    damage(tmp_path / "step-1")
    assert not files.verify_folder(tmp_path / "step-1")


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "step-1").mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        facts = {"bytes": 1, "sha256": files.sha256_file(tmp_path / "secret")}
        manifest = {"format": 1, "files": {name: facts}}
        (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(manifest))
        assert not files.verify_folder(tmp_path / "step-1")


def test_sweeping_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    place = tmp_path / "place"
    place.mkdir()
    (place / f".tmp-{child.pid}-0a").mkdir()
    (place / f".tmp-{child.pid}-0a" / "half").write_text("x")
    (place / f".tmp-{child.pid}-0b").write_text("x")
    (place / f".tmp-{child.pid}-0c").symlink_to(outside)
    kept = [f".tmp-{os.getpid()}-0a", ".tmp-nobody-0a", ".tmpABCDEF", "step-1", f"x.tmp-{child.pid}-0a"]
    for name in kept:
        (place / name).write_text("x")
    assert files.sweep(place) == 3
    assert listing(place) == sorted(kept)
    assert listing(outside) == ["keep"]
    assert files.sweep(tmp_path / "none") == 0


def test_a_kill_leaves_only_what_sweeping_removes(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(OLD)
    if (pid := os.fork()) == 0:
        os.replace = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        files.write_atomic(target, NEW)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert target.read_bytes() == OLD
    assert len(listing(tmp_path)) == 2
    assert files.sweep(tmp_path) == 1
    assert listing(tmp_path) == ["file"]


# Names, text, space


@pytest.mark.parametrize("name", ["a", "zed-character_2", "0", "a" * 64])
def test_plain_names_are_kept(name: str) -> None:
    assert files.safe_name(name, "study name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "../x",
        "..",
        ".",
        "-x",
        "_x",
        "A",
        "a b",
        "a\n",
        "ok\n",
        "a\x00",
        "é",
        "a" * 65,
        "CON",
        "a.b",
    ],
)
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="study name"):
        files.safe_name(name, "study name")


@given(st.text())
def test_clean_text_has_nothing_a_terminal_would_act_on(text: str) -> None:
    shown = clean_text(text)
    assert all(ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 for c in shown)
    assert not any(c in shown for c in "\x1b\x07\r\n\x9b\u202e\u2066\u2028")
    shown.encode()  # no surrogates


def test_clean_text_keeps_what_is_read_and_drops_what_acts() -> None:
    assert clean_text("caf\u00e9 \u732b 🙂") == "caf\u00e9 \u732b 🙂"
    assert clean_text("\x1b]0;title\x07a\x1b[31mb\nc\td\u202ee") == "]0;titlea[31mb c de"


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet" / "there", 1)
    assert files.free_bytes(tmp_path) > 0
    with pytest.raises(MachineError, match=r"needs 1000000000\.0 GB, has"):
        files.require_space(tmp_path, 10**18)
