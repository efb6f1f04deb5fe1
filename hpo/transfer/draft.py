"""A transfer while its rules run: the settings so far, and the changes and remarks that rules make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpo.transfer.plan import (
    DatasetFigures,
    TransferFinding,
)
from hpo.transfer.profile import PRESETS, Profile
from trainer.config import OPTIMIZER_NAMES, SETTINGS, TrainConfig

RATE_KEYS = ("learning_rate", "text_encoder_lr")


@dataclass
class Draft:
    """The settings while the rules are applied.  ``factor`` is k after the rate rule."""

    source: TrainConfig
    figures: DatasetFigures
    profile: Profile
    preset: str | None
    values: dict[str, Any]
    factor: float = 1.0
    text_factor: float = 1.0
    findings: list[TransferFinding] = field(default_factory=list)

    @property
    def cap(self) -> int:
        return (
            PRESETS[self.preset].effective_batch_cap
            if self.preset
            else self.profile.batch.effective_batch_cap
        )

    @property
    def batches(self) -> tuple[int, int]:
        """E of the source and E of the current values."""
        now = self.values["train_batch_size"] * self.values["gradient_accumulation_steps"]
        return self.source.train_batch_size * self.source.gradient_accumulation_steps, now

    @property
    def updates(self) -> tuple[int, int]:
        """Updates of the whole run: of the source and of the current values."""
        now = TrainConfig().with_values(self.values)
        return self.figures.length(self.source).total_steps, self.figures.length(now).total_steps

    @property
    def finds_its_rate(self) -> bool:
        return finds_its_rate(self.source)

    @property
    def rate(self) -> float:
        """The current rate of the U-Net."""
        own = self.values["unet_lr"]
        return self.values["learning_rate"] if own is None else own

    def say(self, level: str, about: str, text: str) -> None:
        self.findings.append(TransferFinding(level, about, text))


@dataclass(frozen=True)
class Change:
    """A value set by a rule.  ``transfer`` makes a ``SettingMove`` of it if it differs from the current value."""

    key: str
    new: Any
    rule: str
    reason: str
    evidence: str = ""


def limited(key: str, value: float) -> Any:
    """``value`` clipped to the limits of the setting."""
    facts = SETTINGS[key]
    if facts.high is not None:
        value = min(value, facts.high)
    if facts.low is not None:
        value = max(value, facts.low)
    return int(value) if isinstance(value, float) and key.startswith("max_train") else value


# These adapt their rate themselves, so learning_rate is kept (usually 1).
RATE_FREE = ("Prodigy", *(name for name in OPTIMIZER_NAMES if name.startswith("DAdapt")))


def finds_its_rate(config: TrainConfig) -> bool:
    return config.optimizer_type in RATE_FREE or config.has_relative_steps
