"""``--set KEY=VALUE``: one grammar for every command that takes settings from the command line.

VALUE is written as in TOML: a number, true or false, a "text", a [list] or a {table}; any other word is a
text as it stands, and ``none`` or nothing leaves the setting unset.  A KEY with a dot (sampling.steps) is a
section's, where there are any: in a study.  Owns the grammar; what becomes of a value is its command's.
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
    """KEY and value of ``KEY=VALUE``: None for an unset one, "" for a text setting that is unset. ConfigError
    if it has no value, or none that TOML could hold."""
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
    """``KEY=VALUE`` where KEY must be a setting: the setting and its value.  ConfigError for any other KEY."""
    name, value = read_override(text)
    if "." in name:
        raise ConfigError(
            f"--set {clean_text(name)}: there are no sections here",
            "name the setting alone; sections are a study's (hpo search)",
        )
    check_name(name)
    return name, unset(name, value)


def unset(name: str, value: Any) -> Any:
    """TOML has no null: 0 turns some settings off."""
    return None if name in ZERO_IS_UNSET and value == 0 and not isinstance(value, bool) else value


def _value(raw: str) -> Any:
    """A TOML value; a bare word is a text."""
    try:
        found = tomllib.loads(f"v = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    except (ValueError, RecursionError) as error:  # endless digits or brackets
        raise ConfigError(
            f"--set … = {clean_text(raw)[:40]}… is no value: {clean_text(str(error))}", "write a shorter one"
        ) from None
    return found["v"] if len(found) == 1 else raw  # a text of several lines is not a file
