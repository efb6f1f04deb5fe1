"""The candidates: complete settings that are probed in addition to the transferred ones, on target and source.

Owns their settings on both bases, and which of them a whole run takes over.  Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.transfer import PLANNER, SourceCandidate, Transfer, TransferPlan, snap_down, transfer, two_digits
from hpo.transfer.probes.design import DEFAULT, TEXT_ON, TRANSFERRED, Decision
from trainer.config import WITHOUT_INFLUENCE, TrainConfig

# Settings that identify a run and have no influence on the result.
NAMES = (*sorted(WITHOUT_INFLUENCE), "output_name", "pretrained_model_name_or_path", "train_data_dir")
_UNSPLIT = {
    "text_encoder_lr1": None,
    "text_encoder_lr2": None,
    "unet_lr": None,
    "network_train_unet_only": False,
}


@dataclass(frozen=True)
class Candidates:
    """The candidates of a transfer.  ``preset``: the value of ``--preset``, if any."""

    done: Transfer
    preset: str | None = None

    @property
    def others(self) -> Mapping[str, SourceCandidate]:
        """Other good configurations of the source."""
        return {f"diverse {number}": found for number, found in enumerate(self.done.source.others[:2], 1)}

    def on_target(self) -> dict[str, TrainConfig]:
        own = self.done.plan.config
        whole = {
            TRANSFERRED: own,
            DEFAULT: own.with_values({**_UNSPLIT, **self.done.profile.family.community_default}),
        }
        whole |= {name: self.mapped(candidate) for name, candidate in self.others.items()}
        if not own.trains_text_encoder:
            whole[TEXT_ON] = self.text_encoders_on()
        return whole

    def on_source(self) -> dict[str, TrainConfig]:
        source = self.done.source
        whole = {TRANSFERRED: source.best.config} | {name: c.config for name, c in self.others.items()}
        if source.baseline is not None:
            whole[DEFAULT] = source.baseline.config
        return whole

    def mapped(self, candidate: SourceCandidate) -> TrainConfig:
        """A candidate converted with the same rules, with the planner's changes to the transferred settings."""
        return self.computed(self.ruled(candidate.config).config)

    def ruled(self, config: TrainConfig) -> TransferPlan:
        """Settings of the source converted with the same rules."""
        return transfer(config, self.done.plan.figures, self.done.profile, preset=self.preset)

    def computed(self, config: TrainConfig) -> TrainConfig:
        """Settings with the planner's changes to the transferred settings."""
        plan = self.done.plan
        return config.with_values(
            {m.key: getattr(plan.config, m.key) for m in plan.moves if m.rule == PLANNER}
        )

    def text_encoders_on(self) -> TrainConfig:
        """The transferred settings with the text encoders trained at the profile's share of the U-Net rate."""
        own, share = self.done.plan.config, self.done.profile.rate.text_encoder_ratio
        rate = snap_down(share * own.effective_unet_lr)
        return own.with_values({"network_train_unet_only": False, "text_encoder_lr": rate})

    def changed(self, decision: Decision) -> dict[str, Any]:
        """The settings of the whole run that change because of the decision."""
        if decision.keeps:
            return {}
        own, probe = self.done.plan.config, decision.probe
        whole = own
        if probe.candidate == DEFAULT:
            whole = own.with_values(dict(self.done.profile.family.community_default))
        elif probe.candidate in self.others:
            whole = self.mapped(self.others[probe.candidate])
        elif probe.candidate == TEXT_ON:
            whole = self.text_encoders_on()
        factor = 2**probe.octaves
        values = {k: v for k, v in whole.as_dict().items() if k not in NAMES and v != getattr(own, k)}
        if probe.octaves:
            values["learning_rate"] = two_digits(whole.effective_unet_lr * factor)
            if whole.trains_text_encoder:
                values["text_encoder_lr"] = two_digits(whole.effective_text_encoder_lr * factor)
        if not probe.text_encoder or not whole.trains_text_encoder:
            values |= {"text_encoder_lr": 0.0, "network_train_unet_only": True}
        return values
