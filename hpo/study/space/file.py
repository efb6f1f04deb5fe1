"""Read the [space] section of a study file: ranges and choices, with an error and a hint for each mistake.

Owns the format of the section.  Does not own parameters or the check of their edges; see ``hpo.study.space.space``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo.study.space.derived import DERIVED
from hpo.study.space.domain import BIG, Choice, Range, Values
from hpo.study.space.space import Parameter, Space
from trainer.checks import Rule, check, suggestion
from trainer.config import SETTINGS, ZERO_IS_UNSET, check_value
from trainer.errors import ConfigError
from trainer.settings import spelled

STEP = Rule("remove it to allow any value", low=0, low_is_excluded=True)


def read_space(table: Values) -> Space:
    """The space of a study file's [space] section."""
    return Space(tuple(_read_parameter(name, body) for name, body in table.items()))


def _read_parameter(name: str, body: Any) -> Parameter:
    if isinstance(body, list):
        body = {"choices": body}
    if not isinstance(body, Mapping):
        raise ConfigError(
            f"{name} = {body!r} in [space] is a single value", "move it to [train], or give low and high"
        )
    known = ("choices", "low", "high", "log", "step", "inactive_when")
    for key in body:
        if key not in known:
            raise ConfigError(
                f"{name} in [space] has an unknown key {key}", suggestion(key, known) or ", ".join(known)
            )
    off = body.get("inactive_when", {})
    if not isinstance(off, Mapping):
        raise ConfigError(
            f"inactive_when of {name} is not a table",
            'for example: inactive_when = { lr_scheduler = "constant" }',
        )
    conditions = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in off.items()}
    domain = _read_choice(name, body) if "choices" in body else _read_range(name, body)
    return Parameter(name, domain, conditions)


def _read_choice(name: str, body: Values) -> Choice:
    options = body["choices"]
    if isinstance(options, list) and name in ("optimizer_type", "lr_scheduler"):
        options = [spelled(name, option) for option in options]
    numbers = [key for key in ("low", "high", "log", "step") if key in body]
    if numbers:
        raise ConfigError(f"{name} has choices and {numbers[0]}", "use either choices or a range")
    if (
        not isinstance(options, list)
        or not options
        or not all(isinstance(o, str | bool | int | float) for o in options)
    ):
        raise ConfigError(
            f"the choices of {name} are not a list of values", 'for example: ["AdamW", "Lion8bit"]'
        )
    if len({(type(option), option) for option in options}) != len(options):
        raise ConfigError(f"{name} has a duplicate choice: {options}", "remove one of them")
    return Choice(tuple(options))


def _read_range(name: str, body: Values) -> Range:
    for key in ("low", "high"):
        value = body.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -BIG < value < BIG:
            raise ConfigError(
                f"{name} needs a number for {key}, but has {value!r}", "write { low = …, high = … }"
            )
    low, high = body["low"], body["high"]
    log = check("log", body.get("log", False), bool, where=f"{name} of [space]")
    step = check("step", body.get("step"), float | None, STEP, f"{name} of [space]")
    if name in SETTINGS:  # the type and limits of the setting
        low, high = (_edge(name, value) for value in (low, high))
    elif name in DERIVED:
        least, most = DERIVED[name].limits
        if not least <= low or not high <= most:
            raise ConfigError(
                f"{name}: {low} … {high} is outside its limits", f"use values from {least:g} to {most:g}"
            )
        if not DERIVED[name].whole:
            low, high = float(low), float(high)
        elif float(low).is_integer() and float(high).is_integer():
            low, high = int(low), int(high)
        else:
            raise ConfigError(
                f"{name}: {low} … {high} are not whole numbers",
                "use whole numbers" + (": they are exponents of 2" if name.endswith("_log2") else ""),
            )
    if low > high:
        raise ConfigError(f"{name}: low {low} is above high {high}", "swap them")
    if log and low <= 0:
        raise ConfigError(
            f"{name}: a logarithmic range cannot start at {low}", "start above 0, or remove log"
        )
    if step is not None and log:
        raise ConfigError(f"{name}: log and step cannot be combined", "remove log or step")
    found = Range(low, high, log, step)
    if step is not None and not (found.holds(high) and (not found.whole or float(step).is_integer())):
        raise ConfigError(
            f"{name}: {high} cannot be reached from {low} in steps of {step}", "change high or step"
        )
    return found


def _edge(name: str, value: float) -> float:
    """A limit of a setting's range, checked against the type and limits of the setting."""
    return 0.0 if name in ZERO_IS_UNSET and value == 0 else check_value(name, value)
