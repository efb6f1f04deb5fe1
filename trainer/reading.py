"""Reading small files that others made: settings, captions, prompts, configurations.

Owns that only files are read, and only up to a size: reading a pipe that nobody writes to waits for ever, and a device
such as /dev/zero has no end. Does not own the contents, nor the errors that name a file; callers have their own words.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_SETTINGS_BYTES = 1 << 20  # of a file that people write: settings, prompts, a study
_OPENED = ("/dev/fd/", "/proc/self/fd/")  # what a shell opened: hpo train <(…)
_PIPED = "/dev/stdin"  # cat x.toml | hpo train /dev/stdin


def open_file(path: Path) -> BinaryIO:
    """A file, open for reading.

    Raises OSError, also for a folder (EISDIR) and for what is no file (EINVAL); ``strerror`` says which.  A pipe is
    read only where the shell opened it.
    """
    opened = str(path).startswith(_OPENED) or str(path) == _PIPED
    # without O_NONBLOCK, opening a pipe waits for someone who writes
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if opened else os.O_NONBLOCK))
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not (stat.S_ISREG(kind) or (opened and stat.S_ISFIFO(kind))):
            raise OSError(errno.EINVAL, "it is not a file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The content of a file.  Raises OSError as ``open_file``, and for more than ``limit_bytes`` (EFBIG)."""
    with open_file(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {size_words(limit_bytes)}")
    return content


def size_words(size_bytes: int) -> str:
    """1 MB for 2²⁰ bytes."""
    for unit, power in (("MB", 20), ("kB", 10)):
        if size_bytes >= 1 << power:
            return f"{size_bytes / (1 << power):.4g} {unit}"
    return f"{size_bytes} bytes"
