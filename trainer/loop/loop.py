"""train(): the only training loop, for every family – a generator of Step / Skipped / Saved / Finished.

Owns the order: which samples make a step, and when to skip, save, validate and stop. ``stepper`` owns what
happens within a step. Its random numbers are keyed by what they are for, so a run does not depend on how
samples are batched or spread over GPUs, and a resumed run is the same run.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.adapters import Adapter
from trainer.bases import Base
from trainer.compute import faster, recomputing
from trainer.config import TrainConfig
from trainer.data import Moment, Plan, Prepared, epoch_batches, plan, preflight
from trainer.errors import Diverged, Interrupted, OutOfMemory, ToolError
from trainer.events import Event, Finished, Saved, Skipped, Step, Validated
from trainer.loop import checkpoint, optim
from trainer.loop.batches import MicroBatch, Sample
from trainer.loop.ranks import ALONE, Ranks
from trainer.loop.stepper import Following, StepOutcome, Stepper
from trainer.oom import memory_named, out_of_memory_named

BESIDE_BYTES = 64_000_000  # assumed: a smaller checkpoint is written in less than a tenth of a second
MAX_SKIPPED_IN_A_ROW = 10  # assumed: an fp16 loss scale of 65536 has fallen to 64 by then


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How a run is conducted: what is saved, reported and shared.  Nothing here changes the result.

    ``checkpoints`` is the folder of its checkpoints.  With ``validate_on`` the validation loss
    (``trainer.loop.validation``) is reported after every epoch; with ``rehearse`` one dry step at the largest
    bucket comes first, which changes nothing.  ``changed`` settings may differ from the checkpoint's: those
    that the out-of-memory ladder changed. ``work_bytes`` gives the memory that a step needs beside the networks, if
    it is known; otherwise the run has the card to itself.
    """

    checkpoints: Path | None = None
    checkpoint_every_seconds: float = 120.0
    should_stop: Callable[[], bool] = lambda: False
    validate_on: Prepared | None = None
    rehearse: bool = False
    changed: frozenset[str] = frozenset()
    ranks: Ranks = ALONE
    work_bytes: Callable[[], int | None] | None = None


def train(
    config: TrainConfig, base: Base, adapter: Adapter, prepared: Prepared, how: Conduct = Conduct()
) -> Generator[Event, None, None]:
    """Train the adapter in place.  Resumes from a checkpoint in ``how.checkpoints`` if there is one.

    Raises Diverged after ten skipped steps in a row, which are not saved; OutOfMemory, in a step or in the validation,
    with all steps so far saved, if the weights are still theirs (``Stepper.is_untouched``); and Interrupted once
    ``how.should_stop`` says so (the step is finished and saved first).
    """
    if config.text_encoder_frozen:  # before it is decided which weights may leave the card
        adapter.freeze_text_encoders()
    with _on_card(base, config, prepared, how):
        yield from _train(config, base, adapter, prepared, how)


def _on_card(
    base: Base, config: TrainConfig, prepared: Prepared, how: Conduct
) -> AbstractContextManager[None]:
    """The networks that steps need on the card. With cpu_offload, text encoders that are only read compute in RAM."""
    reads = prepared.states is None or config.updates_text_encoder
    in_ram = config.cpu_offload and not config.updates_text_encoder
    needed = [base.unet, *(base.text_encoders if reads and not in_ram else [])]
    needed += [base.vae] if prepared.encodes_anew else []
    aside = tuple(base.text_encoders) if in_ram else ()
    return base.card.phase("train", *needed, work=how.work_bytes, in_ram=aside)


