"""Maps the best settings of the source with the rules of a profile, and adapts the result to the GPU's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpo.study import Origin, origin_comment
from hpo.transfer.plan import PLANNER, SettingMove, TransferFinding, TransferPlan
from hpo.transfer.profile import Profile
from hpo.transfer.rules import MAPPING_VERSION, revised, transfer
from hpo.transfer.source import TransferSource, dataset_figures, holding_out, with_places
from trainer.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Transfer:
    """A transfer: source, profile and resulting plan."""

    source: TransferSource
    profile: Profile
    plan: TransferPlan


def make(
    source: TransferSource,
    profile: Profile,
    preset: str | None,
    told: Callable[[str], None] = lambda text: None,
) -> Transfer:
    """Map the best configuration of the source and adapt it to the GPU's memory.

    ``told`` receives progress messages.
    """
    figures, _ = dataset_figures(source, profile.family)
    best, name = source.best, source.folder.name
    comment = origin_comment(Origin(name, best.number), MAPPING_VERSION)
    config = holding_out(source, with_places(best.config, f"{name}_{profile.family.name}", comment))
    return Transfer(
        source, profile, planned(transfer(config, figures, profile, preset=preset), profile, told)
    )


def planned(
    plan: TransferPlan, profile: Profile, told: Callable[[str], None] = lambda text: None
) -> TransferPlan:
    """The plan with the changes of the memory planner, added as moves.

    ``told`` receives progress messages.
    """
    from trainer.memory import footprint, stacks

    facts = footprint.base_facts(profile.family.base)
    try:
        told(
            f"predicting the memory use of a step on {profile.vram_gb:g} GB (seconds; remembered afterwards)"
        )
        stack = stacks.choose(
            plan.config, facts, round(profile.vram_gb * GB), lambda tried: told(f"tried {tried.line}")
        )
    except ConfigError as error:
        more = () if plan.of_level("refuse") else (TransferFinding("refuse", "vram", error.message),)
        return dataclasses.replace(plan, findings=(*plan.findings, *more))
    moves = tuple(SettingMove(m.key, m.old, m.new, PLANNER, m.reason) for m in stack.moves)
    findings = tuple(
        TransferFinding("warn", f.about, f"{f.text}; but according to the planner it fits")
        if _is_card(f)
        else f
        for f in plan.findings
    )
    done = revised(dataclasses.replace(plan, findings=findings), stack.config, moves, profile)
    return dataclasses.replace(
        done, derived=dataclasses.replace(done.derived, peak_bytes=stack.footprint.peak_bytes)
    )


def _is_card(finding: TransferFinding) -> bool:
    return finding.level == "refuse" and finding.about == "vram"


def with_decision(done: Transfer, values: Mapping[str, Any], reason: str, evidence: str = "") -> TransferPlan:
    """The plan with the values that were better in the probes, added as moves."""
    plan = done.plan
    moves = tuple(
        SettingMove(key, getattr(plan.config, key), value, "target trials", reason, evidence)
        for key, value in values.items()
        if getattr(plan.config, key) != value
    )
    return revised(plan, plan.config.with_values(values), moves, done.profile)
