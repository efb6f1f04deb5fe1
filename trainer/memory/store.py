"""Store: results of tracing, kept on disk between commands, because a trace takes seconds and never changes.

Owns the folder, the file format and what a stored result is valid for: a file is found only under the same question,
the same versions of the libraries that build the networks, and the same source code of this tool's rooms that take
part. The folder can be deleted at any time. Anything that cannot be read or written is treated as not stored.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import MachineError
from trainer.files import make_folder, sweep, write_atomic
from trainer.memory import shipped

T = TypeVar("T")
FOLDER = "HPO_CACHE"  # environment variable: where results are kept instead of ~/.cache/lora-hpo
FORMAT = 1
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
ROOMS = ("memory", "adapters", "bases", "compute")  # their code decides what is traced
MOST_FILES = 400  # a trace takes 20 to 200 kB; the files not used for longest are removed
MOST_BYTES = 50_000_000  # of one file, unpacked
_UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
    MemoryError,
)


def stored(question: dict[str, Any], unpack: Callable[[Any], T], compute: Callable[[], tuple[T, Any]]) -> T:
    """The stored answer to ``question`` (JSON), else the one in the package, else the computed one, which is stored.

    ``compute`` returns the answer and its JSON form, ``unpack`` makes the answer from that form.
    """
    path, asked = _place(question)
    if path is not None:
        with contextlib.suppress(*_UNREADABLE):
            answer = unpack(_read(path, asked))
            with contextlib.suppress(OSError):
                os.utime(path)
            return answer
    with contextlib.suppress(lzma.LZMAError, *_UNREADABLE):
        return unpack(shipped.read(question, versions()))
    answer, table = compute()
    if path is not None:
        with contextlib.suppress(MachineError, *_UNREADABLE):
            _write(path, {"question": asked, "answer": table})
    return answer


def cache_folder() -> Path | None:
    """Where results are kept: $HPO_CACHE, else lora-hpo in $XDG_CACHE_HOME or ~/.cache; None if there is no home."""
    if own := os.environ.get(FOLDER):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative path is ignored
        return Path(base) / "lora-hpo"
    try:
        return Path.home() / ".cache" / "lora-hpo"
    except RuntimeError:
        return None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector waits, and leaves out everything that existed before: importing the libraries and
    tracing make hundreds of thousands of objects that stay, and looking through them takes a fifth of the time. What
    the caller left out stays left out."""
    was_on, left_out = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not left_out:
            gc.unfreeze()
        if was_on:
            gc.enable()


def _place(question: dict[str, Any]) -> tuple[Path | None, Any]:
    """The file of a question, and the question with everything that its answer depends on."""
    folder, code = cache_folder(), _code()
    if folder is None or code is None:
        return None, None
    asked = json.loads(json.dumps({**question, "format": FORMAT, "versions": versions(), "code": code}))
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return folder / "traces" / f"{digest[:40]}.json.gz", asked


@cache
def versions() -> dict[str, str]:
    """Library → version, for everything that decides what the networks look like."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@cache
def _code() -> str | None:
    """sha256 of the source code that decides what is traced; None if it cannot be read."""
    root = Path(__file__).parents[1]
    files = [path for room in ROOMS for path in sorted((root / room).glob("*.py"))]
    try:
        digest = hashlib.sha256()
        for path in [*files, root / "config.py", root / "settings.py"]:
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


def _read(path: Path, asked: Any) -> Any:
    with gzip.open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError("not a stored result")
    body = json.loads(content)
    if body["question"] != asked:
        raise ValueError("the answer to another question")
    return body["answer"]


def _write(path: Path, body: Any) -> None:
    make_folder(path.parent)
    write_atomic(path, gzip.compress(json.dumps(body, separators=(",", ":")).encode(), 6, mtime=0))
    sweep(path.parent)
    files = sorted(path.parent.glob("*.json.gz"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in files[MOST_FILES:]:
        old.unlink(missing_ok=True)