def _train(
    config: TrainConfig, base: Base, adapter: Adapter, prepared: Prepared, how: Conduct
) -> Generator[Event, None, None]:
    preflight.check(base, config)
    length = plan(config, prepared.dataset, prepared.buckets)
    split = how.validate_on
    with out_of_memory_named(config):
        stepper = Stepper(config, adapter, prepared, how.ranks, Moment(0, length.total_steps))
    saves = _Saves(how, _run(stepper, length, how.changed))
    with recomputing(base, config), faster(base, config), stepper, contextlib.ExitStack() as stack:
        if how.rehearse:
            with out_of_memory_named(config):
                yield stepper.rehearse(_largest(config, prepared))
        stack.callback(saves.end)
        progress = saves.restore()
        stepper.park()
        for (epoch, group), following in _with_next(_remaining(config, prepared, length, progress.step)):
            started = time.perf_counter()
            rates = optim.set_rates_of_step(stepper.optimizer, config, length.total_steps, progress.step)
            try:
                with out_of_memory_named(config):
                    outcome = stepper.step(group, epoch, progress.step, following)
            except OutOfMemory:
                if progress.step and stepper.is_untouched:
                    saves.save(progress)
                    saves.wait()
                raise
            progress = _advance(progress, outcome)
            saves.after(outcome)
            others = optim.other_rates(stepper.optimizer, rates)
            yield _event(length, progress.step, rates, others, outcome, time.perf_counter() - started)
            if _ends_epoch(length, progress.step):
                try:
                    in_validation = f"out of memory in the validation after step {progress.step}"
                    with memory_named(in_validation), how.ranks.agreed():
                        validated = stepper.validate(split) if split and how.ranks.is_first else None
                except OutOfMemory:
                    saves.save(progress)
                    saves.wait()
                    raise
                if validated is not None:
                    yield Validated(progress.step, epoch + 1, validated)
            if progress.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                with contextlib.suppress(ToolError):  # the last good checkpoint may not be complete yet
                    saves.wait()
                what = f"{progress.in_a_row} steps in a row had no finite {outcome.skipped}"
                raise Diverged(f"{what}, up to {progress.step}", _after_divergence(how.checkpoints, progress))
            stop = how.ranks.any(how.should_stop())
            if stop or (saves.are_due and not progress.in_a_row):
                saves.save(progress)
            yield from saves.wait() if stop else saves.written()
            if stop:
                raise _stopped(how, length, progress)
    yield Finished(progress.step, progress.skipped)


class _Saves:
    """The checkpoints of a run: when one is due, and when it replaces those before it."""

    def __init__(self, how: Conduct, run: checkpoint.Run) -> None:
        self._run = run
        self._from = how.checkpoints
        self._into = how.checkpoints if how.ranks.is_first else None
        self._every_seconds = how.checkpoint_every_seconds
        self._last = time.monotonic()
        self._unproven: Path | None = None  # the newest, until a step from its weights was finite
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[Path]] | None = None
        self._done: list[Saved] = []

    def restore(self) -> checkpoint.Progress:
        """Go on from the newest checkpoint, if there is one.  The time to the next counts from here."""
        progress = checkpoint.restore(self._from, self._run) if self._from else checkpoint.Progress()
        self._last = time.monotonic()
        return progress

    @property
    def are_due(self) -> bool:
        return time.monotonic() - self._last >= self._every_seconds

    def save(self, progress: checkpoint.Progress) -> None:
        """Write a checkpoint; nothing where none are kept, or another process writes them. A large one is written
        while training goes on: its files take seconds, the copy of the state tenths of one."""
        if self._into is None:
            return
        self._done = self.wait()
        found = checkpoint.snapshot(self._run, progress)
        self._writing = progress.step, self._writer.submit(checkpoint.write, self._into, found)
        if found.nbytes < BESIDE_BYTES:
            self._done = self.wait()
        self._last = time.monotonic()

    def written(self) -> list[Saved]:
        """The checkpoints that are complete since the last call. Raises what writing one raised."""
        if self._writing is not None and self._writing[1].done():
            return self.wait()
        done, self._done = self._done, []
        return done

    def wait(self) -> list[Saved]:
        """The same, when the one that is being written is complete."""
        done, self._done = self._done, []
        if self._writing is not None:
            (step, writing), self._writing = self._writing, None
            self._unproven = writing.result()
            done.append(Saved(self._unproven, step))
        return done

    def end(self) -> None:
        """Wait for what is being written; an error of it does not hide that of training."""
        self._writer.shutdown(wait=True)

    def after(self, outcome: StepOutcome) -> None:
        """A finite step proves the weights that it was computed from: older checkpoints may go, once the newest is
        complete."""
        if self._unproven and not outcome.skipped:
            checkpoint.drop_others(self._unproven)
            self._unproven = None


