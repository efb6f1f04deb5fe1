"""Fitting: which corners of the search space need which remedy on this GPU, and what does not fit at all, said before
the first trial.

Owns the corners (the edges of all searched settings that decide memory) and the lines about them. The prediction is
that of ``hpo plan`` (``trainer.memory``); the remedies are those of ``hpo.search.remedies``. On a CPU nothing is said.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.search.remedies import Card, remedy_words, with_remedies
from hpo.study import Choice, Range, set_words, settings_of
from hpo.terminal import short
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ToolError
from trainer.memory import choose, memory_settings, next_rung

if TYPE_CHECKING:
    from hpo.search.workbench import Workbench
    from hpo.study import StudyConfig

MOST_CORNERS = 32  # with more, each searched setting is varied alone
MOST_SECONDS = 60.0  # of planning; a corner without a stored trace takes seconds
MOST_LINES = 6


@dataclass(frozen=True)
class Corner:
    """Some edges of the space: the suggested values, the searched settings that decide memory, the predicted peak as
    they are, the remedies, and the peak with them."""

    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: TrainConfig
    peak_bytes: int
    remedies: tuple[str, ...]
    least_bytes: int
    fits: bool  # with the remedies


@dataclass(frozen=True)
class Fit:
    """The planned corners, those that need most memory first. ``searched``: the parameters that decide memory.
    ``left``: corners that were not planned, to begin in time."""

    card: Card
    corners: tuple[Corner, ...]
    searched: tuple[str, ...]
    left: int = 0

    @property
    def has_room(self) -> bool:
        """Whether some corner fits. A prediction is no measurement, so what should be left free may be used here."""
        return not self.corners or min(c.least_bytes for c in self.corners) <= self.card.usable_bytes


def plan(
    study: StudyConfig, card: Card, say: Callable[[str], None], now: Callable[[], float] = time.monotonic
) -> Fit:
    """Plan the corners of the space for a GPU.  Says what takes time before it begins."""
    searched, corners = _corners(study)
    count = len(corners)
    say(
        f"planning memory for {card.usable_bytes / 1e9:.1f} GB: {count} corner{'s'[: count != 1]} of the space …"
    )
    found: list[Corner] = []
    begun = now()
    for values, config in corners:
        if found and now() - begun > MOST_SECONDS:
            break
        found.append(_planned(study, card, searched, values, config))
    found.sort(key=lambda corner: -corner.peak_bytes)
    return Fit(card, tuple(found), searched, count - len(found))


def lines(study: StudyConfig, fit: Fit) -> list[str]:
    """What a user should know before the first trial; empty if the whole space fits as it is."""
    found = []
    needing = [corner for corner in fit.corners if corner.remedies]
    for corner in needing[:MOST_LINES]:
        what = f"{_words(corner)} needs {corner.peak_bytes / 1e9:.1f} GB"
        how = remedy_words(corner.config, corner.remedies) or "no remedy"
        if corner.fits:
            found.append(f"{what}: computed with {how}, which does not change the result")
        else:
            least = f"{corner.least_bytes / 1e9:.1f} GB even with {how}"
            found.append(
                f"warning: {what}, {least}: such trials will be infeasible{_instead(study, fit, corner)}"
            )
    if len(needing) > MOST_LINES:
        found.append(f"{len(needing) - MOST_LINES} more corners of the space need remedies")
    if fit.left:
        found.append(f"{fit.left} more corners are not planned now: their trials plan for themselves")
    return found


def require_room(study: StudyConfig, fit: Fit) -> None:
    """Raise ConfigError if no trial of the space can fit, with the settings to change."""
    if fit.has_room:
        return
    least = min(fit.corners, key=lambda corner: corner.least_bytes)
    raise ConfigError(
        f"no trial of this space fits into {fit.card.usable_bytes / 1e9:.1f} GB: the smallest "
        f"({_words(least)}) needs {least.least_bytes / 1e9:.1f} GB even with "
        f"{remedy_words(least.config, least.remedies) or 'nothing left to save'}",
        _change(study, fit.card, least),
    )


def say_fit(bench: Workbench, say: Callable[[str], None], *, fresh: bool) -> None:
    """Plan and print before the first trial. A fresh study without room is refused (ConfigError)."""
    card = bench.remedies.card
    if card is None:
        return
    try:
        fit = plan(bench.study, card, say)
    except ToolError as error:
        say(f"memory is not planned: {error.message}")
        return
    if fresh:
        require_room(bench.study, fit)
    for line in lines(bench.study, fit):
        say(line)


# Corners


def _corners(study: StudyConfig) -> tuple[tuple[str, ...], list[tuple[Mapping[str, Any], TrainConfig]]]:
    """The parameters that decide memory, and all combinations of their edges that need different memory. Other
    parameters have their value of the baseline."""
    edges = {p.name: p.domain.edges for p in study.space if _decides(study, p.name, p.domain.edges)}
    if _product(edges) <= MOST_CORNERS:
        combined = [dict(zip(edges, values, strict=True)) for values in itertools.product(*edges.values())]
    else:
        ends = [{name: values[end] for name, values in edges.items()} for end in (0, -1)]
        combined = [
            *ends,
            *({**end, name: edge} for end in ends for name, values in edges.items() for edge in values),
        ]
    found: dict[str, tuple[Mapping[str, Any], TrainConfig]] = {}
    for values in combined[:MOST_CORNERS]:
        config = study.config({**study.baseline, **values})
        found.setdefault(json.dumps(memory_settings(config), sort_keys=True), (values, config))
    return tuple(edges), list(found.values())


def _decides(study: StudyConfig, name: str, edges: Sequence[Any]) -> bool:
    """Whether a parameter changes the memory of a step."""
    first, *others = (memory_settings(study.config({**study.baseline, name: edge})) for edge in edges)
    return any(other != first for other in others)


def _product(edges: Mapping[str, Sequence[Any]]) -> int:
    count = 1
    for values in edges.values():
        count *= len(values)
    return count


def _planned(
    study: StudyConfig, card: Card, searched: Sequence[str], values: Mapping[str, Any], config: TrainConfig
) -> Corner:
    peak = least = card.needed_bytes(config)
    remedies: tuple[str, ...] = ()
    settled = config
    while least > card.limit_bytes and (rung := next_rung(settled, remedies, keeps_result=True)):
        remedies, settled = (*remedies, rung.name), with_remedies(config, (*remedies, rung.name))
        least = card.needed_bytes(settled)
    names = dict.fromkeys(name for parameter in searched for name in settings_of(parameter))
    return Corner(
        values,
        {name: getattr(config, name) for name in names},
        config,
        peak,
        remedies,
        least,
        least <= card.limit_bytes,
    )


# Words


def _words(corner: Corner) -> str:
    """The settings of a corner; those that are not searched but usually decide, where none is."""
    shown = corner.settings or {
        name: getattr(corner.config, name) for name in ("train_batch_size", "network_dim")
    }
    return ", ".join(f"{name} {short(value)}" for name, value in shown.items())


def _instead(study: StudyConfig, fit: Fit, corner: Corner) -> str:
    """How to leave a corner out of the space: the first parameter of which less makes it fit, with its new range."""
    domains = {p.name: p.domain for p in study.space}
    for name in fit.searched:
        for value in _less(domains[name], corner.values[name]):
            values = {**corner.values, name: value}
            config = study.config({**study.baseline, **values})
            if _planned(study, fit.card, fit.searched, values, config).fits:
                return f"; to leave them out: {set_words([_narrowed(name, domains[name], value)])}"
    return ""


def _less(domain: Range | Choice, value: Any) -> Sequence[Any]:
    """The values of a domain that may need less than ``value``: the largest first."""
    if isinstance(domain, Choice):
        numbers = [option for option in domain.options if isinstance(option, int | float)]
        return sorted((n for n in numbers if n < value), reverse=True) if value in numbers else ()
    if not domain.whole:
        return [domain.low] if domain.low < value else []
    return range(int(value) - 1, int(domain.low) - 1, -1)


def _narrowed(name: str, domain: Range | Choice, value: Any) -> str:
    """``--set`` value for a domain that ends at ``value``."""
    if isinstance(domain, Choice):
        return f"{name}={json.dumps([option for option in domain.options if option <= value])}"
    if value == domain.low:
        return f"{name}={json.dumps(value)}"
    more = (", log=true" if domain.log else "") + (f", step={domain.step}" if domain.step is not None else "")
    return f"{name}={{low={domain.low}, high={value}{more}}}"


def _change(study: StudyConfig, card: Card, corner: Corner) -> str:
    """Settings with which the smallest corner fits, as ``hpo plan`` chooses them."""
    try:
        stack = choose(with_remedies(corner.config, corner.remedies), card.facts, card.usable_bytes)
    except ConfigError:
        return "use a smaller base or a GPU with more memory, or close other programs that use it"
    searched = {setting for p in study.space for setting in settings_of(p.name)}
    moves = [f"{move.key}={json.dumps(move.new)}" for move in stack.moves if move.key not in searched]
    if not moves:
        return "lower train_batch_size or network_dim, or close other programs that use the GPU"
    return f"change settings: {set_words(moves)}"
