"""Paths that a user wrote in a file or on a command line, before they are used.

A path that is another place than it looks costs a night: ``~`` is not expanded outside a shell, a leading space makes a
folder named " ", and ``C:\\loras`` is one odd folder name everywhere but on Windows. Paths that this tool stored itself
are not read here.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.text import clean_text

_DRIVE = re.compile(r"^([A-Za-z]):(?:[\\/](.*))?", re.DOTALL)
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_VARIABLE = re.compile(r"%\w+%|\$\w+|\$\{\w+\}")


def user_path(text: str, name: str) -> str:
    """The path that ``text`` means: without spaces around it, and with ``~`` as the home folder.

    ``name`` is the setting or option, for messages. Quotes around the whole are left out. Raises ConfigError for a
    Windows path on another system, for backslashes there, for an address (file://), for variables of a shell, none of
    which is what it looks like, and for a name that no file can have. A path that exists as it is
    written is always taken.
    """
    text = text.strip()
    shown = f"{name} = {clean_text(text)[:200]}"
    if not text or os.name == "nt" or _exists(text, shown):
        return _home(text, name)
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":  # a quoted path, quoted once more
        return user_path(text[1:-1], name)
    if match := _ADDRESS.match(text):
        raise ConfigError(
            f"{shown} is an address, not a path",
            f"write {clean_text(match[2])[:200]}"
            if match[1].lower() == "file"
            else "give a folder or file of this machine",
        )
    if (match := _DRIVE.match(text)) and match[2] is None:
        raise ConfigError(f"{shown} begins with a Windows drive, without a folder", "write the whole path")
    if match:
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


def _exists(text: str, shown: str) -> bool:
    if "\0" in text:
        raise ConfigError(f"{shown} holds a NUL character", "write the path again")
    try:
        return Path(text).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{shown} has a name that is too long for this system", "give a shorter one"
            ) from None
        return False  # not readable: said when it is used


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
