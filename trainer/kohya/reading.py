"""What is known while a file of sd-scripts is translated: the keys that are left, the settings found, and the lines
for the user. Each group of keys has a module of its own that takes its keys from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.arguments import parse
from trainer.tomlfile import as_text


class Reading:
    """``left`` are the keys of the file that nobody took yet, ``given`` the settings found so far."""

    def __init__(self, path: Path, table: Mapping[str, Any]) -> None:
        self.path = path
        # GUIs write "" and [] for unset values, and sd-scripts reads them as unset.
        self.left = {name: value for name, value in table.items() if value not in ("", [])}
        self.given: dict[str, Any] = {}
        self.translated: list[str] = []
        self.without_effect: list[str] = []
        self.refused: list[str] = []
        self.differs: list[str] = []
        self.output_dir: str | None = None

    def take(self, name: str) -> Any:
        """The value of a key, which no other translation sees any more; None if it is not set."""
        return self.left.pop(name, None)

    def say(self, name: str, value: Any, meaning: str) -> None:
        """The key is used, as something else."""
        self.translated.append(f"{name} = {as_text(value)} → {meaning}")

    def refuse(self, name: str, value: Any, reason: str) -> None:
        """The key asks for a result that cannot be had here."""
        self.refused.append(f"{name} = {as_text(value)}: {reason}")

    def differ(self, line: str) -> None:
        """The result is deliberately not that of the original: what differs, and why."""
        self.differs.append(line)


# Values


def key_values(name: str, value: Any) -> dict[str, Any]:
    """The arguments of network_args; values are Python literals."""
    return dict(parse(name, value).values)


def is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a value is one of the values without an effect. True and 1 are different here."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)
