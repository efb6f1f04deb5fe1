"""Whether a study's best trial lies on an edge of the space, and the command that widens it.

Owns what counts as an edge, how far a range is widened, and the words.  Does not own the rewriting of the command
(``hpo.study.nextsearch``) or changes of a search that learned nothing (``hpo.study.changes``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.study.changes import valid_sets
from hpo.study.config import StudyConfig
from hpo.study.folder import StudyFolder, another_name
from hpo.study.nextsearch import FORK_FROM, next_search
from hpo.study.space.domain import Range
from hpo.study.standing import Standing
from trainer.text import clean_text

NEAR = 0.05  # of the range, on its scale: nearer to an end of it than this is on the edge (assumed)
SHARE = 0.5  # of the range, on its scale: so much is added beyond the edge (assumed)


@dataclass(frozen=True)
class Edge:
    """A parameter whose best value lies on an end of its range, and the ``--set`` value that widens it; empty if
    there are no valid values beyond."""

    name: str
    value: float
    limit: float
    is_high: bool
    change: str

    @property
    def says(self) -> str:
        word = "up to" if self.is_high else "down to"
        return f"{clean_text(self.name)} = {self.value:.3g} (searched {word} {self.limit:.3g})"


def edges(config: StudyConfig, best: Mapping[str, Any]) -> list[Edge]:
    """The edges that the proposal of a best trial lies on.  Only those with valid values beyond them."""
    inactive = config.space.inactive(best)
    found = []
    for p in config.space:
        domain = p.domain
        if not isinstance(domain, Range) or p.name in inactive or domain.low == domain.high:
            continue
        place = domain.to_unit(best[p.name])
        if NEAR <= place <= 1 - NEAR:
            continue
        is_high = place > 0.5
        change = _widened(config, p.name, domain, is_high)
        if change:
            limit = domain.high if is_high else domain.low
            found.append(Edge(p.name, best[p.name], limit, is_high, change))
    return found


def edge_lines(folder: StudyFolder, config: StudyConfig, best: Mapping[str, Any], now: Standing) -> list[str]:
    """What the end of a search says about it.  Empty if the best trial lies inside the space."""
    if best.keys() != config.baseline.keys() or now.only_baseline:
        return []
    found = edges(config, best)
    if not found:
        return []
    changes = [edge.change for edge in found]
    more = now.complete + max(5, math.ceil(now.total / 2))
    command = next_search(folder, changes, fork=True, trials=more)
    if not command:
        sets = (word for change in changes for word in ("--set", f"'{change}'"))
        command = f"search {another_name(*sets, FORK_FROM, folder.name)}"
    return [
        f"the best trial lies on an edge of the space: {'; '.join(edge.says for edge in found)}",
        "  better settings may lie beyond it. A wider search that keeps the finished trials:",
        f"  {command}",
    ]


def _widened(config: StudyConfig, name: str, domain: Range, is_high: bool) -> str:
    """The widened range as a ``--set`` value.  Empty if nothing beyond the edge is valid."""
    for share in (SHARE, SHARE / 2):
        low, high = _bounds(domain, is_high, share)
        if (low, high) == (domain.low, domain.high):
            continue
        parts = [f"low={low}", f"high={high}"]
        parts += ["log=true"] if domain.log else []
        parts += [f"step={domain.step}"] if domain.step is not None else []
        change = f"{name}={{{', '.join(parts)}}}"
        if valid_sets(config, [change]):
            return change
    return ""


def _bounds(domain: Range, is_high: bool, share: float) -> tuple[float, float]:
    """The range with more of itself beyond one end.  A range above 0 stays above 0, or begins at 0."""
    low, high = domain.low, domain.high
    if domain.log:
        factor = (high / low) ** share
        low, high = (low, high * factor) if is_high else (low / factor, high)
    else:
        more = (high - low) * share
        if domain.step is not None:
            more = max(domain.step, round(more / domain.step) * domain.step)
        new_low = low - more
        if low >= 0:
            new_low = max(0, new_low) if domain.step is None else new_low if new_low >= 0 else low
        low, high = (low, high + more) if is_high else (new_low, high)
    if domain.whole:
        if is_high:
            return domain.low, max(int(domain.high) + 1, math.ceil(high))
        return min(int(domain.low) - 1, math.floor(low)) if domain.low != 0 else 0, domain.high
    return (domain.low, _round(high)) if is_high else (_round(low), domain.high)


def _round(value: float) -> float:
    return float(f"{value:.2g}")
