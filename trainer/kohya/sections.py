"""The sections of a file of sd-scripts become one table.

Setting names are unique in sd-scripts, so section names have no meaning. Reads as ``read_config_from_file`` in
sd-scripts' ``library/train_util.py``: the keys of all tables that stand at the top level are joined, and of two values
the later one wins. A table inside a table stays a value of its own, which no setting takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.text import clean_text
from trainer.tomlfile import as_text


@dataclass(frozen=True)
class Joined:
    """``sections`` has the section of each value, "" at the top. ``repeated`` has a line for each key with different
    values."""

    values: Mapping[str, Any]
    sections: Mapping[str, str]
    repeated: tuple[str, ...] = ()


def join(table: Mapping[str, Any]) -> Joined:
    """One table of the sections of a file."""
    values: dict[str, Any] = {}
    sections: dict[str, str] = {}
    repeated: list[str] = []
    for name, value, section in _pairs(table):
        if name in values and values[name] != value:
            earlier = f"{as_text(values[name])} {_place(sections[name])}"
            repeated.append(
                f"{clean_text(name)} = {as_text(value)} {_place(section)} → the later value is used, as by "
                f"sd-scripts; the earlier one is {earlier}"
            )
        values[name] = value
        sections[name] = section
    return Joined(values, sections, tuple(repeated))


def _pairs(table: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from ((inner, kept, name) for inner, kept in value.items())
        else:
            yield name, value, ""


def _place(section: str) -> str:
    return f"in [{clean_text(section)}]" if section else "at the top"
