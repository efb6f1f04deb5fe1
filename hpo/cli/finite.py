"""Finite: a number within a range on the command line.  "nan" reads as a number, and no comparison refuses it."""

from __future__ import annotations

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """click's FloatRange without nan and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is no amount; give a number.", param, ctx)
        return number
