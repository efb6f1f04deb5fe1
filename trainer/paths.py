"""Paths that a user wrote in a file or on a command line, before they are used.

A path that is another place than it looks costs a night: ``~`` is not expanded outside a shell, a leading space makes a
folder named " ", and ``C:\\loras`` is one odd folder name everywhere but on Windows. Paths that this tool stored itself
are not read here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.text import clean_text

_DRIVE = re.compile(r"^([A-Za-z]):[\\/](.*)", re.DOTALL)
_VARIABLE = re.compile(r"%\w+%|\$\w+|\$\{\w+\}")


def user_path(text: str, name: str) -> str:
    """The path that ``text`` means: without spaces around it, and with ``~`` as the home folder.

    ``name`` is the setting or option, for messages. Raises ConfigError for a Windows path on another system, for
    backslashes there, and for variables of a shell, none of which is what it looks like; and for what cannot be a path.
    A path that exists as it is written is always taken.
    """
    text = text.strip()
    if not text or os.name == "nt" or _exists(text, name):
        return _home(text, name)
    shown = f"{name} = {clean_text(text)[:200]}"
    if match := _DRIVE.match(text):
        rest = match[2].replace("\\", "/")
        raise ConfigError(
            f"{shown} is a Windows path, and this system is not Windows",
            f"in WSL it is {clean_text(f'/mnt/{match[1].lower()}/{rest}')[:200]}",
        )
    if _VARIABLE.match(text):
        raise ConfigError(
            f"{shown} begins with a variable, which only a shell replaces", "write the whole path"
        )
    if "\\" in text:
        raise ConfigError(
            f"{shown} has backslashes, which do not separate folders on this system",
            f"write {clean_text(text.replace(chr(92), '/'))[:200]}",
        )
    return _home(text, name)


def _exists(text: str, name: str) -> bool:
    """Whether there is such a path. Raises ConfigError for what the system cannot look up."""
    try:
        if "\0" not in text:
            return Path(text).exists()
        why = "it has a NUL byte"
    except OSError as error:  # longer than a name can be, or in a folder that may not be read
        why = str(error.strerror)
    raise ConfigError(f"{name} = {clean_text(text)[:200]} is no path that can be used: {why}", "correct it")


def _home(text: str, name: str) -> str:
    if not text.startswith("~") or _exists(text, name):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ConfigError(
            f"{name} = {clean_text(text)[:200]}: the home folder of this user is unknown",
            "write the whole path",
        ) from None


_PROMPT_FILES = (".txt", ".toml", ".json")


def is_prompt_text(text: str) -> bool:
    """Whether sample_prompts holds the prompts themselves rather than the name of their file: several lines or words,
    and no file. A single word is a file's name."""
    text = text.strip()
    if "\n" in text or text.startswith(("[{", '["')):
        return True
    if not any(sign.isspace() for sign in text) or text.lower().endswith(_PROMPT_FILES):
        return False
    try:
        return not Path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be
        return True
