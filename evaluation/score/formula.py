"""Formula: how prompt following and likeness become one number, and its slopes.

Owns the score, the objective and its slopes, in pure numpy. Does not own the two parts
(``evaluation.score.score``) or their noise (``evaluation.score.statistics``).

    geometric   (t^a · i^b) ^ (1 / (a + b))          harmonic   (a + b) / (a / t + b / i)

t and i are clipped to 0 … 1.1; a and b are the weights.  The *score* is 0 if either part is at or below 0, so it
does not say which of two such trials is nearer to learning something.  The *objective*, which the sampler is told,
is the score where that is above 0, and continues below it:

    objective = score − m / (1 + m)      m = [a · n(t) · (1 + l(i)) + b · n(i) · (1 + l(t))] / (a + b)

n(x) = max(0, −x) is how far a part is below 0, l(x) = 1.1 − min(x, 1.1) is what the other part has lost.  So it is
continuous, rises with each part wherever the score is 0, and lies above −1.  docs/evaluation.md compares it with
other forms on recorded trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.checks import setting
from trainer.errors import ConfigError

# assumed: a score gives a little credit for more than the base's prompt following or the references' likeness
CEILING = 1.1
MEANS = ("geometric", "harmonic")
# What the sampler is told where the score is 0.  Studies begun before the second form existed have the first one.
CLIPPED, SIGNED = "clipped", "signed"
BELOW_ZERO = (CLIPPED, SIGNED)


@dataclass(frozen=True)
class Formula:
    """How t and i become one number: the kind of mean, and the weights (exponents of a geometric mean).

    ``below_zero``: what the sampler is told where the score is 0: the score (``clipped``) or the objective that
    continues below it (``signed``).  It is not part of ``words``, because it does not change the score.
    """

    mean: str = setting("geometric", choices=MEANS)
    prompt_following: float = setting(1.0, low=0.01, high=100)
    likeness: float = setting(1.0, low=0.01, high=100)
    below_zero: str = setting(CLIPPED, choices=BELOW_ZERO)

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

    @property
    def signed(self) -> bool:
        return self.below_zero == SIGNED

    def slopes(self, following: float, alike: float) -> tuple[float, float]:
        """Derivatives of the objective by each part; 0 beyond the ceiling.

        Where the score is 0 they are those of the part below 0 (0 if ``clipped``).
        """
        value = float(composite(np.array(following), np.array(alike), self))
        own = (self.prompt_following / self._total, self.likeness / self._total)
        if value > 0:
            power = 2 if self.mean == "harmonic" else 1
            return tuple(  # type: ignore[return-value]
                0.0 if part >= CEILING else weight * (value / part) ** power
                for part, weight in zip((following, alike), own, strict=True)
            )
        if not self.signed:
            return 0.0, 0.0
        (n_t, l_t), (n_i, l_i) = (
            (float(_below(np.array(x))), float(_lost(np.array(x)))) for x in (following, alike)
        )
        bend = (1 + float(_missing(np.array(following), np.array(alike), self))) ** 2
        by_t = own[0] * (1 + l_i) * (following <= 0) + own[1] * n_i * (following < CEILING)
        by_i = own[1] * (1 + l_t) * (alike <= 0) + own[0] * n_t * (alike < CEILING)
        return by_t / bend, by_i / bend

    @property
    def _total(self) -> float:
        return self.prompt_following + self.likeness


USUAL = Formula()


def composite(following: np.ndarray, alike: np.ndarray, formula: Formula = USUAL) -> np.ndarray:
    """The score: weighted mean of the clipped parts; 0 if either part is 0."""
    t, i = (
        np.clip(following, 0, CEILING) + 0.0,
        np.clip(alike, 0, CEILING) + 0.0,
    )  # never −0, whose inverse is −inf
    w_t, w_i = formula.prompt_following, formula.likeness
    if formula.mean == "geometric":
        if w_t == w_i == 1:
            return np.sqrt(t * i)
        return (t**w_t * i**w_i) ** (1 / (w_t + w_i))
    with np.errstate(divide="ignore"):  # 1 / inf is 0
        return (w_t + w_i) / (w_t / t + w_i / i)


def objective(following: np.ndarray, alike: np.ndarray, formula: Formula = USUAL) -> np.ndarray:
    """What the sampler is told: the score, and below it, if ``signed``, a value between −1 and 0."""
    score = composite(following, alike, formula)
    if not formula.signed:
        return score
    missing = _missing(np.asarray(following), np.asarray(alike), formula)
    return score - missing / (1 + missing)


def told_part(part: float, below_zero: str) -> float:
    """One part as an objective of its own: up to the ceiling, and clipped at 0 or above −1."""
    if part < 0:
        return part / (1 - part) if below_zero == SIGNED else 0.0
    return min(part, CEILING)


def _missing(following: np.ndarray, alike: np.ndarray, formula: Formula) -> np.ndarray:
    """m of the objective: 0 unless a part is below 0."""
    w_t, w_i = formula.prompt_following, formula.likeness
    of_t, of_i = _below(following) * (1 + _lost(alike)), _below(alike) * (1 + _lost(following))
    return (w_t * of_t + w_i * of_i) / (w_t + w_i)


def _below(part: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, -part)


def _lost(part: np.ndarray) -> np.ndarray:
    return CEILING - np.minimum(part, CEILING)
