"""Peak memory measured by users of sd-scripts, and our prediction for each cell of their table.

Owns the figures of the table and the settings that each row assumes. Source:
https://2ch-ai.gitgud.site/wiki/tech/sdxl (in Russian, 2024-02-09): sd-scripts 0.8.3, SDXL at 1024², memory of
the Python process only, in GB (10⁹ bytes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import TrainConfig

GB = 10**9
COMMON: dict[str, Any] = {
    "pretrained_model_name_or_path": "sdxl",
    "resolution": 1024,
    "network_train_unet_only": True,
    "optimizer_type": "AdamW8bit",
    "mixed_precision": "bf16",
}
ASSUMED = "U-Net only, bf16, 8-bit Adam, cached latents and text states, fp32 adapter unless full bf16"
ASSUMED_FULL = "U-Net only, fp32 weights under bf16 autocast, 8-bit Adam, cached latents and text states"


@dataclass(frozen=True)
class TableRow:
    """One training setup; ``measured_gb`` by batch size.  ``is_full``: all weights are
    trained, without an adapter."""

    name: str
    values: Mapping[str, Any]
    measured_gb: Mapping[int, float]
    is_full: bool = False

    def config(self, batch: int) -> TrainConfig:
        return TrainConfig(**COMMON, **self.values, train_batch_size=batch)

    @property
    def assumed(self) -> str:
        return ASSUMED_FULL if self.is_full else ASSUMED


@dataclass(frozen=True)
class Cell:
    """A prediction and the users' measurement."""

    row: TableRow
    batch: int
    measured_gb: float
    predicted_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_below(self) -> bool:
        return self.predicted_bytes <= self.measured_gb * GB


_LORA32 = {"network_dim": 32}
_LORA128 = {"network_dim": 128}
_LOCON = {"network_type": "LoCon", "network_dim": 64, "conv_dim": 32}
_BF16, _CHECKPOINTING, _FP8 = {"full_bf16": True}, {"gradient_checkpointing": True}, {"fp8_base": True}

ROWS = (
    TableRow("full fine-tune", {}, {1: 38.5, 2: 44.0}, is_full=True),
    TableRow("full fine-tune, checkpointing", _CHECKPOINTING, {1: 34.4, 2: 35.2, 8: 40.5}, is_full=True),
    TableRow("LoRA dim 32", _LORA32, {1: 17.4, 4: 47.7}),
    TableRow("LoRA dim 32, full bf16", _LORA32 | _BF16, {1: 16.7}),
    TableRow("LoRA dim 32, checkpointing", _LORA32 | _CHECKPOINTING, {1: 9.4, 2: 13.1}),
    TableRow("LoRA dim 32, full bf16, checkpointing", _LORA32 | _BF16 | _CHECKPOINTING, {1: 9.1}),
    TableRow("LoRA dim 32, fp8 base, checkpointing", _LORA32 | _FP8 | _CHECKPOINTING, {1: 6.4}),
    TableRow("LoRA dim 128", _LORA128, {1: 20.5, 3: 41.7}),
    TableRow("LoRA dim 128, full bf16", _LORA128 | _BF16, {1: 18.3, 4: 47.8}),
    TableRow("LoRA dim 128, checkpointing", _LORA128 | _CHECKPOINTING, {1: 12.0}),
    TableRow("LoRA dim 128, full bf16, checkpointing", _LORA128 | _BF16 | _CHECKPOINTING, {1: 10.3, 4: 15.0}),
    TableRow("LoRA dim 128, fp8 base, checkpointing", _LORA128 | _FP8 | _CHECKPOINTING, {1: 9.9}),
    TableRow("LoCon dim 64 + conv 32", _LOCON, {1: 18.6, 2: 30.4}),
    TableRow("LoCon 64+32, checkpointing", _LOCON | _CHECKPOINTING, {1: 10.6}),
    TableRow("LoCon 64+32, full bf16, checkpointing", _LOCON | _BF16 | _CHECKPOINTING, {1: 9.7}),
    TableRow("LoCon 64+32, fp8 base, checkpointing", _LOCON | _FP8 | _CHECKPOINTING, {1: 7.2}),
)
ADAPTER_ROWS = tuple(row for row in ROWS if not row.is_full)
FULL_ROWS = tuple(row for row in ROWS if row.is_full)


def predicted_cells(rows: tuple[TableRow, ...] = ROWS) -> Iterator[Cell]:
    """Predict every cell in turn.  Takes about ten seconds per cell on one core."""
    from trainer.memory import base_facts, predict, predict_full

    facts = base_facts("sdxl")
    for row in rows:
        for batch, measured_gb in row.measured_gb.items():
            found = (predict_full if row.is_full else predict)(row.config(batch), facts)
            yield Cell(row, batch, measured_gb, found.peak_bytes, found.parts)
