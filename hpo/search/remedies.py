"""Remedies: what a trial gives up in speed to fit into the GPU's memory, without changing its result.

Owns the remedies of a trial (its rows in starts.jsonl, in the words of earlier versions too), those it begins with,
and the study's memory.jsonl: which settings ran out of memory here before. The rungs themselves are those of
``hpo train`` that keep the result (``trainer.memory.ladder``). Does not own the plan that is printed before the first
trial (``hpo.search.fitting``) or the retry (``hpo.search.trial``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.study import TrialFolder
from trainer.errors import ToolError
from trainer.files import append_line, read_records
from trainer.memory import SAFE_SHARE, BaseFacts, base_facts, memory_settings, next_rung, predict, rung_named
from trainer.oom import CUDA_CONTEXT_BYTES, device_bytes

if TYPE_CHECKING:
    from hpo.search.workbench import Workbench
    from trainer.bases import Base
    from trainer.config import TrainConfig

# The names in studies of earlier versions: checkpointing of all blocks, and one image at a time.
FORMER: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": {"gradient_checkpointing": True, "checkpoint_blocks": None},
    "single images": {"micro_batch_size": 1},
}
CHECKPOINTING = ("gradient_checkpointing", "checkpoint_blocks")
ALL_BLOCKS = 99  # more than any U-Net has
# Settings of ``memory_settings`` of which more needs more memory; the others only compare as equal or different.
MORE_NEEDS_MORE = (
    "train_batch_size",
    "network_dim",
    "conv_dim",
    "unet_lr",
    "text_encoder_lr1",
    "text_encoder_lr2",
)


def remedies_of(folder: TrialFolder) -> tuple[str, ...] | None:
    """The remedies that a trial has needed so far; None if it has no row about them yet."""
    rows = [row for row in read_records(folder.starts) if row.get("event") == "remedy"]
    return tuple(map(str, rows[-1].get("remedies", ()))) if rows else None


def with_remedies(config: TrainConfig, remedies: Sequence[str]) -> TrainConfig:
    """The settings with these remedies. One that changes nothing, or has no meaning, is left out."""
    for name in remedies:
        if name in FORMER:
            config = config.with_values(FORMER[name])
        elif (rung := rung_named(config, name)) is not None:
            config = rung.config
    return config


def remedy_words(config: TrainConfig, remedies: Sequence[str]) -> str:
    """What the remedies come to, for result.json and the user. Empty without any."""
    then, found = with_remedies(config, remedies), []
    if then.images_at_once != config.images_at_once:
        one = then.images_at_once == 1
        found.append("single images" if one else f"{then.images_at_once} images at once")
    if any(getattr(then, name) != getattr(config, name) for name in CHECKPOINTING):
        blocks = then.checkpoint_blocks
        found.append("gradient_checkpointing" + (f" of {blocks} blocks" if blocks else ""))
    return ", ".join(found)


@dataclass(frozen=True)
class Card:
    """What a process of this study may use of its GPU. ``resident_bytes`` stay there whatever is trained: tensors of
    this process, when it was measured, that are not of a network. Networks leave for a step that needs their room."""

    usable_bytes: int
    resident_bytes: int
    facts: BaseFacts

    @property
    def limit_bytes(self) -> int:
        """What is planned for: the share that ``hpo plan`` leaves free stays free."""
        return int(self.usable_bytes * SAFE_SHARE)

    def needed_bytes(self, config: TrainConfig) -> int:
        """The predicted peak of a step, with what stays on the GPU beside it."""
        return predict(config, self.facts).peak_bytes + self.resident_bytes


def usable_bytes(base: Base) -> tuple[int, int] | None:
    """(bytes of the GPU that this process may use, bytes of its tensors there that no network of ``trainer.card``
    has); None on a CPU."""
    device = base.device
    if device.type != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES
    others = torch.cuda.memory_allocated(device) - base.card.resident_bytes()
    return int(min(total, usable)), max(0, int(others))


class Remedies:
    """The remedies that the trials of a study begin with: from the plan for this GPU, and from what ran out here."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @cached_property
    def card(self) -> Card | None:
        """Measured once per process, on a GPU; None where nothing can be planned: a CPU, an unknown base."""
        found = usable_bytes(self._bench.base)
        if found is None:
            return None
        spec = self._bench.base_spec
        path = Path(spec).expanduser()
        try:
            return Card(*found, base_facts(path if path.exists() else spec))
        except ToolError:
            return None

    def first(self, config: TrainConfig) -> tuple[tuple[str, ...], str]:
        """The remedies that a trial begins with, and why, in words.  The last possible one is always tried: what
        else used the GPU then may be gone."""
        remedies: tuple[str, ...] = ()
        before, why = self._ran_out(), ""
        while reason := self._too_much(with_remedies(config, remedies), before):
            rung = next_rung(with_remedies(config, remedies), remedies, keeps_result=True)
            if rung is None:
                break
            remedies, why = (*remedies, rung.name), why or reason
        return remedies, why

    def ran_out(self, number: int, config: TrainConfig) -> None:
        """Remember for the study that a step of these settings ran out of memory in a trial."""
        try:
            settings = memory_settings(config)
        except ToolError:
            return
        row = {
            "trial": number,
            "settings": settings,
            "device_bytes": device_bytes(self._bench.base.device),
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_line(self._bench.folder.memory, json.dumps(row))

    def _ran_out(self) -> list[dict[str, Any]]:
        """The settings that ran out of memory on a GPU of this size or a larger one."""
        own = device_bytes(self._bench.base.device)
        rows = read_records(self._bench.folder.memory)
        known = [row for row in rows if isinstance(row.get("settings"), dict)]
        return [row["settings"] for row in known if _is_at_most(own, row.get("device_bytes"))]

    def _too_much(self, config: TrainConfig, before: Sequence[Mapping[str, Any]]) -> str:
        """Why these settings should not be tried as they are; empty if nothing is known against them."""
        try:
            if before and any(needs_as_much(memory_settings(config), settings) for settings in before):
                return "settings that need no more ran out of memory before"
            needed = self.card.needed_bytes(config) if self.card else 0
        except ToolError:  # settings that cannot be traced
            return ""
        if self.card is None or needed <= self.card.limit_bytes:
            return ""
        return f"{needed / 1e9:.1f} GB are predicted, {self.card.usable_bytes / 1e9:.1f} GB can be used"


def needs_as_much(settings: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether ``memory_settings`` surely need at least the memory of others."""
    mine, theirs = dict(settings), dict(other)
    if recomputed(mine) > recomputed(theirs):
        return False
    for name in MORE_NEEDS_MORE:
        more, less = mine.pop(name, None), theirs.pop(name, None)
        if not (isinstance(more, int | float) and isinstance(less, int | float) and more >= less):
            return False
    if theirs.pop("accumulates", False) and not mine["accumulates"]:
        return False
    for name in (*CHECKPOINTING, "accumulates"):
        mine.pop(name, None)
        theirs.pop(name, None)
    return json.loads(json.dumps(mine)) == theirs


def recomputed(settings: Mapping[str, Any]) -> int:
    """How many blocks recompute their activations."""
    if not settings.get("gradient_checkpointing"):
        return 0
    return settings.get("checkpoint_blocks") or ALL_BLOCKS


def _is_at_most(own: int | None, then: Any) -> bool:
    return own == then if own is None or not isinstance(then, int) else own <= then
