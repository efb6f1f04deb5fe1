"""Formula: how prompt following and likeness become one number, and its slopes.

Owns the composite and its slopes, in pure numpy. Does not own the two parts (``evaluation.score.score``)
or their noise (``evaluation.score.statistics``).

    geometric   (t^a · i^b) ^ (1 / (a + b))          harmonic   (a + b) / (a / t + b / i)

t and i are clipped to 0 … 1.1; a and b are the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.checks import setting
from trainer.errors import ConfigError

# assumed: a score gives a little credit for more than the base's prompt following or the references' likeness
CEILING = 1.1
MEANS = ("geometric", "harmonic")


@dataclass(frozen=True)
class Formula:
    """How t and i become one number: the kind of mean, and the weights (exponents of a geometric mean)."""

    mean: str = setting("geometric", choices=MEANS)
    prompt_following: float = setting(1.0, low=0.01, high=100)
    likeness: float = setting(1.0, low=0.01, high=100)

    def __post_init__(self) -> None:
        if self.mean not in MEANS:
            raise ConfigError(f"mean {self.mean!r} is not known", "use one of " + ", ".join(MEANS))
        if self.prompt_following <= 0 or self.likeness <= 0:
            raise ConfigError(
                "a weight of the score is not above 0", "give weights above 0; 1 and 1 are equal weights"
            )

    def words(self) -> str:
        """For display and for the stored settings of a study."""
        return f"{self.mean} mean, prompt following {self.prompt_following:g} : likeness {self.likeness:g}"

    def slopes(self, following: float, alike: float) -> tuple[float, float]:
        """Derivatives of the score by each part, for a score above 0; 0 beyond the ceiling."""
        value = float(composite(np.array(following), np.array(alike), self))
        total = self.prompt_following + self.likeness
        power = 2 if self.mean == "harmonic" else 1
        return tuple(  # type: ignore[return-value]
            0.0 if part >= CEILING else weight / total * (value / part) ** power
            for part, weight in ((following, self.prompt_following), (alike, self.likeness))
        )


USUAL = Formula()


def composite(following: np.ndarray, alike: np.ndarray, formula: Formula = USUAL) -> np.ndarray:
    """Weighted mean of the clipped parts; 0 if either part is 0."""
    t, i = np.clip(following, 0, CEILING), np.clip(alike, 0, CEILING)
    w_t, w_i = formula.prompt_following, formula.likeness
    if formula == USUAL:
        return np.sqrt(t * i)
    if formula.mean == "geometric":
        return (t**w_t * i**w_i) ** (1 / (w_t + w_i))
    with np.errstate(divide="ignore"):  # 1 / inf is 0
        return (w_t + w_i) / (w_t / t + w_i / i)
