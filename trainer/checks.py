"""Validation of values from files and command lines: type, range, choice and name, in one place for all readers.

Owns ``Rule``, its checks and the error messages: each shows the value, the rule and what to do. Meaning,
default and limits of a value are part of its field's declaration (``setting``). Does not own rules that
combine several values; see the reader of each file.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple, TypeVar

from trainer.errors import ConfigError
from trainer.text import clean_text

T = TypeVar("T")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")  # in TOML, .5 and 5. are no numbers
LARGEST_WHOLE = 2**63 - 1  # TOML's limit; larger numbers may not convert to float or text
SHOWN = 80  # characters of a list or a table in a message
# type → (what a value must be, plural, what to write)
_WORDS = {
    bool: ("true or false", "true or false", "write true or false"),
    str: ("a text", "texts", 'write "…"'),
    int: ("a whole number", "whole numbers", "write a whole number"),
    float: ("a number", "numbers", "write a number"),
}


@dataclass(frozen=True)
class Rule:
    """The rule for a value in addition to its type and default, stored in the metadata of the dataclass field.

    For a list or a table, ``low`` and ``high`` apply to each entry, ``least`` is the minimum number of
    entries, and ``choices`` are the possible lists, or the possible names in a table.
    """

    doc: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    low_is_excluded: bool = False
    multiple_of: int = 1
    least: int = 0
    only: str = ""  # "SD1.5" or "SDXL" for a setting of one family only
    example: str = ""  # what to write, if neither doc nor limits show it

    def allows(self, number: float) -> bool:
        if self.low is not None and (number < self.low or (self.low_is_excluded and number == self.low)):
            return False
        return self.high is None or number <= self.high

    @property
    def limits(self) -> str:
        """The range in words, "from 1 to 1024 px"; empty if there is none."""
        words = []
        if self.low is not None:
            words.append(f"{'above' if self.low_is_excluded else 'from'} {plain(self.low)}")
        if self.high is not None:
            words.append(f"{'to' if words else 'up to'} {plain(self.high)}")
        return " ".join([*words, self.unit] if words and self.unit else words)


def plain(number: float) -> str:
    """A limit as a user would write it: 1000000, not 1e+06; 1e+20 is left as it is."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e9 else f"{number:g}"


