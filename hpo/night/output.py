"""The output of a worker that outlives its terminal: a closed window, a lost connection.

Writing to a terminal that is gone fails with EIO.  From then on, what would have gone to it goes to ``output.log`` in
the folder of the work.  A stream that is a file or a pipe stays what it is.  The supervisor leaves its terminal as
well, so the workers that it starts afterwards write to ``output.log`` from the start.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = "output.log"


class Output:
    """Standard output and standard error of this process and of its later forks.  ``root``: the folder of the work,
    None if not yet known."""

    def __init__(self, root: Callable[[], Path | None]) -> None:
        self._root = root
        self._shown = mmap.mmap(-1, 8)  # shared with forks
        self._terminals = [number for number in (0, 1, 2) if _is_terminal(number)]
        self._lost: list[int] = []  # outputs that go nowhere, because the folder was not known yet
        for name, number in (("stdout", 1), ("stderr", 2)):
            if number in self._terminals:
                setattr(sys, name, self._lasting(getattr(sys, name), number))

    @property
    def shown(self) -> int:
        """Bytes that this process and its forks have written to the terminal, or to what took its place."""
        return int.from_bytes(self._shown[:], "little")

    def shows(self, size: int) -> None:
        """So many more bytes were written."""
        self._shown[:] = (self.shown + size).to_bytes(8, "little")

    def leave_if_gone(self) -> None:
        """Leave the terminal if it is gone, which a process that ignores SIGHUP is not told."""
        if not all(map(_is_terminal, self._terminals)):
            self.leave_terminal()

    def leave_terminal(self) -> None:
        """The terminal is gone."""
        left, self._terminals = self._terminals, []
        if not left:
            return
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in left:
            os.dup2(nothing, number)
        os.close(nothing)
        self._lost = [number for number in left if number]
        self.finds_log()

    def finds_log(self) -> None:
        """Write what goes nowhere to the log, once the folder is known."""
        file = self._opened() if self._lost else None
        if file is None:
            return
        for number in self._lost:
            os.dup2(file, number)
        os.close(file)
        self._lost = []

    def _opened(self) -> int | None:
        root = self._root()
        if root is not None:
            with contextlib.suppress(OSError):
                return os.open(root / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return None

    def _lasting(self, stream: Any, number: int) -> io.TextIOWrapper:
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(_Lasting(number, self)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=True,
            write_through=stream.write_through,
        )


class _Lasting(io.FileIO):
    """A descriptor whose terminal may go away while it is written to."""

    def __init__(self, number: int, output: Output) -> None:
        super().__init__(number, "wb", closefd=False)
        self._output = output

    def write(self, data: Any) -> int:
        try:
            size = super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._output.leave_terminal()
            size = super().write(data)
        self._output.shows(size or 0)
        return size


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
