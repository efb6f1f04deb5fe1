"""What an evaluation came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.choice import Choice, Point, Verdict


@dataclass(frozen=True)
class Outcome:
    """What an evaluation came to.  ``final`` and ``tested`` are indices into ``points``; ``retested`` are the
    tested ones on the confirmation prompts."""

    points: Sequence[Point]
    choice: Choice
    verdict: Verdict
    tested: Sequence[int]
    retested: Sequence[Point]
    rechoice: Choice | None
    final: int
    word: str
