"""Memory of one run of ``hpo train``: the plan before it, what the dry step measured, and a warning.

The prediction is made by ``trainer.memory.footprint``, the settings are chosen by ``trainer.memory.stacks``.
On a CPU nothing is planned or measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpo.train.ladder import RunLadder
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.errors import ToolError
from trainer.events import Rehearsed
from trainer.files import write_atomic
from trainer.memory import Rung, base_facts, choose, predict
from trainer.oom import CUDA_CONTEXT_BYTES

# assumed: above 98 % of the GPU's memory, or 15.5 of 16 GB, the next allocation may fail
WARN_SHARE = 0.98
WARN_OF_16_GB = 15.5 / 16
SIXTEEN_GB = range(
    15 * 10**9, 175 * 10**8
)  # cards sold as 16 GB report 16.7 to 17.2 · 10⁹ bytes, or a little less


def free_bytes(device: str) -> int | None:
    """How many bytes of the card a run may use; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(min(total, free + CUDA_CONTEXT_BYTES))  # reading it has created this process's context


def apply_plan(ladder: RunLadder, vram_bytes: int | None, step: int, say: Callable[[str], None]) -> None:
    """Apply the planner's changes that make a run fit this card, before its first step.  Each change is
    reported. All are recorded in one line, so a kill never leaves half a plan. A run with a checkpoint keeps
    its settings, since a checkpoint cannot follow some of the changes; if the card has less free memory than
    before, the dry step and the ladder handle it.
    """
    if vram_bytes is None or step:
        return
    say(f"planning for {vram_bytes / 1e9:.1f} GB …")
    try:
        stack = choose(
            ladder.config,
            base_facts(_spec(ladder.config)),
            vram_bytes,
            lambda tried: say(f"tried {tried.line}"),
        )
    except ToolError as error:
        say(f"no plan: {error}; the dry step will tell")
        return
    if stack.moves:
        says = "\n".join(f"{move.key} {move.old} → {move.new}: {move.reason}" for move in stack.moves)
        ladder.take(Rung("plan", stack.config, says), f"planned for {vram_bytes / 1e9:.1f} GB", step)


def remember(
    path: Path, config: TrainConfig, event: Rehearsed, base: Base, say: Callable[[str], None]
) -> None:
    """Write memory.json: the memory this process used in the dry step, the prediction, and the size of the card."""
    predicted = _predicted(config, event) if event.peak_bytes is not None else None
    record: dict[str, Any] = {
        "device": str(base.device),
        "bucket_px": list(event.bucket_px),
        "images_at_once": event.images,
        "measured_bytes": event.peak_bytes,
        "predicted_bytes": predicted,
        "card_peak_bytes": event.card_peak_bytes,
        "device_bytes": event.card_bytes,
        "seconds": round(event.seconds, 3),
    }
    write_atomic(path, json.dumps(record, indent=1))
    width, height = event.bucket_px
    text = f"dry step: {event.images} × {width}×{height} px, {event.seconds:.1f} s"
    total, in_use = event.card_bytes, event.card_peak_bytes
    if event.peak_bytes is None or total is None or in_use is None:
        say(text + "; memory is measured on a GPU only")
        return
    say(f"{text}, peak {event.peak_bytes / 1e9:.2f} GB{compared(event.peak_bytes, predicted)}")
    if in_use > limit_bytes(total):
        say(
            f"warning: {in_use / 1e9:.1f} of the card's {total / 1e9:.1f} GB are used, with other programs; if it "
            "runs out, the run goes on with less (docs/train.md)"
        )


def limit_bytes(total: int) -> int:
    """Above this the card is practically full."""
    return int(total * (WARN_OF_16_GB if total in SIXTEEN_GB else WARN_SHARE))


def compared(measured: int, predicted: int | None) -> str:
    """The prediction compared with the measurement, as text."""
    if predicted is None:
        return ""
    return f", predicted {predicted / 1e9:.2f} GB ({measured / predicted - 1:+.0%})"


def _predicted(config: TrainConfig, event: Rehearsed) -> int | None:
    try:
        return predict(config, base_facts(_spec(config)), bucket_px=event.bucket_px).peak_bytes
    except ToolError:
        return None


def _spec(config: TrainConfig) -> Any:
    """The base as ``base_facts`` takes it: a name or a path."""
    spec = config.pretrained_model_name_or_path
    path = Path(spec).expanduser()
    return path if path.exists() else spec
