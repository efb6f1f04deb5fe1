"""The search space: which settings are searched, in which ranges, and how a proposal becomes a TrainConfig.

Owns the parameters, the mapping from a proposal to settings (a pure function), its inverse (for the baseline
and for a user's own configuration) and the check of every edge.  Does not own the domain of a parameter
(``hpo.study.space.domain``), derived parameters (``hpo.study.space.derived``) or the study file
(``hpo.study.config``).  Does not access the storage.

The space is static: every parameter is suggested in every trial, under one name.  A conditional parameter
without effect in a trial is recorded as inactive and not passed to training.  If it were suggested only in
some trials, it would silently drop out of TPE's joint model.  A setting that only makes sense relative to
another one has its own parameter; see ``DERIVED``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpo.study.space.derived import DERIVED
from hpo.study.space.domain import Choice, Range, Values
from trainer.checks import suggestion
from trainer.config import SETTINGS, WITHOUT_INFLUENCE, ZERO_IS_UNSET, TrainConfig
from trainer.errors import ConfigError
from trainer.overrides import unset

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Parameter:
    """One searched parameter.  ``inactive_when``: another parameter → the values with which this
    one has no effect."""

    name: str
    domain: Range | Choice
    inactive_when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def describe(self) -> str:
        off = "; ".join(f"{name} = {'/'.join(map(str, v))}" for name, v in self.inactive_when.items())
        return self.domain.describe() + (f", inactive when {off}" if off else "")


BASELINE = "[baseline]"
FOLDED_SCHEDULE = "cosine_with_restarts_"
# Not comparable between trials: names and paths, and settings for reading the dataset, which is read once for all
# trials.
NOT_SEARCHABLE = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "output_name",
    "seed",
    "resolution",
    "dataset_config",
    "reg_data_dir",
    "caption_extension",
    "enable_wildcard",
    "masked_loss",
    "conditioning_data_dir",
    *sorted(WITHOUT_INFLUENCE),
)


# Settings that are set elsewhere or do not change the result.  They may change during a study.
ELSEWHERE = {
    "pretrained_model_name_or_path": "--base",
    "train_data_dir": "--data",
    "output_name": "the trial's number",
    "seed": "--seed",
    "dataset_config": "--data",
    "hold_out_references": "the search itself",
    **dict.fromkeys(sorted(WITHOUT_INFLUENCE), "the search itself"),
}


def settings_of(name: str) -> tuple[str, ...]:
    """The settings that a parameter sets."""
    if name in DERIVED:
        return (DERIVED[name].sets,)
    return ("lr_scheduler", "lr_scheduler_num_cycles") if name == "lr_scheduler" else (name,)


def unset_by(name: str) -> tuple[str, ...]:
    """Settings that are unset because a parameter sets another one that means the same."""
    return DERIVED[name].unsets if name in DERIVED else ()


def baseline_name(name: str) -> str:
    """The name of a parameter's value in [baseline]: kohya's, unless that would depend on other settings."""
    return name if name in DERIVED and DERIVED[name].own_baseline else settings_of(name)[0]


@dataclass(frozen=True)
class Space:
    """The parameters of a study, in the order of the study file."""

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        known = [name for name in (*SETTINGS, *DERIVED) if name not in NOT_SEARCHABLE]
        for p in self.parameters:
            if p.name not in known:
                if p.name in NOT_SEARCHABLE:
                    raise ConfigError(
                        f"{p.name} cannot be searched",
                        "remove it from [space]: trials would not be comparable",
                    )
                hint = suggestion(p.name, known) or "use kohya's names, or one of " + ", ".join(DERIVED)
                raise ConfigError(f"unknown setting {p.name} in [space]", hint)
            for other, values in p.inactive_when.items():
                _check_condition(p, other, values, {q.name: q for q in self.parameters})
        owner: dict[str, str] = {}
        for name in names:
            for setting in settings_of(name):
                if setting in owner:
                    raise ConfigError(
                        f"{owner[setting]} and {name} both set {setting}", "search only one of them"
                    )
                owner[setting] = name

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def without(self, settings: set[str]) -> Space:
        """The space without the parameters that set one of ``settings``, and without
        conditions on those parameters."""
        gone = {p.name for p in self if p.name in settings or settings & set(settings_of(p.name))}
        kept = []
        for p in self:
            if p.name not in gone:
                kept.append(
                    Parameter(p.name, p.domain, {k: v for k, v in p.inactive_when.items() if k not in gone})
                )
        return Space(tuple(kept))

    def distributions(self) -> dict[str, BaseDistribution]:
        return {p.name: p.domain.distribution() for p in self}

    def inactive(self, suggested: Values) -> tuple[str, ...]:
        """Names of the parameters that have no effect in this proposal."""
        return tuple(
            p.name
            for p in self
            if any(suggested[other] in values for other, values in p.inactive_when.items())
        )

    def settings(self, suggested: Values, fixed: TrainConfig) -> dict[str, Any]:
        """The settings of a proposal.  A pure function, and the only place where settings are derived."""
        off = self.inactive(suggested)
        values: dict[str, Any] = {}
        direct = [p.name for p in self if p.name not in DERIVED and p.name not in off]
        # DERIVED is sorted by dependency: network_dim before network_alpha.
        derived = [name for name in DERIVED if name in suggested and name not in off]
        for name in direct:
            value = suggested[name]
            if name == "lr_scheduler" and str(value).startswith(FOLDED_SCHEDULE):
                cycles = str(value).removeprefix(FOLDED_SCHEDULE)
                values |= {
                    "lr_scheduler": "cosine_with_restarts",
                    "lr_scheduler_num_cycles": _cycles(value, cycles),
                }
            else:
                values[name] = unset(name, value)
        for name in derived:
            needed = {n: values[n] if n in values else getattr(fixed, n) for n in DERIVED[name].needs}
            values[DERIVED[name].sets] = DERIVED[name].forward(suggested[name], needed)
        return values

    def config(self, suggested: Values, fixed: TrainConfig) -> TrainConfig:
        """The complete, validated configuration of a proposal."""
        values = self.settings(suggested, fixed)
        instead = {name: None for p in self for name in unset_by(p.name) if settings_of(p.name)[0] in values}
        return fixed.with_values({**instead, **values})

    def place(self, suggested: Values) -> tuple[float, ...]:
        """The proposal as numbers: 0 to 1 for a range.  A choice has one number per option, 0 or 1/√2, so that
        two different options have distance 1.  Inactive parameters are 0.5, so that they do not add distance."""
        off = self.inactive(suggested)
        numbers: list[float] = []
        for p in self:
            if isinstance(p.domain, Choice):
                numbers += [math.sqrt(0.5) * (suggested[p.name] == option) for option in p.domain.options]
            else:
                numbers.append(0.5 if p.name in off else p.domain.to_unit(suggested[p.name]))
        return tuple(numbers)

    def proposal(self, settings: Values, fallback: Values | None = None) -> dict[str, Any]:
        """The proposal for these (complete) settings: the inverse of ``settings``.

        Values may be outside the ranges; use ``check``.  Inactive parameters get the value from ``fallback``.
        """
        found: dict[str, Any] = {}
        for p in self:
            if p.name in DERIVED:
                found[p.name] = DERIVED[p.name].backward(settings)
            elif p.name == "lr_scheduler" and settings["lr_scheduler"] == "cosine_with_restarts":
                folded = f"{FOLDED_SCHEDULE}{settings['lr_scheduler_num_cycles']}"
                found[p.name] = folded if p.domain.holds(folded) else settings["lr_scheduler"]
            elif p.name in ZERO_IS_UNSET and settings[p.name] is None:
                found[p.name] = 0
            else:
                found[p.name] = settings[p.name]
            found[p.name] = _tidy(found[p.name], p.domain)
        for name in self.inactive(found):
            found[name] = (fallback or found)[name]
        return found

    def check(self, suggested: Values, what: str) -> dict[str, Any]:
        """``suggested`` in the order of the space.  Raises ConfigError for missing, unknown or out-of-range values.

        Optuna itself only warns about out-of-range values and ignores unknown names.
        """
        names = [p.name for p in self]
        for name in suggested:
            if name not in names:
                raise ConfigError(f"{what}: {name} is not searched", suggestion(name, names) or "see [space]")
        for p in self:
            if suggested.get(p.name) is None:
                where = f": --set baseline.{baseline_name(p.name)}=…" if what == BASELINE else ""
                raise ConfigError(
                    f"{what}: {p.name} has no value", f"give one in {p.domain.describe()}{where}"
                )
            if p.name == "network_dim_log2" and not float(suggested[p.name]).is_integer():
                raise ConfigError(
                    f"{what}: network_dim = {2 ** suggested[p.name]:.0f} is not a power of two",
                    "use a power of two, or search network_dim itself instead of network_dim_log2",
                )
            if not p.domain.holds(suggested[p.name]):
                value = f" (--set baseline.{baseline_name(p.name)}=…)" if what == BASELINE else ""
                raise ConfigError(
                    f"{what}: {p.name} = {suggested[p.name]} is outside the study's range: {p.domain.describe()}",
                    f"give a value in the range{value}, or search a wider range",
                )
        return {name: suggested[name] for name in names}

    def check_edges(self, fixed: TrainConfig, baseline: Values) -> None:
        """Check that every edge and choice is valid, alone and in pairs with those of other parameters.

        The other parameters have their baseline values.  Rules of TrainConfig involve at most two searched
        settings, so pairs are enough.
        """
        edges = [(p.name, value) for p in self for value in p.domain.edges]
        for name, value in edges:
            self._check_corner(fixed, baseline, {name: value})
        for (one, a), (other, b) in itertools.combinations(edges, 2):
            if one != other:
                self._check_corner(fixed, baseline, {one: a, other: b})

    def _check_corner(self, fixed: TrainConfig, baseline: Values, corner: Values) -> None:
        try:
            self.config({**baseline, **corner}, fixed)
        except ConfigError as error:
            where = ", ".join(f"{name} = {value}" for name, value in corner.items())
            raise ConfigError(f"[space] allows {where}, but {error.message}", error.hint) from None

    def describe(self) -> dict[str, str]:
        """Parameter → its domain as text.  Stored with the study: resuming with a changed text is an error."""
        return {p.name: p.describe() for p in self}


def _tidy(value: Any, domain: Range | Choice) -> Any:
    """The value in the type of its domain.  Floats are rounded to 12 digits; None stays None."""
    if value is None:
        return None
    if isinstance(domain, Choice):
        return domain.options[domain.options.index(value)] if domain.holds(value) else value
    if domain.whole:
        return int(value) if float(value).is_integer() else value
    return float(f"{value:.12g}")


def _check_condition(
    p: Parameter, other: str, values: tuple[Any, ...], all_: Mapping[str, Parameter]
) -> None:
    if other not in all_ or other == p.name:
        hint = suggestion(other, all_) or "name another parameter of [space]"
        raise ConfigError(f"{p.name} is inactive when {other} …, but {other} is not searched", hint)
    if all_[other].inactive_when:
        raise ConfigError(
            f"{p.name} depends on {other}, which can itself be inactive",
            "use a parameter that is always active",
        )
    for value in values:
        if not all_[other].domain.holds(value):
            known = all_[other].domain.describe()
            raise ConfigError(
                f"{p.name} is inactive when {other} = {value}, which is not in the space", f"{other}: {known}"
            )


def _cycles(value: Any, cycles: str) -> int:
    if not cycles.isdecimal() or int(cycles) < 1:
        raise ConfigError(f"unknown lr_scheduler {value!r}", "write cosine_with_restarts_3 for three cycles")
    return int(cycles)