def _run(stepper: Stepper, length: Plan, changed: frozenset[str]) -> checkpoint.Run:
    """What the run's checkpoints belong to and hold."""
    return checkpoint.Run(
        stepper.config,
        stepper.base.identity,
        stepper.prepared.dataset.content_hash,
        stepper.adapter,
        stepper.optimizer,
        stepper.scaler,
        stepper.compute,
        length.steps_per_epoch,
        changed,
    )


def _stopped(how: Conduct, length: Plan, progress: checkpoint.Progress) -> Interrupted:
    saved = "the checkpoint is saved" if how.checkpoints else "nothing is saved"
    return Interrupted(
        f"stopped after step {progress.step}/{length.total_steps}: {saved}", "the same command goes on"
    )


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
        bucket = prepared.buckets[micro[0].item.key]
        return bucket.width_px * bucket.height_px * min(len(micro), config.images_at_once)

    return max((micro for group in _epoch_groups(config, prepared, 0) for micro in group), key=pixels)


def _epoch_groups(config: TrainConfig, prepared: Prepared, epoch: int) -> list[list[MicroBatch]]:
    """The epoch's micro-batches, in groups of gradient_accumulation_steps; the last group may be smaller."""
    items = prepared.dataset.items
    seen: Counter[str] = Counter()
    micros: list[MicroBatch] = []
    for batch in epoch_batches(prepared.dataset, prepared.buckets, config, epoch):
        micro = []
        for index in batch.items:
            micro.append(Sample(items[index], seen[items[index].sha256]))
            seen[items[index].sha256] += 1
        micros.append(micro)
    size = config.gradient_accumulation_steps
    return [micros[start : start + size] for start in range(0, len(micros), size)]


def _remaining(config: TrainConfig, prepared: Prepared, length: Plan, done: int) -> Iterator[Following]:
    """(epoch, micro-batches of a step) for every step that is not done yet."""
    first_epoch, place = divmod(done, length.steps_per_epoch)
    left = length.total_steps - done
    for epoch in range(first_epoch, length.total_epochs):
        groups = _epoch_groups(config, prepared, epoch)[place:][:left]
        left -= len(groups)
        place = 0
        for group in groups:
            yield epoch, group


def _with_next(steps: Iterator[Following]) -> Iterator[tuple[Following, Following | None]]:
    """Each step with the one after it; None after the last."""
    this = next(steps, None)
    while this is not None:
        following = next(steps, None)
        yield this, following
        this = following


def _event(
    length: Plan,
    step: int,
    rates: Mapping[str, float],
    others: Mapping[str, float],
    outcome: StepOutcome,
    seconds: float,
) -> Event:
    if outcome.skipped:
        return Skipped(step, outcome.skipped)
    return Step(
        step=step,
        total_steps=length.total_steps,
        epoch=(step - 1) // length.steps_per_epoch + 1,
        total_epochs=length.total_epochs,
        loss=outcome.loss,
        learning_rate=_highest(rates, "unet"),
        text_encoder_lr=_highest(rates, "text_encoder"),
        grad_norm=outcome.grad_norm,
        seconds=seconds,
        others=others,
    )


def _highest(rates: Mapping[str, float], component: str) -> float:
    """The rate of a component; of several groups (block rates, two text encoders) the highest. Without those of
    LoRA+: its lora_up have a multiple of it."""
    found = (
        rate for name, rate in rates.items() if name.startswith(component) and not name.endswith(optim.PLUS)
    )
    return max(found, default=0.0)


def _ends_epoch(length: Plan, step: int) -> bool:
    return step % length.steps_per_epoch == 0 or step == length.total_steps


def _advance(progress: checkpoint.Progress, outcome: StepOutcome) -> checkpoint.Progress:
    if outcome.skipped:
        return replace(
            progress, step=progress.step + 1, skipped=progress.skipped + 1, in_a_row=progress.in_a_row + 1
        )
    return replace(progress, step=progress.step + 1, in_a_row=0)
