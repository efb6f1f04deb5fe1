"""The design ``model``: whole runs on the target, each chosen by a model of the search that learns from them.

Owns the study of these trials, the choice of the next one, its stored proposals (``proposals.json``), the decision and
its words.  Does not own the model (``hpo.transfer.probes.shifted``), the trials' places (``hpo.transfer.probes.prior``)
or how a trial is run (``hpo.transfer.probes.study``).

Order: the transferred settings, the target's usual settings, then the place with the highest expected gain.  Runs have
their whole length: short ones prefer higher rates than whole ones (docs/transfer.md), and no measurement yet says which
shorter runs rank settings as whole ones do.

A proposal is stored before its trial is enqueued.  So a killed command goes on with the same trials, also in a later
version whose model would propose others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpo.study import ELSEWHERE, StudyConfig, build_study, infeasible_value, read_json
from hpo.terminal import short
from hpo.transfer import rate_factors, two_digits
from hpo.transfer.probes.candidates import Candidates
from hpo.transfer.probes.design import (
    DEFAULT,
    TRANSFERRED,
    Agreement,
    Decision,
    Probe,
    ProbeScore,
    agreement,
    find,
    gain_se,
)
from hpo.transfer.probes.prior import Prior, decades, place, pool
from hpo.transfer.probes.shifted import Observed, TargetModel, TargetPosterior
from hpo.transfer.probes.side import (
    ProbeSide,
    Scope,
    ShortRuns,
    check_rates,
    check_unet,
    fits,
    octave_bounds,
    sections,
    with_two_rates,
)
from trainer.config import SETTINGS, ZERO_IS_UNSET, TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic

MODEL = "model"
FILE = "proposals.json"
SHOWN = 3  # settings in the name of a trial
ALIKE = 0.02  # rates closer than this (2 %) are the same trial
SURE = 0.1  # octaves: a shift this small is none


@dataclass(frozen=True)
class Placed:
    """A trial on the target: its settings there, its place on the source, and what was expected of it."""

    role: str
    values: Mapping[str, Any]  # parameters in the space of the target's study
    place: tuple[float, ...]
    gain: float | None = None


class Guide:
    """Chooses the trials of one target study.  ``folder``: where prior.json and proposals.json are kept."""

    def __init__(
        self, candidates: Candidates, prior: Prior, folder: Path, runs: ShortRuns, name: str, budget: int
    ) -> None:
        self.candidates, self.prior, self.folder, self.budget = candidates, prior, folder, budget
        self.model = TargetModel(prior.surrogate, decades(prior.study))
        self.own = with_two_rates(candidates.done.plan.config)
        check_rates(self.own)
        check_unet(self.own)
        self._configs: dict[str, TrainConfig] = {}
        self.placed = self._read()
        begun = (read_json(folder / FILE) or {}).get("sections")
        study = build_study(name, begun if isinstance(begun, dict) else self._sections(runs))
        if not self.placed:
            self.placed = [self._transferred(study), *self._usual(study)]
        for one in self.placed:
            self._configs[one.role] = study.config(one.values)
        scope = Scope(
            budget,
            tuple(one.role for one in self.placed[1:]),
            trains_text_encoder=self.own.trains_text_encoder,
        )
        self.side = ProbeSide(self._configs, study, scope)

    # The search and its best trial

    @property
    def best(self) -> Mapping[str, Any]:
        """The best trial of the search, as a proposal in its space."""
        number = self.candidates.done.source.best.number
        return next(t.suggested for t in self.prior.trials if t.number == number)

    def mapped(self, suggested: Mapping[str, Any]) -> tuple[TrainConfig, tuple[float, ...]] | None:
        """The settings on the target that the rules make of a proposal, with exact rates; and the place that these
        rates have on the source.  None if the rules or the profile's limits refuse them."""
        source, done = self.prior.study, self.candidates.done
        here = {key: getattr(done.plan.source, key) for key in ELSEWHERE}
        try:
            config = source.config(suggested).with_values(here)
            plan = self.candidates.ruled(config)
            if any(finding.about != "vram" for finding in plan.of_level("refuse")):
                return None
            whole = with_two_rates(self.candidates.computed(plan.config))
        except ConfigError:  # settings that exclude each other on the target
            return None
        factor, _ = rate_factors(plan, done.profile)
        exact = two_digits(config.effective_unet_lr * factor)
        if exact <= 0 or whole.learning_rate <= 0:
            return None
        low, high = octave_bounds(whole, done.profile.limits)
        octaves = math.log2(exact / whole.learning_rate)
        if not low - 1e-9 <= octaves <= high + 1e-9:
            return None
        text = two_digits(whole.effective_text_encoder_lr * exact / whole.learning_rate)
        whole = whole.with_values({"learning_rate": exact, "text_encoder_lr": text})
        return whole, place(source, _at(suggested, exact / factor))

    # The study of the trials

    @cached_property
    def _pool(self) -> list[tuple[TrainConfig, tuple[float, ...]]]:
        """The settings that can be proposed, in a fixed order."""
        found = []
        for suggested in pool(self.prior.study, self.best, self.candidates.done.plan.config.seed):
            mapped = self.mapped(suggested)
            if mapped is not None and fits(mapped[0], self.own):
                found.append(mapped)
        return found

    def _sections(self, runs: ShortRuns) -> dict[str, dict[str, Any]]:
        """The definition of the target's study: its space holds every setting that can be proposed."""
        every = [self.own, *(config for config, _ in self._pool)]
        usual = self._usual_config()
        if fits(usual, self.own):
            every.append(usual)
        space = {key: body for key in SETTINGS if (body := _domain(key, every)) is not None}
        study = build_study("space", sections(self.own, space, _baseline(self.own, space), runs))
        return dict(study.sections)

    def _usual_config(self) -> TrainConfig:
        return with_two_rates(self.candidates.on_target()[DEFAULT])

    def _transferred(self, study: StudyConfig) -> Placed:
        plan, profile = self.candidates.done.plan, self.candidates.done.profile
        factor, _ = rate_factors(plan, profile)
        spot = place(self.prior.study, _at(self.best, self.own.learning_rate / factor))
        return Placed(TRANSFERRED, _proposal(study, self.own), spot)

    def _usual(self, study: StudyConfig) -> list[Placed]:
        """The target's usual settings, at the place that they would have on the source."""
        config, source = self._usual_config(), self.prior.study
        if not fits(config, self.own) or config == self.own:
            return []
        plan, profile = self.candidates.done.plan, self.candidates.done.profile
        factor, text = rate_factors(plan, profile)
        changed = {
            key: getattr(config, key) for key in profile.family.community_default if key not in ELSEWHERE
        }
        changed |= {
            "learning_rate": config.learning_rate / factor,
            "unet_lr": None,
            "text_encoder_lr": config.effective_text_encoder_lr / text,
        }
        settings = {**plan.source.as_dict(), **changed}
        found = source.space.proposal(settings, self.best)
        known = {name: self.best[name] if value is None else value for name, value in found.items()}
        return [Placed(DEFAULT, _proposal(study, config), place(source, known))]

    # The next trial

    def choose(self, outcomes: Sequence[ProbeScore]) -> Probe | None:
        """The trial after these.  A new proposal is stored before it is returned."""
        number = len(outcomes)
        if number >= self.budget:
            return None
        if number >= len(self.placed):
            found = self._proposed(outcomes)
            if found is None:
                return None
            self.placed.append(found)
            self._configs[found.role] = self.side.study.config(found.values)
        self._write()
        return Probe() if number == 0 else Probe(self.placed[number].role)

    def posterior(self, outcomes: Sequence[ProbeScore]) -> TargetPosterior:
        """The model after these trials.  An infeasible one counts as the worst trial of the search."""
        by_role = {one.role: one for one in self.placed}
        x_nD = np.array([by_role[o.probe.candidate].place for o in outcomes])
        scores = [max(o.score, self.prior.floor) for o in outcomes]
        return self.model.after(Observed(x_nD, scores, [o.se for o in outcomes]))

    def _proposed(self, outcomes: Sequence[ProbeScore]) -> Placed | None:
        """The settings of the pool with the highest expected gain; those that were tried are left out."""
        every = self._pool
        if not every:
            return None
        gains_M = self.posterior(outcomes).gains(np.array([spot for _, spot in every]))
        for index in np.argsort(-gains_M, kind="stable"):
            config, spot = every[int(index)]
            values = _proposal(self.side.study, config)
            if any(_is_alike(values, known.values) for known in self.placed):
                continue
            role = f"proposal {len(self.placed) + 1} ({self._difference(config)})"
            return Placed(role, values, spot, float(gains_M[int(index)]))
        return None

    def _difference(self, config: TrainConfig) -> str:
        """What differs from the transferred settings, in a few words."""
        keys = [k for k in SETTINGS if k not in ELSEWHERE and getattr(config, k) != getattr(self.own, k)]
        keys.sort(key=lambda key: key != "learning_rate")
        words = [f"{key} {short(getattr(config, key))}" for key in keys[:SHOWN]]
        return ", ".join(words) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")

    # Stored proposals

    def _read(self) -> list[Placed]:
        found = read_json(self.folder / FILE) or {}
        return [
            Placed(one["role"], one["values"], tuple(one["place"]), one["gain"])
            for one in found.get("proposals", ())
        ]

    def _write(self) -> None:
        """Store what has been proposed so far, with the definition that the proposals belong to."""
        values = {
            "version": 1,
            "sections": self.side.study.sections,
            "proposals": [
                {"role": one.role, "values": dict(one.values), "place": list(one.place), "gain": one.gain}
                for one in self.placed
            ],
        }
        text = json.dumps(values, indent=1)
        file = self.folder / FILE
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "prior.json").is_file():
                self.prior.save(self.folder)
            write_atomic(file, text)

    # The decision

    def decide(self, outcomes: Sequence[ProbeScore]) -> Decision:
        """The tried settings with the highest posterior mean: noise alone seldom moves them, because a lucky trial is
        drawn back to what the search says of its place."""
        if not outcomes or find(outcomes, Probe()) is None:
            return Decision(
                Probe(), 0.0, 0.0, 0.0, "the transferred settings are kept because they have no score"
            )
        after = self.posterior(outcomes)
        mean_n, _ = after.predict(after.observed.x_nD)
        best = int(np.argmax(mean_n))
        if best == 0:
            return Decision(
                Probe(),
                0.0,
                0.0,
                0.0,
                f"the transferred settings are the best of {len(outcomes)} trials, by the model's mean",
            )
        gain, deviation = after.apart(best, 0)
        low, high = gain - 1.96 * deviation, gain + 1.96 * deviation
        measured = outcomes[best].score - outcomes[0].score
        noise = 1.96 * gain_se(outcomes[best], outcomes[0])
        reason = (
            f"{outcomes[best].probe.role} is the best of {len(outcomes)} trials: by the model {gain:.4f} above the "
            f"transferred settings (95 % interval {low:.4f} to {high:.4f}), measured {measured:.4f} (± {noise:.4f})"
        )
        return Decision(outcomes[best].probe, gain, low, high, reason)

    def changed(self, decision: Decision) -> dict[str, Any]:
        """The settings of the whole run that change because of the decision."""
        if decision.keeps:
            return {}
        config = self._configs[decision.probe.candidate]
        values = {
            key: getattr(config, key)
            for key in SETTINGS
            if key not in ELSEWHERE and getattr(config, key) != getattr(self.own, key)
        }
        if not config.trains_text_encoder:
            values |= {"text_encoder_lr": 0.0, "network_train_unet_only": True}
        return values

    def predicted(self, outcomes: Sequence[ProbeScore]) -> list[ProbeScore]:
        """What the search says of the same settings, at the rates of the rules."""
        by_role = {one.role: one for one in self.placed}
        x_nD = np.array([by_role[o.probe.candidate].place for o in outcomes])
        source = self.prior.surrogate
        scores = source.centre + source.scale * source.mean(x_nD)
        return [ProbeScore(o.probe, float(s), 0.0) for o, s in zip(outcomes, scores, strict=True)]

    def lines(self, outcomes: Sequence[ProbeScore], decision: Decision, direct: str) -> list[str]:
        """The lines for the user.  ``direct``: the command of a direct search on the target."""
        lost = infeasible_value(self.side.study.score.below_zero)
        lines = [
            f"target trial ({o.probe.role}): "
            + ("infeasible" if o.score == lost else f"{o.score:.4f} ± {o.se:.4f}")
            for o in outcomes
        ]
        lines.append(f"decision: {decision.reason}")
        if not outcomes:
            return lines
        if np.any(self.model.decade_D):
            lines.append(shift_words(self.posterior(outcomes).shift(), len(outcomes)))
        found = agreement([p.score for p in self.predicted(outcomes)], [o.score for o in outcomes])
        lines.append(
            found.line()
            if found
            else "inconclusive whether the source predicts the target: too few different scores"
        )
        if better := not_worth_it(outcomes, decision, found):
            lines.append(f"{better}; a direct search is probably better: {direct}")
        return lines

    @property
    def evidence(self) -> str:
        """What a change rests on, for the table of the transfer."""
        return (
            f"target trials, and a Gaussian process of {len(self.prior.trials)} trials of the search, whose rates they "
            "shift (stacked residual process, Golovin et al. 2017)"
        )


