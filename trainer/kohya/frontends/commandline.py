"""Command lines of sd-scripts: the flags of ``accelerate launch … train_network.py`` in a shell script or in a field.

Owns words, quotes, continued lines and plain variables of sh, PowerShell and cmd. A script that builds its command in
another way is refused. Does not own what a flag means.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.kohya.frontends.architectures import SCRIPTS, refuse_script
from trainer.kohya.frontends.found import Found, refuse, shown
from trainer.kohya.optionnames import LISTS, TEXTS
from trainer.text import clean_text

# Flags whose value stays a text even if it looks like a number.
_TEXTS = frozenset(TEXTS)
_PROGRAM = re.compile(r"\b(\w+)\.py\b")
_VARIABLE = re.compile(r"\$\{?(?:env:)?(\w+)\}?|%(\w+)%")
_ASSIGNMENTS = (
    re.compile(r"^\s*(?:export\s+)?(\w+)=(.*)$"),  # sh
    re.compile(r"^\s*\$(\w+)\s*=\s*(.*)$"),  # PowerShell
    re.compile(r"^\s*set\s+\"?(\w+)=(.*?)\"?\s*$", re.IGNORECASE),  # cmd
)
# CUDA_VISIBLE_DEVICES=0 accelerate launch …: variables of one command (sh)
_FOR_ONE_COMMAND = re.compile(r"^\s*(?:env\s+)?(?:\w+=[^\s\"'$`();&|]*\s+)+(?=[\w./~])")
_HINT = "give the TOML that it passes with --config_file, or write the settings into one"


LONGEST = 50_000  # signs of a command


def is_command(text: str) -> bool:
    """Whether a text starts a training script of sd-scripts."""
    return _training_script(text) is not None


def _training_script(text: str) -> re.Match[str] | None:
    return next(
        (found for found in _PROGRAM.finditer(text) if re.match(r"(\w{1,30}_)?train", found[1])), None
    )


def read_command(path: Path, text: str) -> Found:
    """The flags of the one training command in a script. Raises ConfigError if there is none, or more than one, or if
    it needs a shell to be understood."""
    lines = [_FOR_ONE_COMMAND.sub("", line) for line in _joined(text)]
    commands = [
        line
        for line in lines
        if is_command(line)
        and not line.lstrip().startswith(("#", "::", "rem ", "REM "))
        and not any(pattern.match(line) for pattern in _ASSIGNMENTS)
    ]
    if not commands:
        refuse(path, "a shell script without a command of sd-scripts", _HINT)
    if len(commands) > 1:
        refuse(
            path,
            f"a shell script with {len(commands)} training commands",
            "give one of them in a file of its own",
        )
    match = _training_script(commands[0])
    assert match is not None
    script = match[0]
    if script in SCRIPTS:
        refuse_script(path, script)
    if len(commands[0]) > LONGEST:
        refuse(path, "a shell script with a command of more than 50,000 signs", _HINT)
    rest = _filled(path, commands[0][match.end() :], _variables(lines))
    found = flags(
        _words(path, rest, is_windows="\\" in rest and path.suffix.lower() in (".bat", ".cmd", ".ps1"))
    )
    if "config_file" in found:
        name = clean_text(str(found["config_file"]))[:200]
        others = sorted(set(found) - {"config_file", "sample_prompts", "dataset_config"})
        hint = f"give that file: hpo train {name}"
        refuse(
            path,
            f"a shell script that trains with --config_file {name}",
            hint + (f", and its other settings with --set: {', '.join(others)}" if others else ""),
        )
    if not found:
        refuse(path, "a shell script whose training command has no flags", _HINT)
    return Found(
        "a command line of sd-scripts",
        found,
        notes=(f"read from the command of {script}",),
        is_translated=True,
    )


def flags(words: Sequence[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--key`` as settings."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in LISTS:
                found[name] = [value] if equals else []
            else:
                found[name] = _value(name, value) if equals else True
        elif not name:
            continue
        elif name in LISTS:
            found[name].append(word)
        elif found[name] is True:
            found[name] = _value(name, word)
    return {name: _rates(value) if name == "text_encoder_lr" else value for name, value in found.items()}


def _rates(values: list[str]) -> Any:
    numbers = [_value("", value) for value in values]
    return numbers[0] if len(numbers) == 1 else numbers


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _joined(text: str) -> list[str]:
    r"""The lines, with continued ones (\ in sh, ^ in cmd, ` in PowerShell) as one."""
    return re.sub(r"[\\^`][ \t]*\r?\n[ \t]*", " ", text).splitlines()


def _variables(lines: Sequence[str]) -> dict[str, str]:
    """Variables with a plain value. One that is set twice has none: which value holds is known only to a shell."""
    found: dict[str, str | None] = {}
    for line in lines:
        for pattern in _ASSIGNMENTS:
            if match := pattern.match(line):
                value = _plain(match[2])
                found[match[1]] = value if found.get(match[1], value) == value else None
                break
    return {name: value for name, value in found.items() if value is not None}


def _plain(text: str) -> str | None:
    text = text.strip()
    if match := re.match(r"^([\"'])(.*?)\1\s*(?:[;#].*)?$", text):
        return match[2]
    text = re.sub(r"\s+#.*$", "", text)
    return None if re.search(r"[$`()%]|\s", text) else text


def _filled(path: Path, text: str, variables: Mapping[str, str]) -> str:
    if match := re.search(r"\$\{?(\w+)\[@\]\}?|(?<=\s)@(\w+)", text):
        name = match[1] or match[2]
        refuse(path, f"a shell script that collects its settings in {clean_text(name)[:40]}", _HINT)
    for _ in range(3):  # a variable may name another
        text = _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), text)
    if match := _VARIABLE.search(text):
        refuse(path, f"a shell script; the value of {clean_text(match[0])[:40]} is not in it", _HINT)
    return text


def _words(path: Path, text: str, is_windows: bool) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    if is_windows:
        lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError:
        raise ConfigError(f"the training command in {shown(path)} has an open quote", "close it") from None
    ends = [
        place for place, word in enumerate(words) if word in ("&&", "||", ";", "|", "&") or word.endswith(";")
    ]
    return words[: ends[0]] if ends else words
