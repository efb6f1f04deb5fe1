"""The result of the probes: scores on both bases, the decision, the lines for the user, and probes.json.

Owns that file and the output texts.  Does not own the evaluation of the scores; see ``hpo.transfer.probes.design``.
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
    """The settings changed by probes (empty if the transferred ones are kept), the reason, and lines for the user.

    ``evidence``: what the change rests on, beside the reason."""

    values: Mapping[str, Any]
    reason: str
    lines: tuple[str, ...]
    evidence: str = ""


@dataclass(frozen=True)
class Findings:
    """The scores on both bases, the horizon shift in octaves if it was measured, and the decision."""

    outcomes: Sequence[ProbeScore]
    twins: Sequence[ProbeScore]
    shift: float | None
    decision: Decision

    def lines(self, direct: str) -> list[str]:
        """The lines for the user.  ``direct``: the command of a direct search on the target base."""
        lines = [f"target trial ({o.probe.role}): {o.score:.4f} ± {o.se:.4f}" for o in self.outcomes]
        lines.append(f"decision: {self.decision.reason}")
        if self.shift is not None:
            lines.append(
                f"the best rate of short runs differs by {self.shift:+.2f} octaves from that of whole runs "
                "(measured on the source)"
            )
        found = agree(self.outcomes, self.twins)
        lines.append(
            found.line()
            if found
            else "inconclusive whether the source predicts the target: too few shared configurations have a score"
        )
        better = search_is_better(self.outcomes, found)
        if better:
            lines.append(f"{better}; a direct search is probably better: {direct}")
        return lines


def agree(outcomes: Sequence[ProbeScore], twins: Sequence[ProbeScore]) -> Agreement | None:
    """Rank agreement over the probes that were run on both bases."""
    pairs = [(twin.score, o.score) for o in outcomes if (twin := find(twins, o.probe)) is not None]
    return agreement([a for a, _ in pairs], [b for _, b in pairs])


# probes.json


@dataclass(frozen=True)
class Saved:
    """The stored result of an earlier call: its design, its number of probes and its findings."""

    design: str
    probes: int
    finished: int
    found: Found


def read_saved(folder: Path) -> Saved | None:
    saved = read_json(folder / FILE)
    if saved is None:
        return None
    found = Found(saved["values"], saved["reason"], tuple(saved["lines"]), saved.get("evidence", ""))
    return Saved(saved["design"], saved["probes"], len(saved["outcomes"]), found)


def write_saved(
    folder: Path, design: str, probes: int, findings: Findings, found: Found, fraction: float = FRACTION
) -> None:
    values = {
        "design": design,
        "probes": probes,
        "fraction": fraction,
        "decision": asdict(findings.decision),
        "values": found.values,
        "reason": found.reason,
        "evidence": found.evidence,
        "horizon_shift_octaves": findings.shift,
        "lines": found.lines,
        "outcomes": [asdict(o) for o in findings.outcomes],
        "twins": [asdict(o) for o in findings.twins],
    }
    write_atomic(folder / FILE, json.dumps(values, indent=1))
