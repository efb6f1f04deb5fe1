"""Setup before a command runs: a sign of life, silent libraries, and the console."""

from __future__ import annotations

import contextlib
import importlib.abc
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

SLOW = ("torch", "diffusers", "transformers", "open_clip")  # each takes a second or more to import


class _SlowImports(importlib.abc.MetaPathFinder):
    """Says so once, before a library is imported that takes seconds.  Finds no module itself."""

    def __init__(self) -> None:
        self._said = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name in SLOW and not self._said:
            self._said = True
            sign_of_life("loading libraries …")


@contextlib.contextmanager
def announced_imports() -> Iterator[None]:
    """Inside, the first import of a slow library is announced.  A mistake that is found before that needs no line.

    A command that runs another one (hpo resume) announces it once."""
    if any(isinstance(finder, _SlowImports) for finder in sys.meta_path):
        yield
        return
    finder = _SlowImports()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def sign_of_life(what: str) -> None:
    """Say on stderr what the command is doing.  stdout is left to the command's output, which scripts read."""
    context = click.get_current_context(silent=True)
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    click.echo(f"{' '.join(['hpo', *names])}: {what}", err=True)


def calm_libraries() -> None:
    """Turn off progress bars and developer warnings.  Call before torch, diffusers and others are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait sleep. Else they run in a busy loop, and processes that share the cores stand still
    # (docs/devices.md). Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
