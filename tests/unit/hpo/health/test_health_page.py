"""docs/health.md has every key of [health] with its default, every event, and the figures of the code."""

from __future__ import annotations

import dataclasses
import re

from hpo.health import steps
from hpo.study.notify import EVENTS, USUAL
from hpo.study.thresholds import Thresholds
from tests.places import ROOT

PAGE = (ROOT / "docs" / "health.md").read_text(encoding="utf-8")


def rows(start: str) -> dict[str, list[str]]:
    """First cell → the others, of the table whose head begins with ``start``."""
    lines = PAGE[PAGE.index(f"| {start}") :].splitlines()[2:]
    table = [line for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name: rest for name, *rest in cells}


def test_every_threshold_stands_there_with_its_default() -> None:
    shown = rows("`[health]`")
    fields = {field.name: field for field in dataclasses.fields(Thresholds)}
    assert list(shown) == [f"`{name}`" for name in fields]
    for name, field in fields.items():
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        text = ", ".join(str(value).lower() if isinstance(value, bool) else f"{value:g}" for value in values)
        unit = field.metadata["rule"].unit
        assert shown[f"`{name}`"][0] == f"{text} {unit}".strip(), name


def test_every_event_stands_there_and_whether_it_is_sent() -> None:
    shown = {
        event: cells[1].split(":")[0] == "yes"
        for names, cells in rows("event").items()
        for event in re.findall(r"`(\w+)`", names)
    }
    assert shown == {event: event in USUAL for event in EVENTS}


def test_the_formulas_have_the_figures_of_the_code() -> None:
    text = " ".join(PAGE.split())
    assert f"last {steps.LAST} steps" in text and f"first {steps.FIRST}" in text
    assert f"blocks of {steps.BLOCK} steps" in text and f"last {steps.BLOCKS} blocks" in text
    assert f"above {steps.ERRORS:g} of its own standard errors" in text
    assert f"fewer than {steps.WARM_UP + steps.FIRST + steps.LAST} steps" in text
