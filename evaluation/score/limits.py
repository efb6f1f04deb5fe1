"""SafeguardLimits: where a result stops being one, whatever it scores.

Owns the limits and their defaults; the figures are ``evaluation.score.safeguards``'.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.checks import setting


@dataclass(frozen=True)
class SafeguardLimits:
    """Where a result stops being one.  0.05 and 0.6 are facts A3's; the prior's is lenient, as a LoRA trained
    without class images takes part of its class word with it (DreamBooth, table 3)."""

    copy_rate: float = setting(0.05, low=0, high=1)
    diversity: float = setting(0.6, low=0, high=1)  # of the untrained base's
    prior: float = setting(1.0, low=0, high=100)  # as like the subject as the real images are
