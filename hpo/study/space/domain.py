"""The domain of a parameter: a range of numbers, or a few unordered values.

Owns membership, the edges, the position of a value between them and the Optuna distribution.  Does not own
the parameter or the check that its edges are valid settings; see ``hpo.study.space.space``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


Values = Mapping[str, Any]


BIG = 1e300  # far above every setting, and every integer below it converts to float


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, inclusive.  Only integers if both limits are of type int."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def edges(self) -> tuple[Any, ...]:
        return (self.low, self.high) if self.low < self.high else (self.low,)

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -BIG < value < BIG:
            return False
        if not self.low <= value <= self.high or (self.whole and float(value) != int(value)):
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def to_unit(self, value: Any) -> float:
        """The position of a value between the edges, 0 to 1, on a log scale if ``log`` is set."""
        if self.low == self.high:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def from_unit(self, place: float) -> Any:
        """The value at a position between the edges: the inverse of ``to_unit``, rounded to ``step``."""
        if self.log:
            value = self.low * (self.high / self.low) ** place
        else:
            value = self.low + (self.high - self.low) * place
        if self.step is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def describe(self) -> str:
        text = f"{self.low:g} … {self.high:g}"
        return text + (", log" if self.log else "") + (f", step {self.step:g}" if self.step else "")


@dataclass(frozen=True)
class Choice:
    """One of a few unordered values."""

    options: tuple[Any, ...]

    @property
    def edges(self) -> tuple[Any, ...]:
        return self.options

    def holds(self, value: Any) -> bool:
        return any(value == o and isinstance(value, bool) == isinstance(o, bool) for o in self.options)

    def from_unit(self, place: float) -> Any:
        """The option at a position between 0 and 1; each has an equal share."""
        return self.options[min(int(place * len(self.options)), len(self.options) - 1)]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.options)

    def describe(self) -> str:
        return " | ".join(str(option) for option in self.options)
