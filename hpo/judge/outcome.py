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
