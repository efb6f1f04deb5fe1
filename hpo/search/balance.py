"""What the sampler sees of the learning rate: one that means the same for every length, batch and alpha.

The best learning rate falls with the length of the training and with network_alpha, and rises with the batch.  A
sampler that sees the rate itself must find it anew for each of them.  So it sees

    rate × √(network_alpha × optimizer steps), relative to the baseline's alpha and steps,

and what it proposes is divided by the same root.  What is trained, stored and shown is kohya's learning_rate.

Evidence: on the recorded table the best rate goes with the power −0.7 of the images seen, 0.5 of the batch, −0.7 of
alpha / rank and −0.5 of the rank (docs/search.md).  The root of each is the simplest rule near it, and the batch's is
that of Malladi et al. 2022 (arXiv 2205.10287) for Adam.  It was measured with AdamW, and is used for its variants only.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import TrialState, create_trial

from hpo.study import Parameter, Range, Space, StudyConfig, settings_of
from trainer.config import TrainConfig

RATES = ("learning_rate", "unet_lr")
SEEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
MOVES_WITH = frozenset(
    ("max_train_steps", "max_train_epochs", "train_batch_size", "gradient_accumulation_steps")
) | {"network_alpha"}
COUNTED = MOVES_WITH | {"network_dim"}  # what alpha × steps is made of, alpha as a share of the rank


@dataclass(frozen=True)
class Balance:
    """The searched rate of a space, and what it is relative to."""

    rate: str
    domain: Range
    space: Space
    fixed: TrainConfig
    usual: float  # alpha × steps of the baseline

    @classmethod
    def of(cls, config: StudyConfig) -> Balance | None:
        """None where there is nothing to balance: a study that says ``[search] rate = "plain"``, a fixed rate, an
        optimizer other than AdamW, or a space with one length, batch and alpha."""
        return (
            None
            if config.search.rate == "plain"
            else cls.between(config.space, config.train, config.baseline)
        )

    @classmethod
    def between(cls, space: Space, fixed: TrainConfig, baseline: Mapping[str, Any]) -> Balance | None:
        found = next((p for p in space if p.name in RATES), None)
        sets = set(space.settings(baseline, fixed))
        if found is None or not isinstance(found.domain, Range) or not found.domain.log:
            return None
        if not all("adamw" in name.lower() for name in _optimizers(space, fixed)) or not sets & MOVES_WITH:
            return None
        return cls(found.name, found.domain, space, fixed, _size(space, fixed, baseline))

    def factor(self, suggested: Mapping[str, Any]) -> float:
        """What a rate for the baseline's length, batch and alpha is multiplied by."""
        return math.sqrt(self.usual / _size(self.space, self.fixed, suggested))

    def seen(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """A proposal as the sampler sees it."""
        return {**suggested, self.rate: suggested[self.rate] / self.factor(suggested)}

    def stored(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        """The proposal itself; a rate outside the space becomes its edge."""
        rate = seen[self.rate] * self.factor(seen)
        return {**seen, self.rate: min(max(rate, float(self.domain.low)), float(self.domain.high))}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as the sampler sees it: the rate's range holds whatever a rate of the space can be seen as."""
        corners = [
            {p.name: value for p, value in zip(self.space, values, strict=True)}
            for values in itertools.product(*(_edges(p) for p in self.space))
        ]
        factors = [self.factor(corner) for corner in corners]
        low, high = float(self.domain.low) / max(factors), float(self.domain.high) / min(factors)
        # a hair wider, for what is rounded
        wide = FloatDistribution(low * (1 - 1e-9), high * (1 + 1e-9), log=True)
        return {**self.space.distributions(), self.rate: wide}

    def sampler(self, inner: BaseSampler, study: optuna.Study, seed: int) -> BaseSampler:
        """A sampler that proposes what ``inner`` proposes after the study's trials, seen in this way.  Trials that do
        not fit the space are left out, as after a fork."""
        space, seen = self.space.distributions(), self.distributions()
        memory = optuna.create_study(directions=study.directions, sampler=inner)
        for trial in study.get_trials(deepcopy=False, states=SEEN):
            fits = trial.params.keys() == space.keys()
            if fits and all(d._contains(d.to_internal_repr(trial.params[n])) for n, d in space.items()):
                memory.add_trial(
                    create_trial(
                        state=trial.state,
                        params=self.seen(trial.params),
                        distributions=seen,
                        values=trial.values,
                        intermediate_values=trial.intermediate_values,
                        constraints=trial.constraints,
                    )
                )
        return proposing(self.stored(memory.ask(seen).params), seed)


def proposing(values: Mapping[str, Any], seed: int) -> BaseSampler:
    """A sampler that proposes these values, and random ones of other parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return PartialFixedSampler(dict(values), RandomSampler(seed=seed))


def _optimizers(space: Space, fixed: TrainConfig) -> tuple[str, ...]:
    searched = next((p.domain for p in space if p.name == "optimizer_type"), None)
    return (fixed.optimizer_type,) if searched is None else tuple(map(str, searched.edges))


def _edges(parameter: Parameter) -> tuple[Any, ...]:
    """The ends of a parameter's domain; one value where it does not count for ``_size``."""
    domain = parameter.domain
    return domain.edges if set(settings_of(parameter.name)) & COUNTED else domain.edges[:1]


def _size(space: Space, fixed: TrainConfig, suggested: Mapping[str, Any]) -> float:
    """Alpha × steps.  A length in epochs is counted in steps of one image: only ratios are used."""
    values = space.settings(suggested, fixed)

    def of(name: str) -> Any:
        return values.get(name, getattr(fixed, name))

    steps = of("max_train_steps")
    if steps is None or "max_train_epochs" in values:
        steps = (of("max_train_epochs") or 1) / (of("train_batch_size") * of("gradient_accumulation_steps"))
    return float(of("network_alpha") or of("network_dim")) * float(
        steps
    )  # alpha 0 means the rank, as in kohya
