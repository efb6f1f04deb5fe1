"""Small files of others: only files are read, and only up to a size."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.places import ROOT
from trainer.reading import open_file, read_small


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        read_small(path, 4)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/tty0")
    with pytest.raises(OSError):
        read_small(path, 1000)


def test_a_pipe_of_the_shell_is_read() -> None:
    """``hpo train <(program)``."""
    end, start = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(start, b"steps = 1\n"), os.close(start)))
    writer.start()
    with open_file(Path(f"/dev/fd/{end}")) as file:
        assert file.read() == b"steps = 1\n"
    writer.join()
    os.close(end)


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_what_is_piped_into_a_command_is_read(name: str) -> None:
    """``cat x.toml | hpo train /dev/stdin``."""
    code = f"from pathlib import Path; from trainer.reading import read_small; print(read_small(Path({name!r}), 99))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, input="steps = 1", capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "b'steps = 1'\n", done.stderr