def shift_words(shift: tuple[float, float, float], trials: int) -> str:
    """The learned shift of the rates.  ``shift``: mean and 80 % interval in decades."""
    mean, low, high = (10**value for value in shift)
    interval = f"80 % interval: {low:.2g} to {high:.2g} times the rate of the rules; {trials} trials"
    if abs(math.log2(mean)) < SURE:
        return f"on this base the best learning_rate is about what the rules say ({interval})"
    if mean > 1:
        return f"on this base the best learning_rate is about {mean:.1f} times higher than the rules say ({interval})"
    return f"on this base the best learning_rate is about {1 / mean:.1f} times lower than the rules say ({interval})"


def not_worth_it(outcomes: Sequence[ProbeScore], decision: Decision, found: Agreement | None) -> str | None:
    """The reason why a direct search on the target would be better; None if there is none."""
    own, usual = find(outcomes, Probe()), find(outcomes, Probe(DEFAULT))
    if (
        decision.probe == Probe(DEFAULT)
        and own
        and usual
        and usual.score - own.score > 1.96 * gain_se(usual, own)
    ):
        return (
            f"the target's default settings are the best of the trials, {usual.score - own.score:.4f} above the "
            "transferred ones"
        )
    if found is not None and found.spearman.value < 0 and found.spearman.p < 0.2:
        return f"source and target rank the same settings in opposite order ({found.spearman.value:+.2f})"
    return None


