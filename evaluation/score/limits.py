"""SafeguardLimits: limits that make a result infeasible, whatever its score.

Owns the limits and their defaults. Does not own the measured values; see ``evaluation.score.safeguards``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from trainer.checks import setting


@dataclass(frozen=True)
class SafeguardLimits:
    """Limits that make a result infeasible. 0.05 and 0.6 are assumed. The limit of the prior is
    lenient: a LoRA trained without regularisation images changes its class word to some degree
    (DreamBooth, arXiv 2208.12242, table 3). ``shown`` was chosen by measurement (docs/evaluation.md).

    None: the limit is off, because the study was begun by a version that did not have it.
    """

    copy_rate: float = setting(0.05, low=0, high=1)
    diversity: float = setting(0.6, low=0, high=1)  # relative to the untrained base
    prior: float = setting(1.0, low=0, high=100)  # 1: as similar to the subject as real images
    # prompt following below which the images must at least resemble something known
    shown: float | None = setting(0.1, low=-100, high=1)

    def as_dict(self) -> dict[str, float]:
        """The limits that are on."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def without_newer(self, known: Collection[str]) -> SafeguardLimits:
        """These limits, with every one off that can be off and is not in ``known``."""
        newer = [f.name for f in fields(self) if "None" in str(f.type) and f.name not in known]
        off: dict[str, Any] = dict.fromkeys(newer)
        return replace(self, **off)
