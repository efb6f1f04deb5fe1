"""Writing files safely: atomic files, atomic folders with a manifest, appended lines, safe names.

All files are written through this module. It guarantees that after a crash a path has the old or the new
content, never a mixture, and that incomplete files have a temporary name (``.tmp-<pid>-<machine>-…``) that ``sweep``
recognises. Does not own the content of files.

On a full disk, missing permissions and similar problems, all functions raise MachineError and
leave no temporary files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import RESUME, ConfigError, MachineError
from trainer.text import clean_text

MANIFEST = "manifest.json"
TRANSIENT = ("-wal", "-shm")  # files of an open database
MANIFEST_FORMAT = 1
_TEMPORARY = re.compile(r"\.tmp-(\d{1,10})-(?:([0-9a-f]{8})-)?[0-9a-f]+")  # earlier versions: no machine
FORGOTTEN_SECONDS = 24 * 3600  # assumed: no file of another machine is written for so long
_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HINTS = {
    errno.EACCES: "check the owner and the permissions of the folder",
    errno.EPERM: "check the owner and the permissions of the folder",
    errno.EROFS: "the disk is mounted read-only; choose a folder on another disk",
    errno.ENOENT: "the folder does not exist; check whether it was moved or deleted",
    errno.ENOTDIR: "part of the path is a file, not a folder; check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk reports an error; check the system log",
}
# "Disk full" messages of native writers: safetensors raises its own error, torch.save a RuntimeError.
_FOREIGN_DISK_FULL = (
    "No space left on device",
    "os error 28",
    "File too large",
    "PytorchStreamWriter failed",
    "inline_container.cc",
    "iostream error",
)


def machine_error(error: OSError, path: Path, needed_bytes: int = 0) -> MachineError:
    """An OS error about ``path`` as a MachineError with a hint."""
    if error.errno in _DISK_FULL:
        needs = f"at least {_amount(needed_bytes)}" if needed_bytes else "more"
        return MachineError(
            f"disk full while writing {path}: needs {needs}, has {_amount(free_bytes(path))}",
            f"free some space; to go on where it stopped: {RESUME}",
        )
    reason = error.strerror or str(error)
    return MachineError(
        f"cannot write {path}: {reason}", _HINTS.get(error.errno or 0, "check the disk and the path")
    )


# Files


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace the file ``path`` in one step.  Text is written as UTF-8.  The parent folder must exist."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = _temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise machine_error(error, path, len(content)) from error
    finally:
        _remove(temporary)


def write_new(path: Path, data: str) -> bool:
    """Write the file ``path`` in one step if it does not exist; returns whether it was written.  Of several processes,
    also on several machines, one writes it."""
    path, content = Path(path), data.encode()
    temporary = _temporary_beside(path)
    try:
        write_atomic(temporary, content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or path.exists():
                raise
            os.replace(temporary, path)  # a disk without links, such as exFAT
        _sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise machine_error(error, path, len(content)) from error
    finally:
        _remove(temporary)
    return True


def append_line(path: Path, text: str, *, shared: bool = False) -> None:
    """Append one line to a log. If the last line is incomplete (after a kill or on a full disk), a
    new line is started.

    Not synced: a power failure can lose the last lines but does not mix them. Only one writer per file, because on a
    full disk half a line is cut off again. ``shared``: for several writers; a line is written at once, and half a line
    stays, which ``read_records`` skips.
    """
    assert "\n" not in text and "\r" not in text, "append_line writes exactly one line"
    content = text.encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content
            if shared:
                if os.write(descriptor, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return
            try:
                _write_all(descriptor, content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise machine_error(error, Path(path), len(content)) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file, line by line; incomplete lines are skipped. Empty if there is no file."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = []
    for line in lines[:-1]:  # text after the last newline is empty or incomplete
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def folder_bytes(root: Path) -> int:
    """Sizes of all files that stay, without those of an open database.  Files that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(root):
        for name in (n for n in names if not n.endswith(TRANSIENT)):
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def sha256_file(path: Path) -> str:
    """sha256 of the content of a file, in hex.  Raises OSError that names the file, also if reading fails midway."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the disk of ``path``, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed_bytes: int) -> None:
    """Raise MachineError if fewer than ``needed_bytes`` are free at ``path``."""
    has = free_bytes(path)
    if has < needed_bytes:
        raise MachineError(
            f"not enough disk space at {path}: needs {_amount(needed_bytes)}, has {_amount(has)}",
            "free some space, or choose a folder on another disk",
        )


# Folders


def make_folder(path: Path) -> None:
    """Create the folder and its parents if they are missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, path) from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` if the block succeeds and is removed otherwise.

    ``manifest.json`` (size and sha256 of every file) is written last, everything is synced, then the folder is
    renamed.  ``path`` must not exist yet: a folder cannot be replaced in one step, so callers use new names.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        os.mkdir(temporary)
        yield temporary
        contents = {}
        for file in sorted(p for p in temporary.rglob("*") if not p.is_dir()):
            assert file.is_file() and not file.is_symlink(), f"{file} is not a plain file"
            contents[file.relative_to(temporary).as_posix()] = {
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            _sync(file)
        write_atomic(
            temporary / MANIFEST,
            json.dumps({"format": MANIFEST_FORMAT, "files": contents}, indent=2, sort_keys=True),
        )
        for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
            _sync(folder)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise machine_error(error, path, _folder_bytes(temporary)) from error
    except Exception as error:
        if any(sign in str(error) for sign in _FOREIGN_DISK_FULL):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise machine_error(full, path, _folder_bytes(temporary)) from error
        raise
    finally:
        _remove(temporary)


def verify_folder(path: Path) -> bool:
    """Whether ``atomic_folder`` completed a folder and every file in its manifest is unchanged."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != MANIFEST_FORMAT or not isinstance(manifest["files"], dict):
            return False
        return all(_is_unchanged(path, name, facts) for name, facts in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def sweep(folder: Path, *, everyone: bool = False) -> int:
    """Remove incomplete files of dead processes from ``folder``; returns the number of removed entries.

    Whether a process of another machine lives cannot be seen from here: its files go when they are a day old.
    ``everyone``: no other process may write here any more, so all but this process's own files go.
    """
    removed = 0
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and _is_left(Path(folder) / name, int(match[1]), match[2], everyone):
            _remove(Path(folder) / name)
            removed += 1
    return removed


def sweep_tree(folder: Path, *, everyone: bool = False) -> int:
    """``sweep`` in ``folder`` and everything below it."""
    removed = sweep(folder, everyone=everyone)
    for path in [entry for entry in Path(folder).glob("*") if entry.is_dir() and not entry.is_symlink()]:
        removed += sweep_tree(path, everyone=everyone)
    return removed


# Names and text


def safe_name(text: str, what: str) -> str:
    """``text`` if it is a valid name on any disk and in any URL. Raises ConfigError that says ``what``
    the name is for."""
    if not _SAFE_NAME.fullmatch(text):
        raise ConfigError(
            f"{what} {clean_text(text)[:80]!r} cannot be used as a name",
            "use 1 to 64 of a–z, 0–9, _ and -, starting with a letter or digit",
        )
    return text


# Helpers


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".tmp-{os.getpid()}-{machine_id()}-{secrets.token_hex(4)}"


@functools.cache
def machine_id() -> str:
    """Eight hex digits for the processes that this one can see: of this machine since its start, in this container."""
    known = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            known.append(read())
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:8]


def _is_left(path: Path, pid: int, machine: str | None, everyone: bool) -> bool:
    """Whether nobody will finish the incomplete file at ``path``."""
    here = machine in (None, machine_id())
    if here and pid == os.getpid():
        return False
    if everyone or here:
        return everyone or not _is_alive(pid)
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > FORGOTTEN_SECONDS
    return False


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable. Some network and Windows disks refuse to sync; the
    rename is kept anyway."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _remove(path: Path) -> None:
    """Delete a file or folder if it exists. Never follows links."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def _is_unchanged(folder: Path, name: str, facts: dict[str, Any]) -> bool:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return False
    file = folder / parts
    information = file.lstat()
    return (
        stat.S_ISREG(information.st_mode)
        and information.st_size == facts["bytes"]
        and sha256_file(file) == facts["sha256"]
    )


def _folder_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.lstat().st_size for file in folder.rglob("*"))
    return 0


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _amount(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
