"""Estimated cost of a trial before the first one runs: steps, images, seconds, bytes.

Owns the average over the search space, the timing of a few real steps, and the disk space check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpo.search.workbench import Workbench
from hpo.study import Choice
from trainer.adapters import adapter, count_weights
from trainer.config import TrainConfig
from trainer.data import total_steps
from trainer.errors import MachineError, OutOfMemory
from trainer.events import Step
from trainer.files import require_space
from trainer.loop import loop

PROBE_STEPS = 3  # the first step allocates; the last of three is timed
RESERVE_BYTES = 200_000_000  # database, logs, checkpoints of the running trial (estimate)
BYTES_PER_PIXEL = 2.0  # sample PNG plus its share of the grid (estimate; photos need less)
DRAWS = 64  # suggestions to average over


@dataclass(frozen=True)
class Cost:
    """Average cost of one trial over the space, and the size of the study's files."""

    steps: float
    images: int
    trial_seconds: float | None
    lora_bytes: int
    image_bytes: int

    def bytes_for(self, trials: int, keep_best: int | None) -> int:
        kept = trials if keep_best is None else min(trials, keep_best + 1)
        return kept * self.lora_bytes + trials * self.image_bytes + RESERVE_BYTES


def estimate(bench: Workbench, *, probe: bool) -> Cost:
    """Average cost of a trial.  ``probe`` times three real steps of the baseline."""
    baseline = bench.config(bench.study.baseline, 0)
    drawn = [bench.study.config(draw) for draw in _draws(bench)]
    steps = [total_steps(config, bench.data) for config in drawn]
    images, seconds = bench.prompts.image_count, None
    step_seconds = _probe(bench, baseline) if probe else None
    if step_seconds is not None:
        micro_batches = [n * c.gradient_accumulation_steps for n, c in zip(steps, drawn, strict=True)]
        each = step_seconds / baseline.gradient_accumulation_steps
        seconds = each * float(np.mean(micro_batches)) + images * (bench.image_seconds or 0.0)
    space = bench.study.space
    edges = [{**bench.study.baseline, p.name: value} for p in space for value in p.domain.edges]
    largest = [bench.study.config(edge) for edge in edges] + drawn
    weights = max(count_weights(bench.base, config) for config in largest)
    sampling = bench.evaluator.sampling
    pixels = images * sampling.width_px * sampling.height_px
    return Cost(
        steps=float(np.mean(steps)),
        images=images,
        trial_seconds=seconds,
        lora_bytes=round(weights * (4 if baseline.save_precision == "float" else 2)),
        image_bytes=round(pixels * BYTES_PER_PIXEL),
    )


def check_disk(bench: Workbench, cost: Cost, trials: int, keep_best: int | None) -> None:
    """Raise MachineError if there is not enough disk space."""
    try:
        require_space(bench.folder.root, cost.bytes_for(trials, keep_best))
    except MachineError as error:
        raise MachineError(
            error.message, "free some space, or keep fewer LoRA files: --keep-best 5"
        ) from None


def _probe(bench: Workbench, config: TrainConfig) -> float | None:
    """Measured seconds of one optimizer step.  None if it does not fit into memory (the trial itself can retry)."""
    short = config.with_values({"max_train_steps": PROBE_STEPS})
    prepared = bench.prepared(short)
    injected = adapter.inject(bench.base, short)
    try:
        steps = [e.seconds for e in loop.train(short, bench.base, injected, prepared) if isinstance(e, Step)]
    except OutOfMemory:
        steps = []
    finally:
        injected.remove()
    bench.empty_cache()
    return steps[-1] if steps else None


def _draws(bench: Workbench) -> list[dict[str, Any]]:
    """Random suggestions from the whole space, without the sampler."""
    random = np.random.default_rng(0)
    return [
        {
            p.name: p.domain.options[int(random.integers(len(p.domain.options)))]
            if isinstance(p.domain, Choice)
            else p.domain.from_unit(float(random.random()))
            for p in bench.study.space
        }
        for _ in range(DRAWS)
    ]
