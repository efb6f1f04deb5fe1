"""Setup before a command runs: a sign of life, silent libraries, and the console."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def sign_of_life() -> None:
    """Say on stderr that the command has started, because the libraries it loads can take seconds.

    stdout is left to the command's own output, which scripts read.
    """
    import click

    context: click.Context | None = click.get_current_context()
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    click.echo(f"hpo {' '.join(names)}: starting …", err=True)


def calm_libraries() -> None:
    """Turn off progress bars and developer warnings.  Call before torch, diffusers and others are imported."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
