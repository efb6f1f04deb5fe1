"""What to change in a study so that its next search can learn something, as values of ``--set``.

Owns longer and shorter trials and moved rates; every change is a valid study or it is left out.  Does not own whether
anything was learned (``hpo.study.learning``) or the command that makes the change (``hpo.study.nextsearch``).
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.study.config import StudyConfig, build_study
from hpo.study.space.derived import IMAGES_SEEN
from hpo.study.space.domain import Choice, Range
from hpo.study.space.space import baseline_name
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from hpo.study.learning import TrialEvidence

RATE_FACTOR = 10.0  # how far a rate that is too low or too high is moved at least
# ‖ΔW‖ / ‖W‖ that a rate is raised to: in the middle of the trials that learned something (1.3 % to 11 % on the
# miniature, docs/study.md).  ΔW grows in proportion to the rate as long as it is small (assumed).
LEARNED_CHANGE = 0.03
HIGHEST_RATE = 0.1  # a rate is not raised above this, but for RATE_FACTOR (assumed)
LENGTHS = (IMAGES_SEEN, "max_train_steps", "max_train_epochs")  # the first one decides if several are set
TOO_LOW, TOO_HIGH, BOTH = "too low", "too high", "both"
RATES = ("learning_rate", "unet_lr")


def changed_space(
    study: StudyConfig, found: Sequence[TrialEvidence], needed: int, rate: str
) -> tuple[str, ...]:
    """``--set`` values for a search that can learn something.  Empty if they would not be a valid study."""
    per_unit = max((e.images_seen / e.length for e in found if e.length), default=0.0)
    if _length(study)[0] == IMAGES_SEEN:
        per_unit = 1.0
    sets = [*_longer(study, per_unit, needed), *(_moved(study, found, rate) if rate else ())]
    return valid_sets(study, sets)


def longer(study: StudyConfig, per_unit: float, needed: int) -> tuple[str, ...]:
    """``--set`` values with which the shortest trial sees ``needed`` images.  Empty if there are none.

    ``per_unit``: images seen per epoch, per step in a study that sets steps, per image where images seen are searched.
    """
    return valid_sets(study, _longer(study, per_unit, needed))


def shorter(study: StudyConfig, share: float) -> tuple[str, ...]:
    """``--set`` values with which the longest trial has this share of its length.  Empty if there are none."""
    name, domain = _length(study)
    baseline = study.sections.get("baseline", {}).get(baseline_name(name))
    if domain is None:
        high = int(getattr(study.train, name) * share)
        return valid_sets(study, [f"{name}={high}"]) if high >= 1 else ()
    high = int(max(domain.edges) * share)
    low = min(domain.edges)
    if high < low:
        return ()
    sets = [_range(name, domain, low, high)]
    return valid_sets(study, [*sets, f"baseline.{name}={high}"] if baseline and baseline > high else sets)


def set_words(sets: Sequence[str]) -> str:
    """``--set`` values for a shell."""
    return " ".join(f"--set {shlex.quote(text)}" for text in sets)


def valid_sets(study: StudyConfig, sets: Sequence[str]) -> tuple[str, ...]:
    """The ``--set`` values if the study is valid with them, else none."""
    try:
        build_study(study.name, study.sections, sets=sets)
    except ConfigError:
        return ()
    return tuple(sets)


def _length(study: StudyConfig) -> tuple[str, Range | Choice | None]:
    """The setting that decides how long a trial is, and its domain if it is searched."""
    searched = {p.name: p.domain for p in study.space}
    for name in LENGTHS:
        if name in searched:
            return name, searched[name]
    return LENGTHS[1] if study.train.max_train_steps else LENGTHS[2], None


def _range(name: str, domain: Range | Choice, low: int, high: int) -> str:
    log = ", log=true" if isinstance(domain, Range) and domain.log else ""
    return f"{name}={{low={low}, high={high}{log}}}"


def _longer(study: StudyConfig, per_unit: float, needed: int) -> list[str]:
    if not needed or not per_unit:
        return []
    name, domain = _length(study)
    low = math.ceil(needed / per_unit)
    if domain is None:
        return [f"{name}={low}"]
    return [_range(name, domain, low, max(2 * low, max(domain.edges))), f"baseline.{name}={low}"]


def _moved(study: StudyConfig, found: Sequence[TrialEvidence], rate: str) -> list[str]:
    """Rates ten times higher or lower, or more if the weights hardly changed at all, or between the trials that were
    too weak and those that were too strong.

    Trial 0 gets the middle of the new range, its other rates keep their ratio to it.
    """
    searched = {p.name: p.domain for p in study.space}
    name = next((n for n in RATES if n in searched), RATES[0])
    domain, baseline = searched.get(name), dict(study.sections.get("baseline", {}))
    fixed = getattr(study.train, name) if domain is None else None
    factor = {TOO_LOW: RATE_FACTOR, TOO_HIGH: 1 / RATE_FACTOR}.get(rate, 1.0)
    if rate == TOO_LOW:
        high = domain.high if isinstance(domain, Range) else float(fixed or HIGHEST_RATE)
        low = domain.low if isinstance(domain, Range) else high
        factor = _raised(found, name, math.sqrt(low * high), high)
    if domain is None:
        return (
            [f"{name}={fixed * factor:.2g}", *_scaled(baseline, name, factor)]
            if fixed and factor != 1
            else []
        )
    if not isinstance(domain, Range):
        return []
    low, high = domain.low * factor, domain.high * factor
    if rate == BOTH:
        low = max((e.rates.get(name, 0.0) for e in found if e.too_little), default=low)
        high = min((e.rates.get(name, math.inf) for e in found if e.too_much), default=high)
        if not 0 < 2 * low < high < math.inf:
            return []
    low, high = float(f"{low:.2g}"), float(f"{high:.2g}")
    middle = float(f"{math.sqrt(low * high):.2g}")
    scale = middle / float(baseline[name]) if baseline.get(name) else factor
    log = ", log=true" if domain.log else ""
    return [
        f"{name}={{low={low:g}, high={high:g}{log}}}",
        f"baseline.{name}={middle:g}",
        *_scaled(baseline, name, scale),
    ]


def _raised(found: Sequence[TrialEvidence], name: str, middle: float, high: float) -> float:
    """The factor for rates around ``middle`` with which the weights would change enough."""
    needed = [
        e.rates[name] * LEARNED_CHANGE / e.weight_change
        for e in found
        if e.too_little and e.weight_change and e.rates.get(name)
    ]
    if not needed or middle <= 0:
        return RATE_FACTOR
    return max(RATE_FACTOR, min(statistics.median(needed) / middle, HIGHEST_RATE / high))


def _scaled(baseline: Mapping[str, Any], but: str, factor: float) -> list[str]:
    """Trial 0's other rates, so that they keep their ratio to the one that was moved."""
    rates = {n: float(v) for n, v in baseline.items() if n.endswith("_lr") and n != but and v}
    return [f"baseline.{n}={v * factor:.2g}" for n, v in rates.items()]
