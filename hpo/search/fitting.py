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

MOST_CORNERS = 32
# Settings of which every edge is planned; of the others that decide memory, the edge that needs most.
MAIN = (
    "train_batch_size",
    "network_dim",
    "conv_dim",
    "network_type",
    "text_encoder_lr",
    "text_encoder_lr1",
    "text_encoder_lr2",
    "network_train_unet_only",
    "gradient_checkpointing",
)
MOST_SECONDS = 60.0  # of planning; a corner without a stored trace takes seconds
ADVICE_SECONDS = 20.0  # of looking for what leaves out the corners that do not fit


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
    """The planned corners, those that need most memory first; the one that should need least is always among them.
    ``searched``: the parameters that decide memory. ``left``: corners that were not planned, to begin in time."""

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
    say(f"planning memory for {card.usable_bytes / 1e9:.1f} GB (seconds; the first time up to a minute) …")
    begun = now()
    searched, corners = _corners(study, card)
    found: list[Corner] = []
    for values in corners[:MOST_CORNERS]:
        if found and now() - begun > MOST_SECONDS:
            break
        found.append(_planned(study, card, searched, values))
    found.sort(key=lambda corner: -corner.peak_bytes)
    return Fit(card, tuple(found), searched, len(corners) - len(found))


def lines(study: StudyConfig, fit: Fit, now: Callable[[], float] = time.monotonic) -> list[str]:
    """What a user should know before the first trial; empty if the whole space fits as it is."""
    ends = now() + ADVICE_SECONDS
    groups: dict[tuple[str, bool], list[Corner]] = {}
    for corner in fit.corners:
        if corner.remedies or not corner.fits:
            groups.setdefault((remedy_words(corner.config, corner.remedies), corner.fits), []).append(corner)
    found = []
    for (how, fits), group in groups.items():
        worst = group[0]
        what = f"{_common(fit, group)} needs {worst.peak_bytes / 1e9:.1f} GB"
        if fits:
            found.append(f"{what}: computed with {how}, which does not change the result")
            continue
        even = f"{worst.least_bytes / 1e9:.1f} GB even with {how}" if how else "and nothing can be saved"
        then = "will be tried, and probably be infeasible"
        found.append(
            f"warning: {what}, {even}: such trials {then}{_instead(study, fit, worst, lambda: now() > ends)}"
        )
    if fit.left:
        found.append(
            f"{fit.left} more corners of the space are not planned now: their trials plan for themselves"
        )
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
        if not fit.has_room:
            say("looking for settings that fit …")
        require_room(bench.study, fit)
    for line in lines(bench.study, fit):
        say(line)


# Corners


def _corners(study: StudyConfig, card: Card) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The parameters that decide memory, and suggested values: first those that should need least, then all
    combinations of the edges of those in ``MAIN``, with whatever needs most of the others, from the combination that
    should need most on. The rest is the baseline's."""
    edges = {p.name: p.domain.edges for p in study.space if _decides(study, p.name, p.domain.edges)}
    main = [name for name in edges if set(settings_of(name)) & set(MAIN)]
    numbers = [name for name in main if all(_is_number(edge) for edge in edges[name])]
    most_first = {name: tuple(sorted(edges[name], reverse=True)) for name in numbers}
    for name in [name for name in edges if name not in numbers]:
        high = {other: most_first.get(other, values)[0] for other, values in edges.items()}
        needs = [(_needed(study, card, {**high, name: edge}), edge) for edge in edges[name]]
        most_first[name] = tuple(edge for _, edge in sorted(needs, key=lambda pair: -pair[0]))
    high, low = ({name: most_first[name][end] for name in edges} for end in (0, -1))
    ways = itertools.product(*(range(len(most_first[name])) for name in main))
    chosen = [dict(zip(main, way, strict=True)) for way in sorted(ways, key=sum)]
    combined = [{**high, **{name: most_first[name][n] for name, n in way.items()}} for way in chosen]
    minor = [name for name in edges if name not in main]
    return (*minor, *main), [low, *(values for values in combined if values != low)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _needed(study: StudyConfig, card: Card, values: Mapping[str, Any]) -> int:
    return card.needed_bytes(study.config({**study.baseline, **values}))


def _decides(study: StudyConfig, name: str, edges: Sequence[Any]) -> bool:
    """Whether a parameter changes the memory of a step."""
    first, *others = (memory_settings(study.config({**study.baseline, name: edge})) for edge in edges)
    return any(other != first for other in others)


def _planned(study: StudyConfig, card: Card, searched: Sequence[str], values: Mapping[str, Any]) -> Corner:
    config = study.config({**study.baseline, **values})
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


def _common(fit: Fit, group: Sequence[Corner]) -> str:
    """What the corners of a group have in common, and others have not; the first is the one that needs most."""
    shared = {
        name: value
        for name, value in group[0].settings.items()
        if all(corner.settings[name] == value for corner in group)
        and any(corner.settings[name] != value for corner in fit.corners)
    }
    return ", ".join(f"{name} {short(value)}" for name, value in shared.items()) or "the largest trial"


def _instead(study: StudyConfig, fit: Fit, corner: Corner, is_late: Callable[[], bool]) -> str:
    """How to leave a corner out of the space: the first parameter of which less makes it fit, with its new range.
    What is known when it is late is said."""
    domains = {p.name: p.domain for p in study.space}
    for name in fit.searched:

        def fits(value: Any, name: str = name) -> bool:
            return _planned(study, fit.card, fit.searched, {**corner.values, name: value}).fits

        options = _less(domains[name], corner.values[name])
        if isinstance(options, range):
            value = _last_that_fits(options, fits, is_late)
        else:
            value = _first_that_fits(options, fits, is_late)
        if value is not None:
            return f"; to leave them out: {set_words([_narrowed(name, domains[name], value)])}"
    return ""


def _first_that_fits(options: Sequence[Any], fits: Callable[[Any], bool], is_late: Callable[[], bool]) -> Any:
    """The first value that fits; None without one, or if it was not found in time."""
    for value in options:
        if is_late():
            return None
        if fits(value):
            return value
    return None


def _last_that_fits(options: range, fits: Callable[[Any], bool], is_late: Callable[[], bool]) -> int | None:
    """The last of ascending values that fits, if more needs more; None if the first does not fit. The largest that is
    known when it is late."""
    if not options or is_late() or not fits(options[0]):
        return None
    known, too_much = 0, len(options)
    while too_much - known > 1 and not is_late():
        middle = (known + too_much) // 2
        known, too_much = (middle, too_much) if fits(options[middle]) else (known, middle)
    return options[known]


def _less(domain: Range | Choice, value: Any) -> Sequence[Any]:
    """The values of a domain that may need less than ``value``: whole numbers as an ascending range; of other numbers,
    the largest first."""
    if isinstance(domain, Choice):
        if all(map(_is_number, domain.options)):
            return sorted((option for option in domain.options if option < value), reverse=True)
        return [option for option in domain.options if option != value]
    if not domain.whole:
        return [domain.low] if domain.low < value else []
    return range(int(domain.low), int(value), int(domain.step or 1))


def _narrowed(name: str, domain: Range | Choice, value: Any) -> str:
    """``--set`` value for a domain that ends at ``value``."""
    if isinstance(domain, Choice):
        are_numbers = all(map(_is_number, domain.options))
        kept = [option for option in domain.options if (option <= value if are_numbers else option == value)]
        return f"{name}={json.dumps(kept)}"
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
