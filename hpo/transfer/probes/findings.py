"""What probes came to: scores of both sides, the decision, and the lines about it; probes.json.

Owns that file and the words.  What the scores mean is ``hpo.transfer.probes.design``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpo.study import read_json
from hpo.transfer.probes.design import Agreement, Decision, ProbeScore, agreement, find, search_is_better
from hpo.transfer.probes.side import FRACTION
from trainer.files import write_atomic

FILE = "probes.json"


@dataclass(frozen=True)
class Found:
    """What probes changed: settings (none if the transferred ones stay), why, and lines to read."""

    values: Mapping[str, Any]
    reason: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """The scores of both sides, the horizon's shift in octaves if it was measured, and what was decided."""

    outcomes: Sequence[ProbeScore]
    twins: Sequence[ProbeScore]
    shift: float | None
    decision: Decision

    def lines(self, base: str) -> list[str]:
        """``base``: the target's, for the command that searches there directly."""
        lines = [f"probe {o.probe.role}: {o.score:.4f} ± {o.se:.4f}" for o in self.outcomes]
        lines.append(f"decision: {self.decision.reason}")
        if self.shift is not None:
            lines.append(
                f"short runs like a rate {self.shift:+.2f} octaves off whole ones (measured on the source)"
            )
        found = agree(self.outcomes, self.twins)
        lines.append(
            found.line()
            if found
            else "whether the source predicts the target is inconclusive: too few shared configurations have a score"
        )
        better = search_is_better(self.outcomes, found)
        if better:
            lines.append(
                f"{better}: a direct search is the better use of the night: hpo search --base {base}"
            )
        return lines


def agree(outcomes: Sequence[ProbeScore], twins: Sequence[ProbeScore]) -> Agreement | None:
    """Rank agreement over the probes that both sides have."""
    pairs = [(twin.score, o.score) for o in outcomes if (twin := find(twins, o.probe)) is not None]
    return agreement([a for a, _ in pairs], [b for _, b in pairs])


# probes.json


@dataclass(frozen=True)
class Saved:
    """What an earlier call left: the design and number it was asked for, and what it found."""

    design: str
    probes: int
    finished: int
    found: Found


def read_saved(folder: Path) -> Saved | None:
    saved = read_json(folder / FILE)
    if saved is None:
        return None
    found = Found(saved["values"], saved["reason"], tuple(saved["lines"]))
    return Saved(saved["design"], saved["probes"], len(saved["outcomes"]), found)


def write_saved(folder: Path, design: str, probes: int, findings: Findings, found: Found) -> None:
    values = {
        "design": design,
        "probes": probes,
        "fraction": FRACTION,
        "decision": asdict(findings.decision),
        "values": found.values,
        "reason": found.reason,
        "horizon_shift_octaves": findings.shift,
        "lines": found.lines,
        "outcomes": [asdict(o) for o in findings.outcomes],
        "twins": [asdict(o) for o in findings.twins],
    }
    write_atomic(folder / FILE, json.dumps(values, indent=1))