def setting(default: Any, doc: str = "", **facts: Any) -> Any:
    """A dataclass field with documentation and limits, for ``read``. MISSING means no default."""
    metadata = {"rule": Rule(doc, **facts)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def same(owner: type, name: str, **changes: Any) -> Any:
    """A field with the rule, and the default unless ``default`` is given, of a field in another dataclass."""
    of = next(f for f in fields(owner) if f.name == name)
    return field(**{"default": of.default, "metadata": of.metadata, **changes})


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean …?`` for a mistyped name, or an empty string."""
    spelled = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return f"did you mean {spelled[near[0]]}?" if near else ""


def check_known(
    name: str, known: Collection[str], what: str = "key", where: str = "", otherwise: str = ""
) -> None:
    """Raise ConfigError for a name that is not in ``known``, with the most similar known one."""
    if name not in known:
        place = f" in {where}" if where else ""
        raise ConfigError(
            f"unknown {what} {clean_text(str(name))[:SHOWN]}{place}",
            suggestion(name, known) or otherwise or "known: " + ", ".join(known),
        )


def read(kind: type[T], body: Any, where: str = "", **own: Any) -> T:
    """Read a section into its dataclass; checks that every key is known and every value fits its type and rule.

    ``own`` are values that the caller provides.  None (``--set key=none``) leaves a key at its default.
    """
    known = {f.name: f.metadata["rule"] for f in fields(kind) if "rule" in f.metadata and f.name not in own}  # type: ignore[arg-type]
    place = f"[{where}]" if where else ""
    hints, values = _hints(kind), {}  # type: ignore[arg-type]
    for name, value in section(body, where).items():
        check_known(name, known, where=place or "the file")
        if value is not None:
            values[name] = check(name, value, hints[name], known[name], place)
    return kind(**values, **own)


def section(body: Any, where: str) -> Mapping[str, Any]:
    """``body``; raises ConfigError if it is not a TOML table."""
    if not isinstance(body, Mapping):
        raise ConfigError(f"[{where}] is not a section", f"write [{where}] on a line of its own")
    return body


def check(name: str, value: Any, kind: Any, rule: Rule = Rule(), where: str = "") -> Any:
    """``value`` converted to its type; raises ConfigError with the rule. A whole float becomes an int if an
    int is required, a list becomes a tuple; an int stays an int if any number is allowed.

    ``kind``: bool, str, int, float, one of them | None, tuple[one of them, ...] or Mapping[str, one of them].
    """
    form = _form(kind)
    if value is None:
        if form.is_optional:
            return None
        raise ConfigError(
            f"{name} must have a value", f"it is {rule.doc}" if rule.doc else _remedy(form, rule)
        )
    if form.holder is None:
        return _single(name, value, form.kind, rule, where)
    return _several(name, value, form, rule, where)


def check_whole(table: Any, where: str) -> None:
    """Refuse whole numbers beyond TOML's range: they may not convert to float or text."""
    left = [table]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and abs(value) > LARGEST_WHOLE:
            raise ConfigError(
                f"{where} has a whole number beyond {LARGEST_WHOLE}", "use a number that fits into 64 bits"
            )


class _Form(NamedTuple):
    """A type, parsed: ``holder`` is tuple, Mapping or None, and ``kind`` is the type of single values."""

    kind: type
    holder: Any
    is_optional: bool


@cache
def _form(kind: Any) -> _Form:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    (inner,) = (option for option in options if option is not type(None))
    holder = typing.get_origin(inner)
    if holder is not None:
        inner = next(arg for arg in reversed(typing.get_args(inner)) if arg is not Ellipsis)
    return _Form(inner, holder, len(options) > 1)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def is_finite(value: float) -> bool:
    """Whether a number is one that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def _is_of(kind: type, value: Any) -> bool:
    """Whether a value is acceptable as ``kind``; a fraction for an int is reported later."""
    if kind in (bool, str):
        return isinstance(value, kind)
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def _unquoted(kind: type, value: Any) -> str:
    """What a text in quotes means as a number or a truth value, as TOML has it; empty if it means none."""
    if not isinstance(value, str) or kind is str:
        return ""
    text = value.strip()
    if kind is bool:
        return text.lower() if text.lower() in ("true", "false") else ""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return ""
    if kind is int:
        return str(int(number))
    return text if _NUMBER.fullmatch(text) else repr(number)


def _single(name: str, value: Any, kind: type, rule: Rule, where: str) -> Any:
    place = f" in {where}" if where else ""
    if not _is_of(kind, value):
        if meant := _unquoted(kind, value):
            how = (
                "without quotes and in lower case"
                if value.lower() != value and kind is bool
                else "without quotes"
            )
            raise ConfigError(
                f'{name} = "{clean_text(value)[:SHOWN]}"{place} is a text, not {_WORDS[kind][0]}',
                f"write it {how}: {name} = {meant}",
            )
        what = _WORDS[float if kind is int else kind][0]
        raise ConfigError(f"{name} = {value!r}{place} is not {what}", _remedy(_form(kind), rule))
    if isinstance(value, str):
        if rule.choices and value not in rule.choices:
            hint = suggestion(value, rule.choices) or "choose one of " + ", ".join(rule.choices)
            raise ConfigError(f"{name} = {clean_text(value)}{place} is not known", hint)
        return value
    if kind is bool:
        return value
    if kind is int:
        if value != int(value):
            raise ConfigError(f"{name} = {value!r}{place} is not a whole number", _remedy(_form(kind), rule))
        value = int(value)
    if not rule.allows(value):
        raise ConfigError(f"{name} = {value}{place} is outside its limits", rule.limits)
    if rule.multiple_of > 1 and value % rule.multiple_of:
        raise ConfigError(f"{name} = {value}{place} is not a multiple of {rule.multiple_of}", rule.limits)
    return value


def _several(name: str, value: Any, form: _Form, rule: Rule, where: str) -> Any:
    """A list of different values, or a table."""
    shown = f"{name} = {clean_text(str(value))[:SHOWN]}" + (f" in {where}" if where else "")
    is_table = form.holder is not tuple
    what = f"a {'table' if is_table else 'list'} of {'' if is_table else 'different '}{_WORDS[form.kind][1]}"
    remedy = _remedy(form, rule)
    if not isinstance(value, Mapping if is_table else list | tuple) or len(value) < rule.least:
        raise ConfigError(f"{shown} is not {what}", remedy)
    entries = list(value.values()) if isinstance(value, Mapping) else list(value)
    single = Rule(low=rule.low, high=rule.high)
    try:
        found = [_single(name, entry, form.kind, single, where) for entry in entries]
    except ConfigError:
        raise ConfigError(f"{shown} is not {what}", remedy) from None
    if is_table:
        for key in value if rule.choices else ():
            if key not in rule.choices:
                raise ConfigError(
                    f"{shown} has an unknown {clean_text(key)}", suggestion(key, rule.choices) or remedy
                )
        return dict(zip(value, found, strict=True))
    if len(set(found)) != len(found):
        raise ConfigError(f"{shown} is not {what}", remedy)
    if rule.choices and tuple(found) not in rule.choices:
        raise ConfigError(f"{shown} is not known", remedy)
    return tuple(found)


def _remedy(form: _Form, rule: Rule) -> str:
    if rule.example:
        return f"for example {rule.example}"
    return rule.doc or rule.limits or _WORDS[form.kind][2]
