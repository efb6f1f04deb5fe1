"""What ``--json`` prints, in every command that has it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import numpy as np

from hpo.cli.main import main
from hpo.terminal import json_text

# Commands that only read or check something.
READING = {
    "best", "dataset check", "doctor", "importance", "inspect", "plan", "status", "studies", "watch",
    "train",  # --dry-run
}  # fmt: skip


def test_numbers_are_finite_or_null_and_nothing_can_control_a_terminal() -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, (1.5, np.float64("-inf"))],
        3: Path("x/y"),
        "c": "\x1b[31mä",
        "d": None,
    }
    text = json_text(value)
    assert json.loads(text) == {"a": None, "b": [None, [1.5, None]], "3": "x/y", "c": "\x1b[31mä", "d": None}
    assert text.isascii() and "\x1b" not in text


def test_every_reading_command_has_json() -> None:
    found = set()
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        for word, one in inner.items():
            if any("--json" in param.opts for param in one.params):
                found.add(f"{name} {word}".strip())
    assert found == READING


def test_no_command_writes_its_json_in_another_way() -> None:
    root = Path(__file__).parents[4] / "hpo"
    found = [
        path for path in (root / "cli").glob("*.py") if "json.dumps(" in path.read_text(encoding="utf-8")
    ]
    assert found == [] and "json.dumps(" not in (root / "train" / "dryrun.py").read_text(encoding="utf-8")
