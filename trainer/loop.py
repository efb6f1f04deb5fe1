"""train(): the only training loop, for every family – a generator of Step / Skipped / Saved / Finished.

Owns the order of things: which samples make a step, their noise, accumulation, clipping, skipping,
checkpoints. Everything random is drawn from a generator keyed by what it is for – (seed, epoch, image,
occurrence) for noise and timestep, (seed, step, micro-batch) for dropout – so a run does not depend on how
samples are batched, and a resumed run is the same run.

Shapes: B batch, C latent channels, h w latent sides.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import checkpoint, dataset, loss, optim, preflight, validation
from trainer.adapter import Adapter, keyed_generator
from trainer.bases.base import Base, Sizes, TextStates, compute_type, plain_alphas_cumprod
from trainer.cache import Prepared
from trainer.captions import Moment
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Diverged, Interrupted
from trainer.events import Event, Finished, Saved, Skipped, Step, Validated
from trainer.memory import out_of_memory_named

MAX_SKIPPED_IN_A_ROW = 10  # assumed: an fp16 loss scale of 65536 has fallen to 64 by then


@dataclass(frozen=True)
class Sample:
    """One image in one epoch; ``occurrence`` counts its repeats within the epoch."""

    item: dataset.Item
    occurrence: int


MicroBatch = list[Sample]


@dataclass(frozen=True)
class Plan:
    """How long a run is.  A step is an optimizer step."""

    steps_per_epoch: int
    total_steps: int
    total_epochs: int


def plan(config: TrainConfig, images: dataset.Dataset, buckets: Any = None) -> Plan:
    """Steps and epochs of a run.  Accumulation stays within an epoch: its last group may be smaller."""
    if buckets is None:
        buckets = dataset.assign_buckets(images.items, config)
    batches = len(dataset.epoch_batches(images, buckets, config, 0))
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    if config.max_train_steps is not None:
        return Plan(per_epoch, config.max_train_steps, math.ceil(config.max_train_steps / per_epoch))
    assert config.max_train_epochs is not None
    return Plan(per_epoch, per_epoch * config.max_train_epochs, config.max_train_epochs)


def total_steps(config: TrainConfig, images: dataset.Dataset) -> int:
    """Optimizer steps of a run: ⌈batches per epoch / accumulation⌉ × epochs, or max_train_steps."""
    return plan(config, images).total_steps


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
) -> Iterator[Event]:
    """Train the adapter in place.  Goes on from a checkpoint in ``checkpoints`` if there is one.

    With ``validate_on`` its validation loss (``trainer.validation``) is told after every epoch.  Raises
    Diverged after ten skipped steps in a row, OutOfMemory, and Interrupted once ``should_stop`` says so (the
    step is finished and saved first).
    """
    preflight.check(base, config)
    length = plan(config, prepared.dataset, prepared.buckets)
    with out_of_memory_named(config):
        stepper = Stepper(config, base, adapter, prepared)
    run = checkpoint.Run(
        config,
        base.identity,
        prepared.dataset.content_hash,
        adapter,
        stepper.optimizer,
        stepper.scaler,
        stepper.compute,
    )
    progress = checkpoint.restore(checkpoints, run) if checkpoints else checkpoint.Progress()
    last_save = time.monotonic()
    with _recomputing(base, config), stepper:
        for epoch, group in _remaining(config, prepared, length, progress.step):
            started = time.perf_counter()
            rates = optim.set_rate(stepper.optimizer, optim.rate(config, length.total_steps, progress.step))
            with out_of_memory_named(config):
                outcome = stepper.step(group, epoch, progress.step)
            progress = _advance(progress, outcome)
            yield _event(length, progress.step, epoch, rates, outcome, time.perf_counter() - started)
            if validate_on is not None and _ends_epoch(length, progress.step):
                yield Validated(progress.step, epoch + 1, stepper.validate(validate_on))
            if progress.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                what = f"{progress.in_a_row} steps in a row had no finite {outcome.skipped}"
                kept = ""
                if checkpoints:  # skipped steps change no weight: these are the last good ones
                    kept = f"; the last good weights are in {checkpoint.save(checkpoints, run, progress)}"
                raise Diverged(
                    f"{what}, up to {progress.step}", f"lower learning_rate or max_grad_norm{kept}"
                )
            stop = should_stop()
            if checkpoints and (stop or time.monotonic() - last_save >= checkpoint_every_seconds):
                yield Saved(checkpoint.save(checkpoints, run, progress), progress.step)
                last_save = time.monotonic()
            if stop:
                saved = "the checkpoint is saved" if checkpoints else "nothing is saved"
                raise Interrupted(
                    f"stopped after step {progress.step} of {length.total_steps}: {saved}",
                    "the same command goes on",
                )
    yield Finished(progress.step, progress.skipped)


@dataclass(frozen=True)
class Draw:
    """What is drawn for one sample: its timestep (), noise (C, h, w) as the target has it, and the noise that
    its input gets."""

    timestep: Tensor
    noise: Tensor
    input_noise: Tensor


@dataclass(frozen=True)
class Outcome:
    """What one step came to.  ``skipped`` names what was not finite, or is empty."""

    loss: float
    grad_norm: float
    skipped: str = ""


class Stepper:
    """Makes one optimizer step from a group of micro-batches."""

    def __init__(self, config: TrainConfig, base: Base, adapter: Adapter, prepared: Prepared) -> None:
        self.config = config
        self.base = base
        self.adapter = adapter
        self.prepared = prepared
        self.weights = adapter.trainable()
        self.now = Moment(0, plan(config, prepared.dataset, prepared.buckets).total_steps)
        self.optimizer = optim.build_optimizer(config, adapter)
        self.compute = _compute_type(config, base)
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=self.compute == torch.float16)
        _check_prediction(config, base)
        plain = plain_alphas_cumprod(base.scheduler_config)
        noised = loss.zero_terminal_snr(plain) if config.zero_terminal_snr else plain
        self.plain_alphas = plain.to(base.device)  # for weights over timesteps
        self.alphas_cumprod = noised.to(base.device)  # for noise and target
        self.steps = range(config.first_timestep, min(config.end_timestep, len(plain)))

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *error: object) -> None:
        """No dropout and no gradients stay behind, however training ended."""
        self.adapter.apply_dropout()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, group: Sequence[MicroBatch], epoch: int, step: int) -> Outcome:
        """Forward, backward, clip, update.  Every sample of the group weighs the same, however it is cut."""
        self.now = replace(self.now, step=step)
        samples = sum(len(micro) for micro in group)
        loss_sum = torch.zeros((), device=self.base.device)
        for number, micro in enumerate(group):
            self.adapter.apply_dropout(self.config.seed, step, number)
            share = self._losses(micro, epoch).sum() / samples
            if share.requires_grad:  # not where module_dropout left everything out
                self.scaler.scale(share).backward()
            loss_sum += share.detach()
        self.adapter.apply_dropout()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if not gradients:  # module_dropout left every module out
            return Outcome(loss_sum.item(), 0.0)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        mean_loss, grad_norm = torch.stack([loss_sum, norm]).tolist()  # the step's only wait for the device
        skipped = "" if math.isfinite(grad_norm) else "gradient"
        if not math.isfinite(mean_loss):
            skipped = "loss"
        if not skipped:
            if self.config.max_grad_norm > 0 and grad_norm > self.config.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self.weights, self.config.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
            if self.config.scale_weight_norms is not None:
                self.adapter.limit_norms(self.config.scale_weight_norms)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(mean_loss, grad_norm, skipped)

    def validate(self, split: Prepared) -> float:
        """The validation loss of the adapter as it is now, without dropout."""
        self.adapter.apply_dropout()
        with self._autocast():
            return validation.validation_loss(self.base, self.config, split)

    def _losses(self, micro: MicroBatch, epoch: int) -> Tensor:
        """Loss of each sample (B) with its own noise and timestep."""
        device, config, prepared = self.base.device, self.config, self.prepared
        views = [dataset.view_for(sample.item, config, epoch, sample.occurrence) for sample in micro]
        latents = [prepared.latents[view].float() * self.base.latent_scale for view in views]
        draws = [self._draw(sample, latent, epoch) for sample, latent in zip(micro, latents, strict=True)]
        latents_BCHW = torch.stack(latents).to(device)
        noise_BCHW = torch.stack([draw.noise for draw in draws]).to(device)
        input_noise_BCHW = torch.stack([draw.input_noise for draw in draws]).to(device)
        timesteps_B = torch.stack([draw.timestep for draw in draws]).to(device)
        noisy_BCHW = loss.add_noise(latents_BCHW, input_noise_BCHW, timesteps_B, self.alphas_cumprod)
        sizes = [Sizes(*prepared.sizes[view]) for view in views]
        with self._autocast():
            states = self._text([self._caption(sample, epoch) for sample in micro])
            predicted_BCHW = self.base.predict(noisy_BCHW, timesteps_B, states, sizes)
        target_BCHW = noise_BCHW
        if config.v_parameterization:
            target_BCHW = loss.velocity(latents_BCHW, noise_BCHW, timesteps_B, self.alphas_cumprod)
        losses_B = loss.sample_losses(
            predicted_BCHW,
            target_BCHW,
            timesteps_B,
            self.alphas_cumprod,
            config,
            masks_B1HW=_masks(prepared, views, latents_BCHW),
            weights_alphas=self.plain_alphas,
        )
        if config.prior_loss_weight != 1.0 and any(sample.item.is_reg for sample in micro):
            weights = [config.prior_loss_weight if sample.item.is_reg else 1.0 for sample in micro]
            losses_B = losses_B * torch.tensor(weights, device=device)
        return losses_B

    def _draw(self, sample: Sample, latent_CHW: Tensor, epoch: int) -> Draw:
        """What is drawn for a sample in an epoch, on CPU.  ``latent_CHW`` is scaled."""
        config = self.config
        generator = keyed_generator(config.seed, epoch, sample.item.sha256, sample.occurrence)
        timestep = torch.randint(self.steps.start, self.steps.stop, (), generator=generator)
        noise = torch.randn(latent_CHW.shape, generator=generator)
        if config.noise_offset > 0:
            brightness = torch.randn((latent_CHW.shape[0], 1, 1), generator=generator)
            strength = config.noise_offset
            if config.noise_offset_random_strength:
                strength *= float(torch.rand((), generator=generator))
            offset: float | Tensor = strength
            if config.adaptive_noise_scale is not None:
                offset = loss.adaptive_offset(latent_CHW, strength, config.adaptive_noise_scale)
            noise = loss.offset_noise(noise, brightness, offset)
        if config.multires_noise_iterations:
            noise = loss.pyramid_noise(
                noise, config.multires_noise_iterations, config.multires_noise_discount, generator
            )
        input_noise = noise
        if config.ip_noise_gamma:
            strength = config.ip_noise_gamma
            if config.ip_noise_gamma_random_strength:
                strength *= float(torch.rand((), generator=generator))
            input_noise = noise + strength * torch.randn(latent_CHW.shape, generator=generator)
        return Draw(timestep, noise, input_noise)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.base.device.type, self.compute, enabled=self.compute != torch.float32)

    def _caption(self, sample: Sample, epoch: int) -> str:
        return dataset.caption_for(sample.item, self.config, epoch, sample.occurrence, self.now)

    def _text(self, captions: list[str]) -> TextStates:
        if self.config.trains_text_encoder:
            return self.base.encode_text(captions, self.config.clip_skip, self.config.max_token_length)
        cached = self.prepared.text(captions)
        if cached is not None:
            return cached.to(self.base.device)
        with torch.no_grad():
            return self.base.encode_text(captions, self.config.clip_skip, self.config.max_token_length)


def _masks(prepared: Prepared, views: Sequence[str], latents_BCHW: Tensor) -> Tensor | None:
    """Weights of the loss (B, 1, h, w), 1 where an image has none; None if none of them has any."""
    masks = [prepared.masks.get(view) for view in views]
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(latents_BCHW.shape[2:])
    return torch.stack([whole if mask is None else mask for mask in masks])[:, None].to(latents_BCHW.device)


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
    length: Plan, step: int, epoch: int, rates: Mapping[str, float], outcome: Outcome, seconds: float
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


def _advance(progress: checkpoint.Progress, outcome: Outcome) -> checkpoint.Progress:
    if outcome.skipped:
        return replace(
            progress, step=progress.step + 1, skipped=progress.skipped + 1, in_a_row=progress.in_a_row + 1
        )
    return replace(progress, step=progress.step + 1, in_a_row=0)


def _check_prediction(config: TrainConfig, base: Base) -> None:
    """The base's files say what it predicts; training for the other would only destroy it."""
    is_v = base.prediction_type == "v_prediction"
    if is_v and not config.v_parameterization:
        raise ConfigError(
            f"{base.name} predicts v, but v_parameterization is not set",
            "set v_parameterization = true (and zero_terminal_snr = true if the base was made with it)",
        )
    if config.v_parameterization and not is_v:
        raise ConfigError(
            f"v_parameterization is set, but {base.name} says that it predicts noise",
            "leave it out; a v-prediction base says so by a v_pred key or in scheduler_config.json",
        )


def _compute_type(config: TrainConfig, base: Base) -> torch.dtype:
    """mixed_precision as a type; the base's own weights must be that type or fp32."""
    wanted = compute_type(config.mixed_precision, base.device)
    if base.compute_dtype not in (torch.float32, wanted):
        raise ConfigError(
            f"mixed_precision = {config.mixed_precision} computes in {wanted}, "
            f"but the base was loaded in {base.compute_dtype}",
            "load the base in that type or in float32",
        )
    return wanted


@contextlib.contextmanager
def _recomputing(base: Base, config: TrainConfig) -> Iterator[None]:
    """Gradient checkpointing while training; the base is as before afterwards."""
    if not config.gradient_checkpointing:
        yield
        return
    encoders = base.text_encoders if config.trains_text_encoder else []
    # transformers' own switch leaves a hook on the embeddings behind, so its layers are switched one by one
    layers = [
        m for encoder in encoders for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    base.unet.enable_gradient_checkpointing()
    for layer in layers:
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True
        layer.train()  # it recomputes in training mode only; CLIP has no dropout that would act
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        for layer in layers:
            layer.gradient_checkpointing = False
            layer.eval()
