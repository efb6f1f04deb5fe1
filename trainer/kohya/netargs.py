"""network_args while they are translated: each argument is taken once, and what nobody takes has no effect.

sd-scripts passes every argument as a text, and its network modules ignore the ones they do not know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from trainer.arguments import literal
from trainer.checks import suggestion
from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError
from trainer.kohya.keys import LORA_PLUS
from trainer.kohya.reading import Reading
from trainer.text import clean_text
from trainer.tomlfile import as_text


class Arguments:
    """The arguments of one network module. ``left`` are those that nobody took yet."""

    def __init__(self, reading: Reading, values: Mapping[str, Any]) -> None:
        self.reading = reading
        self.left = {name: _unquoted(value) for name, value in values.items()}

    def take(self, name: str) -> Any:
        """The value, which nobody sees any more; None if it is not given, or given without a value."""
        value = self.left.pop(name, None)
        return None if value == "" else value

    def number(self, name: str) -> Any:
        """The same for a number. Raises ConfigError for anything else."""
        value = self.take(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise ConfigError(f"network_args {name} = {as_text(value)} is not a number", f"write {name}=4")

    def flag(self, name: str) -> bool:
        """Whether an argument is on; ``False`` in any spelling and 0 are off."""
        value = self.take(name)
        return str(value).strip().lower() not in ("none", "false", "0", "")

    def set(self, name: str, value: Any, setting: str = "") -> None:
        """The argument is a setting."""
        setting = setting or name
        self.reading.given[setting] = value
        self.reading.say(f"network_args {name}", value, f"{setting} = {as_text(value)}")

    def use(self, *names: str) -> None:
        """Numbers and texts that are settings of the same name."""
        for name in names:
            if (value := self.take(name)) is not None:
                self.set(name, multipliers(value) if isinstance(getattr(TrainConfig(), name), str) else value)

    def use_flags(self, *names: str) -> None:
        """Switches that are settings of the same name; off is their default."""
        for name in names:
            if name in self.left and self.flag(name):
                self.set(name, True)

    def use_lora_plus(self) -> None:
        """LoRA+ ratios; ratios of 0 ask for nothing."""
        for name in LORA_PLUS:
            if value := self.number(name):
                self.set(name, value)

    def nothing(self, name: str, why: str) -> None:
        """An argument without effect, if it is given and asks for something."""
        if name in self.left and (value := self.take(name)) not in (None, 0, False, "False", "false"):
            self.reading.without_effect.append(f"network_args {name} = {as_text(value)}: {why}")

    def rest(self, module: str, known: Collection[str]) -> None:
        """What is left has no effect: its module ignores it, and so does this tool."""
        for name, value in self.left.items():
            meant = suggestion(name, [*known, *SETTINGS]) or f"{module} has no such argument"
            if name in SETTINGS and name not in known:
                meant = f"{module} does not read it; to use it here, give --set {name}=…"
            shown = f"network_args {clean_text(name)[:80]} = {as_text(value)}"
            self.reading.without_effect.append(f"{shown}: {meant}")
        self.left = {}


def multipliers(value: Any) -> str:
    """Numbers of blocks as one text: from a list, a number, or the name of a shape."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple | list) else str(value)


def _unquoted(value: Any) -> Any:
    """The value without the quotes that kohya_ss writes around it: ``conv_dim="8"``."""
    if isinstance(value, str):
        text = value.strip().strip("\"'")
        return literal(text) if text else ""
    return value
