"""What a file turned out to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainer.checks import is_finite
from trainer.errors import ConfigError
from trainer.text import clean_text


@dataclass(frozen=True)
class Found:
    """``form`` says in words what the file is. ``settings`` are those of sd-scripts, flat, if a form of another program
    was translated (``is_translated``); else the table of the file as it is. ``dataset`` is a dataset description in the
    form of sd-scripts (``general``, ``datasets``). ``notes`` are lines for the user: what was translated and how."""

    form: str
    settings: Mapping[str, Any]
    dataset: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    is_translated: bool = False


def shown(path: Path) -> str:
    return clean_text(str(path))


def refuse(path: Path, what: str, hint: str) -> NoReturn:
    """End with what the file is and what to use instead."""
    raise ConfigError(f"{shown(path)} is {what}", hint)


def leaves(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a table and of the tables inside it; lists are values."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield name, value


def as_number(value: Any, otherwise: Any = None) -> Any:
    """A finite number that a window saved as a number or as a text; ``otherwise`` for anything else."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                value = kind(value.strip())
            except ValueError:
                continue
            break
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    return value if is_number else otherwise


def tidy(value: Any) -> Any:
    """A whole number without a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
