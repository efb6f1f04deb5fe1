"""``key=value`` arguments of optimizers, schedules and networks: read as sd-scripts reads them, checked by a table.

Owns the grammar (a list of texts, one text, or a table) and the check of one value.  Does not own the tables
(``trainer.optimizers``, ``trainer.schedules``).  Never imports torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checks import SHOWN, is_finite, suggestion
from trainer.errors import ConfigError
from trainer.text import clean_text

OPENING, CLOSING, QUOTES = "([{", ")]}", "'\""
_NAME = r"[A-Za-z_]\w*"
_NEXT_NAME = re.compile(rf"[,\s]\s*({_NAME})\s*=")


@dataclass(frozen=True)
class Parsed:
    """Arguments in the order of the file. ``repeated`` are those given before with another value: (name, value)."""

    values: dict[str, Any]
    repeated: tuple[tuple[str, Any], ...] = ()


def parse(name: str, value: Any) -> Parsed:
    """The arguments of ``value``: a list ``["key=value", …]``, one text ``"key=value key=value"`` with or without
    quotes around each, or a table. Values are Python literals, lists are tuples (sd-scripts'
    library/train_util.py:get_optimizer); of the same argument twice, the later wins.

    Raises ConfigError, for example for two arguments in one entry.
    """
    if value is None:
        return Parsed({})
    if isinstance(value, Mapping):
        return Parsed({str(key).strip(): _tupled(found) for key, found in value.items()})
    found: dict[str, Any] = {}
    repeated = []
    for entry in _entries(name, value):
        key, text = _split(name, entry)
        if key in found and found[key] != literal(text):
            repeated.append((key, found[key]))
        found[key] = literal(text)
    return Parsed(found, tuple(repeated))


def canonical(name: str, value: Any) -> str:
    """Arguments as one text, ``"betas=(0.9, 0.99) d_coef=2"``: the form in which a setting stores them."""
    return as_text(parse(name, value).values)


def as_text(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items())


def as_entries(values: Mapping[str, Any]) -> list[str]:
    """Arguments as a file of sd-scripts has them."""
    return [f"{key}={_shown(value)}" for key, value in values.items()]


def literal(text: str) -> Any:
    """A Python literal with tuples instead of lists, or the text itself."""
    try:
        return _tupled(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _tupled(value: Any) -> Any:
    return tuple(_tupled(entry) for entry in value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    """A value as it can be read again: a text in quotes, because spaces separate arguments."""
    return repr(value)


# The grammar


def _entries(name: str, value: Any) -> list[str]:
    """One text per argument."""
    if isinstance(value, str):
        value = _words(value)
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise _not_a_list(name, value)
    joined: list[str] = []
    for entry in value:
        if joined and (_depth(joined[-1]) > 0 or joined[-1].endswith(",")):
            joined[-1] += f" {entry.strip()}"  # "betas=(0.9, 0.99)", split at its space: by a GUI, or above
        else:
            joined.append(entry.strip())
    found = [_bare(entry) for entry in joined if entry]
    for entry in found:
        if _NEXT_NAME.search(_without_groups(entry)):
            raise _two_in_one(name, entry)
    return found


def _split(name: str, entry: str) -> tuple[str, str]:
    key, equals, text = entry.partition("=")
    if not equals or not re.fullmatch(_NAME, key.strip()):
        raise _not_a_list(name, entry)
    return key.strip(), text.strip()


def _words(text: str) -> list[str]:
    """A text at its spaces, except those in brackets or quotes and those around =."""
    words, depth, quote, word = [], 0, "", ""
    for letter in re.sub(r"\s*=\s*", "=", text.strip()):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter.isspace() and depth <= 0:
            words.append(word)
            word = ""
            continue
        word += letter
    return [found for found in [*words, word] if found]


def _bare(word: str) -> str:
    """A word without the quotes of a shell around it."""
    is_quoted = len(word) > 1 and word[0] in QUOTES and word[-1] == word[0]
    return word[1:-1].strip() if is_quoted else word


def _depth(text: str) -> int:
    return sum(letter in OPENING for letter in text) - sum(letter in CLOSING for letter in text)


def _without_groups(text: str) -> str:
    """A text without what is in brackets or quotes."""
    return re.sub(r"\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"", "0", text)


def _two_in_one(name: str, entry: str) -> ConfigError:
    names = [entry.partition("=")[0].strip(), *_NEXT_NAME.findall(_without_groups(entry))]
    starts = [re.search(rf"\b{re.escape(key)}\s*=", entry) for key in names]
    places = [start.start() for start in starts if start]
    pieces = [
        entry[start:end].strip(" ,") for start, end in zip(places, [*places[1:], len(entry)], strict=True)
    ]
    listed = ", ".join(f'"{clean_text(piece)}"' for piece in pieces)
    return ConfigError(
        f"{name}: {clean_text(entry)[:SHOWN]} is more than one argument",
        f"write one argument per entry: {name} = [{listed}]"[:300],
    )


def _not_a_list(name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{name} = {clean_text(str(value))[:SHOWN]} is not a list of key=value",
        f'write {name} = ["key=value"], one argument per entry',
    )


# The check of one value

NUMBER, WHOLE, FLAG, TEXT, PAIR, TRIPLE = "number", "whole", "flag", "text", "pair", "triple"
_PARTS = {PAIR: 2, TRIPLE: 3}
_WORDS = {
    NUMBER: "a number",
    WHOLE: "a whole number",
    FLAG: "True or False",
    TEXT: "a text",
    PAIR: "two numbers",
    TRIPLE: "three numbers",
}


@dataclass(frozen=True)
class Argument:
    """An argument of an optimizer or a schedule: its type, the library's default, and its limits, which hold for
    each of several numbers. ``is_needed``: without it, the optimizer or schedule cannot be made."""

    kind: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    low_is_excluded: bool = False
    high_is_excluded: bool = False
    choices: tuple[Any, ...] = ()
    can_be_none: bool = False
    is_needed: bool = False
    any_count: bool = False  # several whole numbers, as many as wanted

    @property
    def words(self) -> str:
        """What the value must be."""
        if self.choices:
            return " or ".join(str(choice) for choice in self.choices)
        what = "whole numbers" if self.any_count else _WORDS[self.kind]
        if self.low is not None:
            what += f" {'above' if self.low_is_excluded else 'from'} {self.low:g}"
        if self.high is not None:
            what += f" {'below' if self.high_is_excluded else 'to'} {self.high:g}"
        return what + (" or None" if self.can_be_none else "")

    def read(self, value: Any) -> Any:
        """``value`` in its type. Raises ValueError, with what it must be, if it does not fit."""
        if value is None and self.can_be_none:
            return None
        if self.kind == FLAG and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if self.any_count and isinstance(value, tuple):
            found: Any = tuple(self._one(part) for part in value)
        elif self.kind in _PARTS:
            if not isinstance(value, tuple) or len(value) != _PARTS[self.kind]:
                raise ValueError(self.words)
            found = tuple(self._one(part) for part in value)
        else:
            found = self._one(value)
        if self.choices and found not in self.choices:
            raise ValueError(self.words)
        return found

    def _one(self, value: Any) -> Any:
        if self.kind in (FLAG, TEXT):
            if not isinstance(value, bool if self.kind == FLAG else str):
                raise ValueError(self.words)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
            raise ValueError(self.words)
        if self.kind == WHOLE and value != int(value):
            raise ValueError(self.words)
        below = self.low is not None and (value < self.low or (self.low_is_excluded and value == self.low))
        above = self.high is not None and (
            value > self.high or (self.high_is_excluded and value == self.high)
        )
        if below or above:
            raise ValueError(self.words)
        return int(value) if self.kind == WHOLE else value


def check_arguments(
    setting: str, owner: str, values: Mapping[str, Any], table: Mapping[str, Argument]
) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """The arguments that fit the table, in their types, and those that do not: (name, value, what is wrong)."""
    sound: dict[str, Any] = {}
    wrong = []
    for name, value in values.items():
        if name not in table:
            known = ", ".join(table) or "it has none"
            near = suggestion(name, table) or f"arguments of {owner}: {known}"
            wrong.append((name, value, f"{owner} has no such argument; {near}"))
            continue
        try:
            sound[name] = table[name].read(value)
        except ValueError as error:
            wrong.append((name, value, f"{owner} needs {error}"))
    return sound, wrong
