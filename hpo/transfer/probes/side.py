"""The definition of a probe study: its search space, and the mapping between probes and trials.

Owns the settings of short runs, their search space and the conversion of a probe to a proposal.  Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpo.study import ELSEWHERE, NOT_SEARCHABLE, StudyConfig, build_study, settings_of
from hpo.transfer import ADAM, MOST_WARMUP, ProfileLimits, finds_its_rate, normalised, updates_of
from hpo.transfer.probes.design import TRANSFERRED, Probe, Scope
from trainer.config import SETTINGS, ZERO_IS_UNSET, TrainConfig
from trainer.errors import ConfigError

FRACTION = 0.25  # of the updates of a whole run, so four probes cost as much as one run
MOST_OCTAVES = 4.0
RATES = ("learning_rate", "text_encoder_lr")
_SAMPLING = ("steps", "cfg", "sampler", "negative")


@dataclass(frozen=True)
class ShortRuns:
    """How all probes on one base are trained and sampled.

    ``samples``: images per epoch.  ``sampling``, ``words``: as in the sections of a study.  ``fraction``:
    share of the updates of a whole run.  ``judged``: what a study says about scoring and limits, by section.
    """

    samples: int
    sampling: Mapping[str, Any]
    seed: int
    words: str
    fraction: float = FRACTION
    preset: str = "character"
    judged: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeSide:
    """The probes on one base: short-run settings by candidate, the study definition and the limits."""

    short: Mapping[str, TrainConfig]
    study: StudyConfig
    scope: Scope

    def proposal(self, probe: Probe) -> dict[str, Any]:
        """The parameters of the probe in the study's search space."""
        values = probed(self.short[probe.candidate], probe).as_dict()
        found = self.study.space.proposal(values)
        return self.study.space.check(found, probe.role)

    def is_probe(self, params: Mapping[str, Any], probe: Probe) -> bool:
        """Whether a trial with these parameters is this probe."""
        return _same(self.proposal(probe), params)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        math.isclose(a[k], b[k], rel_tol=1e-9) if isinstance(a[k], float) else a[k] == b[k] for k in a
    )


def short_run(config: TrainConfig, samples: int, fraction: float = FRACTION) -> TrainConfig:
    """The settings of a short run: a share of the updates at the full rate.

    The schedule is left out, because squeezing it into a short run would change the rates.  Warm-up keeps its share.
    """
    updates = updates_of(config, samples)
    warmup = config.lr_warmup_steps if config.lr_warmup_steps < 1 else config.lr_warmup_steps / updates
    return with_two_rates(config).with_values(
        {
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": round(min(warmup, MOST_WARMUP), 4),
            "lr_scheduler_num_cycles": 1,
            "max_train_steps": max(1, round(fraction * updates)),
            "max_train_epochs": TrainConfig().max_train_epochs,
        }
    )


def with_two_rates(config: TrainConfig) -> TrainConfig:
    """The same training with learning_rate as the U-Net's rate and one rate of the text encoders; 0 for off."""
    first, _ = config.effective_text_encoder_lrs
    return config.with_values(
        {
            "learning_rate": config.effective_unet_lr,
            "unet_lr": None,
            "text_encoder_lr": first,
            "text_encoder_lr1": None,
            "text_encoder_lr2": None,
            "network_train_unet_only": False,
        }
    )


def probed(config: TrainConfig, probe: Probe) -> TrainConfig:
    """The settings of a candidate with the rates of the probe."""
    factor = 2**probe.octaves
    text = config.effective_text_encoder_lr * factor if probe.text_encoder else 0.0
    return config.with_values({"learning_rate": config.effective_unet_lr * factor, "text_encoder_lr": text})


def octave_bounds(config: TrainConfig, limits: ProfileLimits) -> tuple[float, float]:
    """The range of rates in octaves that the profile's limits (for Adam) allow.  Always contains 0."""
    if config.optimizer_type not in ADAM:
        return -MOST_OCTAVES, MOST_OCTAVES
    rate, high = config.effective_unet_lr, limits.learning_rate_high
    if limits.normalised_refuse is not None:
        high = min(high, limits.normalised_refuse / normalised(1.0, config.network_alpha))
    room = 2**MOST_OCTAVES
    low, high = max(limits.learning_rate_low / rate, 1 / room), min(high / rate, room)
    return min(math.log2(low), 0.0), max(math.log2(high), 0.0)


