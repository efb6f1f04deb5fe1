"""What is known before the first target trial: the search's results as places and a surrogate, and other places.

Owns the numbers of a place, which trials of the search count, the stored form (``prior.json``) and the pool of places
that a target trial can be proposed from.  Does not own the model (``hpo.transfer.probes.shifted``).

A place is a proposal of the search's space as numbers, 0 to 1 from one edge to the other.  Rates are always on a log
scale, so that one factor moves all of them equally; a ratio to another rate is not moved, because it follows.  The
place of a target trial is that of the source's settings which the rules turn into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.study import (
    Choice,
    Range,
    StudyConfig,
    StudyFolder,
    database_errors,
    is_feasible,
    objective_of,
    open_study,
    read_json,
)
from hpo.transfer.probes.surrogate import Kernel, Surrogate, fit
from trainer.errors import ConfigError
from trainer.files import write_atomic

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FILE = "prior.json"
RATES = ("learning_rate", "unet_lr", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2")
OUTSIDE = 0.5  # how far a number may be outside 0 to 1
FEWEST = 5  # trials of a search that a surrogate is made of
# Scores far below the others are raised to median − LOWEST × (best − median): a few collapsed trials would else decide
# the kernel.
LOWEST = 3.0
POOL, NEARBY, NEAR = 160, 96, 0.3  # places all over the space, and around the winner within ± NEAR / 2
DECADES, STEPS = 1.0, 21  # the winner at other rates: up to this far up and down, in so many steps


@dataclass(frozen=True)
class SourceTrial:
    """A finished trial of the search."""

    number: int
    suggested: Mapping[str, Any]
    objective: float
    se: float


@dataclass(frozen=True)
class Prior:
    """The search's definition, its trials as they were when the target trials began, and the fitted kernel."""

    study: StudyConfig
    trials: tuple[SourceTrial, ...]
    surrogate: Surrogate

    @classmethod
    def of(cls, study: StudyConfig, folder: StudyFolder) -> Prior:
        """From the finished trials of a search.  Raises ConfigError with too few of them."""
        trials = read_trials(folder)
        if len(trials) < FEWEST:
            raise ConfigError(
                f"study {folder.name} has {len(trials)} scored trials; a model of the search needs {FEWEST}",
                "use --design ladder, or continue the search",
            )
        x_ND = np.array([place(study, t.suggested) for t in trials])
        return cls(study, trials, fit(x_ND, [t.objective for t in trials], [t.se for t in trials]))

    @property
    def floor(self) -> float:
        """The lowest score that the surrogate was told."""
        return min(t.objective for t in self.trials)

    def save(self, folder: Path) -> None:
        kernel = self.surrogate.kernel
        values = {
            "version": 1,
            "trials": [asdict(t) for t in self.trials],
            "lengths": kernel.lengths,
            "amplitude": kernel.amplitude,
            "spread": self.surrogate.spread,
            "noise": self.surrogate.noise_N.tolist(),
            "centre": self.surrogate.centre,
            "scale": self.surrogate.scale,
        }
        write_atomic(folder / FILE, json.dumps(values, indent=1))

    @classmethod
    def read(cls, study: StudyConfig, folder: Path) -> Prior | None:
        """As stored by ``save``: a search that went on meanwhile changes nothing."""
        found = read_json(folder / FILE)
        if found is None:
            return None
        trials = tuple(SourceTrial(**values) for values in found["trials"])
        x_ND = np.array([place(study, t.suggested) for t in trials])
        y_N = (np.array([t.objective for t in trials]) - found["centre"]) / found["scale"]
        kernel = Kernel(tuple(found["lengths"]), found["amplitude"])
        noise_N = np.array(found["noise"])
        surrogate = Surrogate(x_ND, y_N, noise_N, kernel, found["centre"], found["scale"], found["spread"])
        return cls(study, trials, surrogate)


def read_trials(folder: StudyFolder) -> tuple[SourceTrial, ...]:
    """The COMPLETE trials of a search, in order.

    An infeasible trial counts as the worst feasible one, because its settings were bad; but one that ran out of memory
    says nothing about its score.  Very low scores are raised (``LOWEST``).
    """
    from optuna.trial import TrialState

    with database_errors(folder):
        done = open_study(folder).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: list[tuple[FrozenTrial, float | None]] = []
    for trial in done:
        objective = objective_of(trial)
        if is_feasible(trial):
            if objective is not None:
                found.append((trial, objective))
        elif trial.user_attrs.get("reason") != "out_of_memory":
            found.append((trial, None))
    known = [objective for _, objective in found if objective is not None]
    if not known:
        return ()
    best, middle = max(known), float(np.median(known))
    low = max(min(known), middle - LOWEST * (best - middle))
    return tuple(
        SourceTrial(t.number, dict(t.params), low if objective is None else max(objective, low), _se(t))
        for t, objective in found
    )


