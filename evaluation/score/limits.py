"""SafeguardLimits: limits that make a result infeasible, whatever its score.

Owns the limits and their defaults. Does not own the measured values; see ``evaluation.score.safeguards``.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.checks import setting


@dataclass(frozen=True)
class SafeguardLimits:
    """Limits that make a result infeasible. 0.05 and 0.6 are assumed. The limit of the prior is
    lenient: a LoRA trained without regularisation images changes its class word to some degree
    (DreamBooth, arXiv 2208.12242, table 3)."""

    copy_rate: float = setting(0.05, low=0, high=1)
    diversity: float = setting(0.6, low=0, high=1)  # relative to the untrained base
    prior: float = setting(1.0, low=0, high=100)  # 1: as similar to the subject as real images