def make_side(
    name: str, whole: Mapping[str, TrainConfig], runs: ShortRuns, budget: int, bounds: tuple[float, float]
) -> ProbeSide:
    """Make the side for one base.  Candidates that do not fit into a common search space are left out."""
    own = whole[TRANSFERRED]
    for config in whole.values():
        check_rates(config)
    check_unet(own)
    short = {key: short_run(config, runs.samples, runs.fraction) for key, config in whole.items()}
    short = {
        key: config for key, config in short.items() if key == TRANSFERRED or config != short[TRANSFERRED]
    }
    short = {key: config for key, config in short.items() if fits(config, short[TRANSFERRED])}
    scope = Scope(
        budget,
        tuple(key for key in short if key != TRANSFERRED),
        bounds[0],
        bounds[1],
        own.trains_text_encoder,
    )
    study = build_study(name, _sections(short, runs))
    return ProbeSide(short, study, scope)


def check_rates(config: TrainConfig) -> None:
    """Raises ConfigError for an optimizer that finds its rate itself."""
    if finds_its_rate(config):
        raise ConfigError(
            f"{config.optimizer_type} adapts its learning rate itself, so trying other rates has no effect",
            "run without --trials; compare LoRA files with hpo evaluate",
        )


def check_unet(config: TrainConfig) -> None:
    """Raises ConfigError if there is no rate to try."""
    if not config.trains_unet:
        raise ConfigError("the U-Net is not trained, so there is no rate to try", "run without --trials")


def fits(config: TrainConfig, own: TrainConfig) -> bool:
    """Whether the differing settings can be choices of a search space (an unset value is not possible in TOML)."""
    for key in SETTINGS.keys() - ELSEWHERE.keys():
        a, b = getattr(config, key), getattr(own, key)
        if a != b and None in (a, b) and key not in ZERO_IS_UNSET:
            return False
        if a != b and key in NOT_SEARCHABLE:
            return False
    return True


def _sections(short: Mapping[str, TrainConfig], runs: ShortRuns) -> dict[str, dict[str, Any]]:
    own = short[TRANSFERRED]
    space: dict[str, Any] = {}
    room = 2 ** (MOST_OCTAVES + 0.01)
    rates = [config.learning_rate for config in short.values()]
    space["learning_rate"] = {"low": min(rates) / room, "high": min(10.0, max(rates) * room), "log": True}
    texts = [config.effective_text_encoder_lr for config in short.values()]
    if max(texts) > 0:
        space["text_encoder_lr"] = {"low": 0.0, "high": min(10.0, max(texts) * room)}
    for key in SETTINGS:
        values = [getattr(config, key) for config in short.values()]
        if key in RATES or key in ELSEWHERE or all(value == values[0] for value in values):
            continue
        options: list[Any] = []
        for value in values:
            value = 0 if value is None else value
            if value not in options:
                options.append(value)
        space[key] = {"choices": options}
    baseline = {key: getattr(own, key) for key in space}
    return sections(own, space, {key: 0 if value is None else value for key, value in baseline.items()}, runs)


def sections(
    own: TrainConfig, space: Mapping[str, Any], baseline: Mapping[str, Any], runs: ShortRuns
) -> dict[str, dict[str, Any]]:
    """The sections of a study of target trials, whose fixed settings are those of ``own``."""
    decided = {setting for name in space for setting in settings_of(name)}
    train = {
        key: value
        for key, value in own.as_dict().items()
        if key not in ELSEWHERE and key not in decided and value is not None
    }
    if train.get("max_train_steps") or "max_train_steps" in space:
        train.pop("max_train_epochs", None)
    title = "Target trials of transferred settings"
    return {
        **{name: dict(values) for name, values in runs.judged.items()},
        "study": {**runs.judged.get("study", {}), "title": title, "preset": runs.preset, "seed": runs.seed},
        "train": train,
        "space": dict(space),
        "baseline": dict(baseline),
        "prompts": {"words": runs.words},
        "confirmation": {"words": runs.words},
        "sampling": {key: runs.sampling[key] for key in _SAMPLING if key in runs.sampling},
    }
