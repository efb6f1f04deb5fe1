"""Every command says that it has started before it imports anything that takes seconds, and leaves stdout alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hpo.cli.main import main

HEAVY = ("torch", "optuna", "diffusers", "transformers", "open_clip", "peft", "rich", "sqlalchemy")
# Writes a line to stderr when a library is first looked for: it stands among what the command itself writes.
WATCHED = f"""
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {HEAVY!r}:
            os.write(2, f"IMPORT {{name}}\\n".encode())

sys.meta_path.insert(0, Watch())
from hpo.cli.main import main
main(sys.argv[1:])
"""


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


def needed(command: click.Command) -> list[str]:
    """Words for what the command requires.  No such file exists, so that it ends early."""
    words: list[str] = []
    for p in command.params:
        if p.required:
            value = p.type.choices[0] if isinstance(p.type, click.Choice) else f"missing-{p.name}"
            words += [value] if isinstance(p, click.Argument) else [p.opts[0], value]
    return words


@pytest.mark.parametrize(
    ("names", "command"), commands(main), ids=lambda of: " ".join(of) if type(of) is tuple else ""
)
def test_the_first_line_comes_before_the_first_slow_import(
    names: tuple[str, ...], command: click.Command, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *names, *needed(command)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[0] == f"hpo {' '.join(names)}: starting …", done.stdout


def test_what_scripts_read_is_not_disturbed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hpo.cli", "dataset"]
    subprocess.run([*words, "demo", "character", str(tmp_path / "demo")], check=True, capture_output=True)
    done = subprocess.run(
        [*words, "check", str(tmp_path / "demo"), "--for", "mini-sd15", "--json"],
        check=True,
        capture_output=True,
    )
    assert json.loads(done.stdout)["usable"] is True
    assert done.stderr.decode().startswith("hpo dataset check: starting …")
