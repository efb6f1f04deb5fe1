"""Mistakes in a command line, found by click while parsing, in the form of this tool's errors: what, and what to do.

Owns the wording and the suggestions. Exit code 2, as for every other mistake in what was asked for
(``trainer.errors``). Does not own the rules; they are the types in ``hpo.cli.options``.
"""

from __future__ import annotations

import re

import click

from trainer.checks import suggestion
from trainer.errors import ConfigError

SHOWN = 80  # characters of a wrong value in a message
_RANGE = re.compile(r"(?P<value>\S+) is not in the range .*")
_NUMBER = re.compile(r"'(?P<value>.*)' is not a valid (?P<kind>integer|float)(?: range)?\.?", re.DOTALL)
_CHOICE = re.compile(r"'(?P<value>.*)' is not one of .*", re.DOTALL)


def as_error(error: click.UsageError) -> ConfigError:
    """click's message as an error with a hint."""
    match error:
        case click.NoSuchOption():
            known = [
                name for param in _parameters(error.ctx) for name in (*param.opts, *param.secondary_opts)
            ]
            return ConfigError(
                f"there is no option {_cut(error.option_name)}", _near(error, error.option_name, known)
            )
        case click.MissingParameter():
            kind = error.param.type if error.param else None
            hint = (
                f"give one of {', '.join(map(str, kind.choices))}" if isinstance(kind, click.Choice) else ""
            )
            return ConfigError(f"{_name(error)} is missing", hint or _usage(error))
        case click.BadParameter():
            return _of_value(error)
    name = re.fullmatch(r"No such command '(.*)'\.?", error.message.partition(" Did you mean")[0], re.DOTALL)
    if name is not None and error.ctx is not None and isinstance(error.ctx.command, click.Group):
        known = error.ctx.command.list_commands(error.ctx)
        return ConfigError(f"there is no command {_cut(name[1])}", _near(error, name[1], known))
    return ConfigError(_plain(error.message), _usage(error))


def _of_value(error: click.BadParameter) -> ConfigError:
    """A value that its option's type refuses."""
    name, kind = _name(error), error.param.type if error.param else None
    if found := _RANGE.fullmatch(error.message):
        return ConfigError(f"{name} {_cut(found['value'])} is outside its limits", range_words(kind))
    if found := _NUMBER.fullmatch(error.message):
        what = "a whole number" if found["kind"] == "integer" else "a number"
        return ConfigError(
            f"{name} {_cut(found['value'])!r} is not {what}", range_words(kind) or f"write {what}"
        )
    if isinstance(kind, click.Choice) and (found := _CHOICE.fullmatch(error.message)):
        choices = [str(choice) for choice in kind.choices]
        hint = suggestion(found["value"], choices) or "choose one of " + ", ".join(choices)
        return ConfigError(f"{name} {_cut(found['value'])} is not known", hint)
    what, _, hint = error.message.partition("\n")
    return ConfigError(f"{name} {_plain(what)}", hint or range_words(kind) or _usage(error))


def range_words(kind: click.ParamType | None) -> str:
    """The limits of a number in words: "give a whole number from 1 to 32"; empty if there are none."""
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return ""
    words = ["give a whole number" if isinstance(kind, click.IntRange) else "give a number"]
    if kind.min is not None:
        words.append(f"{'above' if kind.min_open else 'from'} {kind.min}")
    if kind.max is not None:
        words.append(f"{'below' if kind.max_open else 'to' if kind.min is not None else 'up to'} {kind.max}")
    return " ".join(words)


def _parameters(ctx: click.Context | None) -> list[click.Parameter]:
    return [] if ctx is None else ctx.command.get_params(ctx)


def _name(error: click.BadParameter) -> str:
    """The option or argument as written on the command line."""
    if isinstance(error.param, click.Option):
        return max(error.param.opts, key=len)
    if error.param is not None:
        return error.param.human_readable_name
    return _plain(str(error.param_hint or "a value"))


def _near(error: click.UsageError, name: str, known: list[str]) -> str:
    return suggestion(name, known) or _usage(error)


def _usage(error: click.UsageError) -> str:
    return "see --help" if error.ctx is None else f"see {error.ctx.command_path} --help"


def _plain(text: str) -> str:
    """One of click's sentences as this tool writes them: no capital letter, no full stop."""
    return text[:1].lower() + text[1:].rstrip(".")


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
