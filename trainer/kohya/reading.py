"""What is known while a file of sd-scripts is translated: the keys that are left, the settings found, and the lines
for the user. Each group of keys has a module of its own that takes its keys from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.arguments import parse
from trainer.kohya.keys import KNOWN_KEYS, REFUSED, SWITCHES
from trainer.kohya.unknown import meaning
from trainer.tomlfile import as_text


class Reading:
    """``left`` are the keys of the file that nobody took yet, ``given`` the settings found so far. ``decided`` are the
    settings that something else decides (``--set``): a key that stands for one of them is not refused."""

    def __init__(
        self,
        path: Path,
        table: Mapping[str, Any],
        sections: Mapping[str, str] | None = None,
        decided: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.decided = decided or {}
        self.given: dict[str, Any] = {}
        self.translated: list[str] = []
        self.without_effect: list[str] = []
        self.unknown: list[str] = []
        self.refused: list[str] = []
        self.differs: list[str] = []
        self.output_dir: str | None = None
        self.left: dict[str, Any] = {}
        for name, value in table.items():
            if name not in KNOWN_KEYS:
                self.unknown.append(meaning(name, value, (sections or {}).get(name, "")))
            elif (asked := self._asked(name, value)) is not None:
                self.left[name] = asked

    def known(self, name: str, usual: Any = None) -> Any:
        """The value of a setting as far as it is known: by ``--set``, then by a translation, then in the file."""
        for values in (self.decided, self.given, self.left):
            if values.get(name) is not None:
                return values[name]
        return usual

    def take(self, name: str) -> Any:
        """The value of a key, which no other translation sees any more; None if it is not set."""
        return self.left.pop(name, None)

    def say(self, name: str, value: Any, meaning: str) -> None:
        """The key is used, as something else."""
        if as_text(value) != meaning:
            self.translated.append(f"{name} = {as_text(value)} → {meaning}")

    def refuse(self, name: str, value: Any, reason: str, *, stands_for: str = "") -> None:
        """The key asks for a result that cannot be had here, unless the setting it stands for is decided elsewhere."""
        if stands_for and stands_for in self.decided:
            self.say(name, value, f"ignored, because {stands_for} is given")
            return
        self.refused.append(f"{name} = {as_text(value)}: {reason}")

    def differ(self, line: str) -> None:
        """The result is deliberately not that of the original: what differs, and why."""
        self.differs.append(line)

    def _asked(self, name: str, value: Any) -> Any:
        """The value, or None if it asks for nothing. GUIs write "" and [] for what is not set; false, and 0 for a
        switch, are off in sd-scripts as well, which tests most settings for truth."""
        if value is None or value in ("", []):
            return None
        if name in SWITCHES:
            return self._switch(name, value)
        if value is False or (name in REFUSED and is_one_of(value, (0, "0", "false", "False"))):
            return None
        return value

    def _switch(self, name: str, value: Any) -> Any:
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            is_on = value.strip().lower() == "true"
            self.say(name, value, f"{as_text(is_on)}, without quotes")
            return is_on
        return bool(value) if is_one_of(value, (0, 1)) else value


# Values


def key_values(name: str, value: Any) -> dict[str, Any]:
    """The arguments of network_args; values are Python literals."""
    return dict(parse(name, value).values)


def is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a value is one of the values without an effect. True and 1 are different here."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)
