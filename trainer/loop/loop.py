"""train(): the only training loop, for every family – a generator of Step / Skipped / Saved / Finished.

Owns the order: which samples make a step, and when to skip, save, validate and stop. ``stepper`` owns what
happens within a step. Its random numbers are keyed by what they are for, so a run does not depend on how
samples are batched or spread over GPUs, and a resumed run is the same run.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trainer.adapters import Adapter
from trainer.bases import Base
from trainer.compute import faster, recomputing
from trainer.config import TrainConfig
from trainer.data import Moment, Plan, Prepared, dataset, plan, preflight
from trainer.errors import Diverged, Interrupted, OutOfMemory
from trainer.events import Event, Finished, Saved, Skipped, Step, Validated
from trainer.loop import checkpoint, optim
from trainer.loop.ranks import ALONE, Ranks
from trainer.loop.stepper import MicroBatch, Sample, StepOutcome, Stepper
from trainer.oom import out_of_memory_named

MAX_SKIPPED_IN_A_ROW = 10  # assumed: an fp16 loss scale of 65536 has fallen to 64 by then


def train(
    config: TrainConfig,
    base: Base,
    adapter: Adapter,
    prepared: Prepared,
    *,
    checkpoints: Path | None = None,
    checkpoint_every_seconds: float = 120.0,
    should_stop: Callable[[], bool] = lambda: False,
    validate_on: Prepared | None = None,
    rehearse: bool = False,
    changed: frozenset[str] = frozenset(),
    ranks: Ranks = ALONE,
) -> Generator[Event, None, None]:
    """Train the adapter in place.  Resumes from a checkpoint in ``checkpoints`` if there is one. With
    ``validate_on`` the validation loss (``trainer.loop.validation``) is reported after every epoch; with
    ``rehearse`` one dry step at the largest bucket comes first, which changes nothing.  ``changed`` settings
    may differ from the checkpoint's: those that the out-of-memory ladder changed.  Raises Diverged after ten
    skipped steps in a row, which are not saved; OutOfMemory, with all steps so far saved; and Interrupted
    once ``should_stop`` says so (the step is finished and saved first).
    """
    preflight.check(base, config)
    length = plan(config, prepared.dataset, prepared.buckets)
    with out_of_memory_named(config):
        stepper = Stepper(config, base, adapter, prepared, ranks, Moment(0, length.total_steps))
    run = checkpoint.Run(
        config,
        base.identity,
        prepared.dataset.content_hash,
        adapter,
        stepper.optimizer,
        stepper.scaler,
        stepper.compute,
        length.steps_per_epoch,
        changed,
    )
    with recomputing(base, config), faster(base, config), stepper:
        if rehearse:
            with out_of_memory_named(config):
                yield stepper.rehearse(_largest(config, prepared))
        progress = checkpoint.restore(checkpoints, run) if checkpoints else checkpoint.Progress()
        unproven: Path | None = None  # the newest checkpoint, until a step from its weights was finite
        stepper.park()
        last_save = time.monotonic()
        for epoch, group in _remaining(config, prepared, length, progress.step):
            started = time.perf_counter()
            rates = optim.set_rate(stepper.optimizer, optim.rate(config, length.total_steps, progress.step))
            try:
                with out_of_memory_named(config):
                    outcome = stepper.step(group, epoch, progress.step)
            except OutOfMemory:
                if checkpoints and ranks.is_first and progress.step and stepper.is_untouched:
                    checkpoint.save(checkpoints, run, progress)
                raise
            progress = _advance(progress, outcome)
            if unproven and not outcome.skipped:
                checkpoint.drop_others(unproven)
                unproven = None
            yield _event(length, progress.step, epoch, rates, outcome, time.perf_counter() - started)
            if validate_on is not None and ranks.is_first and _ends_epoch(length, progress.step):
                yield Validated(progress.step, epoch + 1, stepper.validate(validate_on))
            if progress.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                what = f"{progress.in_a_row} steps in a row had no finite {outcome.skipped}"
                raise Diverged(f"{what}, up to {progress.step}", _after_divergence(checkpoints, progress))
            stop = ranks.any(should_stop(), base.device)
            is_late = time.monotonic() - last_save >= checkpoint_every_seconds
            if checkpoints and ranks.is_first and (stop or (is_late and not progress.in_a_row)):
                unproven = checkpoint.save(checkpoints, run, progress)
                yield Saved(unproven, progress.step)
                last_save = time.monotonic()
            if stop:
                saved = "the checkpoint is saved" if checkpoints else "nothing is saved"
                raise Interrupted(
                    f"stopped after step {progress.step} of {length.total_steps}: {saved}",
                    "the same command goes on",
                )
    yield Finished(progress.step, progress.skipped)


def _after_divergence(checkpoints: Path | None, progress: checkpoint.Progress) -> str:
    """What to do after ten skipped steps. The current weights are useless: the last update broke them. The
    weights before that update are good."""
    applied = progress.step - progress.in_a_row
    if applied == 0:
        return (
            "no step was ever finite, so it is not the rate: try mixed_precision = bf16 or no, "
            "and look at the base and network_weights"
        )
    good = checkpoint.last_good(checkpoints, applied) if checkpoints else None
    start = "start again with a lower learning_rate or max_grad_norm and another --output"
    if good is None:
        return f"{start}; no weights from before were saved"
    weights = shlex.quote(f"network_weights={good / checkpoint.WEIGHTS}")
    return f"{start}; to begin with the last weights that had a finite loss, add --set {weights}"


def _largest(config: TrainConfig, prepared: Prepared) -> MicroBatch:
    """The micro-batch of the first epoch with the most pixels."""

    def pixels(micro: MicroBatch) -> int:
        bucket = prepared.buckets[micro[0].item.sha256]
        return bucket.width_px * bucket.height_px * min(len(micro), config.images_at_once)

    return max((micro for group in _epoch_groups(config, prepared, 0) for micro in group), key=pixels)


def _epoch_groups(config: TrainConfig, prepared: Prepared, epoch: int) -> list[list[MicroBatch]]:
    """The epoch's micro-batches, in groups of gradient_accumulation_steps; the last group may be smaller."""
    items = prepared.dataset.items
    seen: Counter[str] = Counter()
    micros: list[MicroBatch] = []
    for batch in dataset.epoch_batches(prepared.dataset, prepared.buckets, config, epoch):
        micro = []
        for index in batch.items:
            micro.append(Sample(items[index], seen[items[index].sha256]))
            seen[items[index].sha256] += 1
        micros.append(micro)
    size = config.gradient_accumulation_steps
    return [micros[start : start + size] for start in range(0, len(micros), size)]


