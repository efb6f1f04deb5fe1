"""TOML files: reading, flattening of sections, and values as text for display.

Owns the errors for unreadable files. Does not own the meaning of keys; see ``trainer.kohya.read`` and
``trainer.data.subsets``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.reading import MAX_SETTINGS_BYTES, read_small
from trainer.text import clean_text

# Settings whose value can be a table of key = value; every other table is a section.
ARGUMENTS = ("optimizer_args", "lr_scheduler_args", "network_args")


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError if it cannot be read."""
    path = Path(path)
    shown = clean_text(str(path))
    try:
        table = tomllib.loads(read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {shown}: {error.strerror}", "give a TOML file with settings"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{shown} is not valid TOML: {clean_text(str(error))}", "correct this line"
        ) from error
    return table


def flat(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a file without its sections. Lists of tables (``[[datasets]]``) are kept as one value."""
    shown = clean_text(str(path))
    found: dict[str, Any] = {}
    for name, value in _pairs(table):
        if name in found and found[name] != value:
            raise ConfigError(
                f"{clean_text(name)} is set twice in {shown}: {as_text(found[name])} and {as_text(value)}",
                "keep one of them",
            )
        found[name] = value
    if not found:
        raise ConfigError(f"{shown} has no settings", "write at least one, for example learning_rate = 1e-4")
    return found


def _pairs(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in table.items():
        is_section = isinstance(value, dict) and name not in ARGUMENTS
        pairs += _pairs(value) if is_section else [(name, value)]
    return pairs


def as_text(value: Any) -> str:
    """A value as written in TOML, short and safe to print."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return clean_text(shown)[:80]
