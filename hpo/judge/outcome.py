"""The result of ``hpo evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.choice import CheckpointChoice, CheckpointPoint, CheckpointVerdict


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation.

    ``final`` and ``tested`` are indices into ``points``.  ``retested`` are the tested checkpoints, scored
    on the confirmation prompts.
    """

    points: Sequence[CheckpointPoint]
    choice: CheckpointChoice
    verdict: CheckpointVerdict
    tested: Sequence[int]
    retested: Sequence[CheckpointPoint]
    rechoice: CheckpointChoice | None
    final: int
    word: str

    @property
    def warning(self) -> str:
        """A sentence if the final checkpoint is no better than the untrained base within the noise, else empty.

        Its score on the confirmation prompts decides, if there is one: those had no part in the choice.
        """
        from evaluation.choice import no_better_sentence

        point = self.points[self.final]
        fresh = [p for p in self.retested if p.name == point.name and p.score is not None]
        if fresh:
            return no_better_sentence(fresh[0])
        return no_better_sentence(point, sum(p.score is not None for p in self.points))