def _remaining(
    config: TrainConfig, prepared: Prepared, length: Plan, done: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(epoch, micro-batches of a step) for every step that is not done yet."""
    first_epoch, place = divmod(done, length.steps_per_epoch)
    left = length.total_steps - done
    for epoch in range(first_epoch, length.total_epochs):
        groups = _epoch_groups(config, prepared, epoch)[place:][:left]
        left -= len(groups)
        place = 0
        for group in groups:
            yield epoch, group


def _event(
    length: Plan, step: int, epoch: int, rates: Mapping[str, float], outcome: StepOutcome, seconds: float
) -> Event:
    if outcome.skipped:
        return Skipped(step, outcome.skipped)
    return Step(
        step=step,
        total_steps=length.total_steps,
        epoch=epoch + 1,
        total_epochs=length.total_epochs,
        loss=outcome.loss,
        learning_rate=_highest(rates, "unet"),
        text_encoder_lr=_highest(rates, "text_encoder"),
        grad_norm=outcome.grad_norm,
        seconds=seconds,
    )


def _highest(rates: Mapping[str, float], component: str) -> float:
    """The rate of a component; of several groups (block rates, two text encoders) the highest."""
    return max((rate for name, rate in rates.items() if name.startswith(component)), default=0.0)


def _ends_epoch(length: Plan, step: int) -> bool:
    return step % length.steps_per_epoch == 0 or step == length.total_steps


def _advance(progress: checkpoint.Progress, outcome: StepOutcome) -> checkpoint.Progress:
    if outcome.skipped:
        return replace(
            progress, step=progress.step + 1, skipped=progress.skipped + 1, in_a_row=progress.in_a_row + 1
        )
    return replace(progress, step=progress.step + 1, in_a_row=0)