def _at(suggested: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The proposal with this rate of the U-Net, if the search has one."""
    name = "unet_lr" if "unet_lr" in suggested else "learning_rate"
    return {**suggested, **({name: rate} if name in suggested else {})}


# The target's space


def _domain(key: str, every: Sequence[TrainConfig]) -> dict[str, Any] | None:
    """The domain of a setting that holds all these values; None if it is the same in all."""
    if key in ELSEWHERE or key == "lr_scheduler_num_cycles":
        return None
    values = [_plain(key, config) for config in every]
    if all(value == values[0] for value in values) and key != "learning_rate":
        return None
    if any(isinstance(value, bool | str) for value in values):
        return {"choices": sorted(set(values))}
    if any(value is None for value in values):  # ``fits`` leaves none but those that 0 can stand for
        raise AssertionError(f"{key} is unset in some proposals")
    low, high = min(values), max(values)
    if isinstance(low, int) and isinstance(high, int):
        return {"low": low, "high": high}
    room = 1e-6  # values are compared after rounding to 12 digits
    return {
        "low": low * (1 - room) if low > 0 else low,
        "high": high * (1 + room),
        "log": key == "learning_rate",
    }


def _plain(key: str, config: TrainConfig) -> Any:
    """A value as a space has it: schedules with their cycles, 0 for unset."""
    value = getattr(config, key)
    if key == "lr_scheduler" and value == "cosine_with_restarts":
        return f"{value}_{config.lr_scheduler_num_cycles}"
    return 0 if value is None and key in ZERO_IS_UNSET else value


def _baseline(own: TrainConfig, space: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: 0 if getattr(own, key) is None else getattr(own, key) for key in space}
    if "lr_scheduler" in values:
        values["lr_scheduler_num_cycles"] = own.lr_scheduler_num_cycles
    return values


def _proposal(study: StudyConfig, config: TrainConfig) -> dict[str, Any]:
    return study.space.check(study.space.proposal(config.as_dict()), "a target trial")


def _is_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two trials differ by no more than a rounding of their rates."""
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if one == other:
            continue
        if key not in ("learning_rate", "text_encoder_lr") or not one or not other:
            return False
        if abs(one / other - 1) > ALIKE:
            return False
    return True
