"""``--set KEY=VALUE``: one grammar for all commands that accept settings on the command line.

VALUE is written as in TOML: a number, true or false, a "text", a [list] or a {table}. Any other word is read
as text; ``none`` or an empty value leaves the setting unset. A KEY with a dot (sampling.steps) belongs to a
section of a study. Owns the grammar. Does not own the use of a value; see each command.
"""

from __future__ import annotations

import tomllib
from typing import Any

from trainer.checks import check_whole
from trainer.config import SETTINGS, ZERO_IS_UNSET, TrainConfig, check_name
from trainer.errors import ConfigError
from trainer.text import clean_text

NONE = ("", "none", "None")
USUAL = TrainConfig()


def read_override(text: str) -> tuple[str, Any]:
    """KEY and value of ``KEY=VALUE``. An unset value is None, or "" for a text setting. Raises ConfigError if
    the value is missing or not valid in TOML."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise ConfigError(
            f"--set {clean_text(text)!r} has no value",
            "write --set key=value, for example --set network_dim=16",
        )
    if raw in NONE:
        name = key.removeprefix("train.")
        return key, "" if name in SETTINGS and isinstance(getattr(USUAL, name), str) else None
    value = _value(raw)
    check_whole(value, f"--set {key}")
    return key, value


def read_setting(text: str) -> tuple[str, Any]:
    """The setting and value of ``KEY=VALUE``. Raises ConfigError if KEY is not a setting."""
    name, value = read_override(text)
    if "." in name:
        raise ConfigError(
            f"--set {clean_text(name)}: this command has no sections",
            "write the setting without a section; only hpo search has sections",
        )
    check_name(name)
    return name, unset(name, value)


def unset(name: str, value: Any) -> Any:
    """Convert 0 to unset for settings where 0 means unset (TOML has no null)."""
    return None if name in ZERO_IS_UNSET and value == 0 and not isinstance(value, bool) else value


def _value(raw: str) -> Any:
    """Parse a TOML value; a bare word is read as text."""
    try:
        found = tomllib.loads(f"v = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    except (ValueError, RecursionError) as error:  # too many digits or brackets
        raise ConfigError(
            f"--set … = {clean_text(raw)[:40]}… is not a valid value: {clean_text(str(error))}",
            "write a shorter value",
        ) from None
    return found["v"] if len(found) == 1 else raw  # text with several lines, not one value