def _se(trial: FrozenTrial) -> float:
    own = trial.user_attrs.get("objective_se")
    return float(trial.user_attrs.get("se", 0.0) if own is None else own)


# Places


def place(study: StudyConfig, suggested: Mapping[str, Any]) -> tuple[float, ...]:
    """A proposal as numbers: as ``Space.place``, but rates are on a log scale, and what is outside the space stays
    outside (by ``OUTSIDE`` at most; a rate: at any distance)."""
    off = study.space.inactive(suggested)
    numbers: list[float] = []
    for p in study.space:
        value = suggested[p.name]
        if isinstance(p.domain, Choice):
            numbers += [math.sqrt(0.5) * (value == option) for option in p.domain.options]
        else:
            numbers.append(0.5 if p.name in off else _number(p.name, p.domain, value))
    return tuple(numbers)


def _number(name: str, domain: Range, value: float) -> float:
    is_log = domain.log or _is_rate(name, domain)
    if domain.low == domain.high:
        return 0.5
    if not is_log:
        number = (value - domain.low) / (domain.high - domain.low)
    elif value <= 0:
        return -OUTSIDE
    else:
        number = math.log(value / domain.low) / math.log(domain.high / domain.low)
    return number if _is_rate(name, domain) else min(max(number, -OUTSIDE), 1 + OUTSIDE)


def _is_rate(name: str, domain: Range | Choice) -> bool:
    return name in RATES and isinstance(domain, Range) and 0 < domain.low < domain.high


def decades(study: StudyConfig) -> np.ndarray:
    """How far a place moves if all rates are 10 times as high, shape (D,)."""
    numbers: list[float] = []
    for p in study.space:
        if isinstance(p.domain, Choice):
            numbers += [0.0] * len(p.domain.options)
        elif _is_rate(p.name, p.domain):
            numbers.append(1 / math.log10(p.domain.high / p.domain.low))
        else:
            numbers.append(0.0)
    return np.array(numbers)


def at_rates(study: StudyConfig, suggested: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The proposal with all its rates multiplied.  Ratios and choices stay."""
    rates = [p.name for p in study.space if _is_rate(p.name, p.domain)]
    return {**suggested, **{name: float(f"{suggested[name] * factor:.6g}") for name in rates}}


# Other places


def pool(study: StudyConfig, best: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Proposals for target trials: the winner at other rates, places around it, and places all over the space.

    Quasi-random (Sobol, scrambled by ``seed``).  All rates are within ``DECADES`` of the winner's, which may be outside
    the space: two standard deviations of the shift, and a whole run at a rate further away would most likely be lost.
    """
    for step in np.linspace(-DECADES, DECADES, STEPS):
        if step:
            yield at_rates(study, best, 10 ** float(step))
    parameters = list(study.space)
    for number, (*units, rate) in enumerate(_sobol(len(parameters) + 1, POOL + NEARBY, seed)):
        near, reach = number < NEARBY, DECADES * (2 * rate - 1)
        found: dict[str, Any] = {}
        for p, unit in zip(parameters, units, strict=True):
            own = best[p.name]
            if isinstance(p.domain, Choice):  # near the winner, one in four is another choice
                found[p.name] = (
                    p.domain.from_unit(4 * unit if near else unit) if unit < 0.25 or not near else own
                )
            elif _is_rate(p.name, p.domain):
                apart = 0.0 if p.name == RATES[0] else (NEAR if near else 1.0) * (unit - 0.5)
                found[p.name] = float(f"{own * 10 ** (reach + apart):.6g}")
            elif near:
                centre = min(max(_number(p.name, p.domain, own), 0.0), 1.0)
                found[p.name] = p.domain.from_unit(min(max(centre + NEAR * (unit - 0.5), 0.0), 1.0))
            else:
                found[p.name] = p.domain.from_unit(unit)
        yield found


def _sobol(dimensions: int, count: int, seed: int) -> Sequence[Sequence[float]]:
    import torch

    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed % 2**31)
    return engine.draw(count, dtype=torch.float64).tolist()
