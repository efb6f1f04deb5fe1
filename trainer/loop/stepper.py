"""Stepper: one optimizer step from a group of micro-batches – forward, backward, clip, update.

Owns the random numbers of a sample, how a batch is split, what is shared with other processes, and the dry
step that measures peak memory.  Everything random comes from a generator keyed by its purpose: (seed, epoch,
image, occurrence) for noise and timestep, (seed, step, micro-batch) for dropout.  ``loop`` decides which
samples make a step.

Shapes: B batch, C latent channels, h w latent sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer import oom as memory
from trainer.adapters import Adapter, keyed_generator
from trainer.bases import (
    Base,
    Sizes,
    TextStates,
    compute_type,
    families,
    plain_alphas_cumprod,
    zero_terminal_snr,
)
from trainer.config import TrainConfig
from trainer.data import START, Item, Moment, Prepared, caption_for
from trainer.errors import ConfigError
from trainer.events import Rehearsed
from trainer.loop import loss, optim, validation
from trainer.loop.ranks import ALONE, Ranks

MAX_REMEMBERED = 1024  # captions whose states a run keeps in RAM: 1.9 GB for SDXL's 225 tokens in fp32


@dataclass(frozen=True)
class Sample:
    """One image in one epoch; ``occurrence`` counts its repeats within the epoch."""

    item: Item
    occurrence: int


MicroBatch = list[Sample]


@dataclass(frozen=True)
class StepPart:
    """What is computed at once: a micro-batch, or some rows of one from ``start`` on of ``total``."""

    number: int
    samples: MicroBatch
    start: int
    total: int


@dataclass(frozen=True)
class Draw:
    """What is drawn for one sample: its timestep (), noise (C, h, w) as the target has it, and the noise
    that its input gets."""

    timestep: Tensor
    noise: Tensor
    input_noise: Tensor


@dataclass(frozen=True)
class StepOutcome:
    """The result of one step. ``skipped`` names what was not finite, or is empty."""

    loss: float
    grad_norm: float
    skipped: str = ""


class Stepper:
    """Makes one optimizer step from a group of micro-batches."""

    def __init__(
        self,
        config: TrainConfig,
        adapter: Adapter,
        prepared: Prepared,
        ranks: Ranks = ALONE,
        begun: Moment = START,
    ) -> None:
        self.config = config
        self.base = base = adapter.base
        self.adapter = adapter
        self.prepared = prepared
        self.ranks = ranks
        self.now = begun
        self.is_untouched = True  # whether the weights are those of the last finished step
        if config.text_encoder_frozen:
            adapter.freeze_text_encoders()
        self.weights = [weight for weight in adapter.trainable() if weight.requires_grad]
        self.optimizer = optim.build_optimizer(config, adapter)
        self.compute = _compute_type(config, base)
        self.scaler = self._new_scaler()
        self._remembered: dict[str, TextStates] = {}
        families.check_prediction(config, base.name, base.prediction_type)
        plain = plain_alphas_cumprod(base.scheduler_config)
        noised = zero_terminal_snr(plain) if config.zero_terminal_snr else plain
        self.plain_alphas = plain.to(base.device)  # for weights over timesteps
        self.alphas_cumprod = noised.to(base.device)  # for noise and target
        self.steps = range(config.first_timestep, min(config.end_timestep, len(plain)))

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove dropout and gradients, however training ended."""
        self.adapter.apply_dropout()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, group: Sequence[MicroBatch], epoch: int, step: int) -> StepOutcome:
        """Forward, backward, clip, update.  Every sample of the group has the same weight, however
        the batch is split."""
        self.is_untouched = True
        self.now = replace(self.now, step=step)
        draw = keyed_generator(self.config.seed, step, "averaging", device=self.base.device)
        with optim.in_training(self.optimizer, self.weights, draw):
            with self.ranks.agreed(self.base.device):
                loss_sum = self._gradients(group, epoch, step)
            self.ranks.sum_(loss_sum)
            self.ranks.sum_gradients_(self.weights)
            with self.ranks.agreed(self.base.device):
                outcome = self._make_update(loss_sum, step)
        return outcome

    def _make_update(self, loss_sum: Tensor, step: int) -> StepOutcome:
        """Clip and update, if loss and gradients are finite."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if not gradients:  # module_dropout left every module out
            return StepOutcome(loss_sum.item(), 0.0)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        mean_loss, grad_norm = torch.stack([loss_sum, norm.float()]).tolist()  # the step's only wait
        skipped = "" if math.isfinite(grad_norm) else "gradient"
        if not math.isfinite(mean_loss):
            skipped = "loss"
        if not skipped:
            if self.config.max_grad_norm > 0 and grad_norm > self.config.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self.weights, self.config.max_grad_norm, norm)
            self.is_untouched = False
            self._update(step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(mean_loss, grad_norm, skipped)

    def rehearse(self, micro: MicroBatch) -> Rehearsed:
        """A dry step with this micro-batch, as often as a step can hold it in memory. Weights, optimizer and
        later random numbers are not changed. It has its own optimizer, so its peak equals that of a real step."""
        config, device = self.config, self.base.device
        before = [weight.detach().to("cpu", copy=True) for weight in self.weights]
        real = self.optimizer, self.scaler
        self.optimizer, self.scaler = optim.build_optimizer(config, self.adapter), self._new_scaler()
        accumulates = config.gradient_accumulation_steps > 1
        memory.release(device)  # loading and encoding have left more in the cache than a step needs
        memory.forget_peak(device)
        started = time.perf_counter()
        try:
            self.step([micro] * (2 if accumulates else 1) * self.ranks.world, 0, 0)
            peaks = memory.peak_bytes(device), memory.card_peak_bytes(device)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer, self.scaler = real
            with torch.no_grad():
                for weight, value in zip(self.weights, before, strict=True):
                    weight.copy_(value)
            memory.release(device)
        self.is_untouched = True
        bucket = self.prepared.buckets[micro[0].item.key]
        images = min(len(micro), config.images_at_once)
        size = (bucket.width_px, bucket.height_px)
        seconds = time.perf_counter() - started
        return Rehearsed(size, images, seconds, *peaks, memory.device_bytes(device))

    def park(self) -> None:
        """With cpu_offload: the optimizer's state to the computer's memory until the next step."""
        if self.config.cpu_offload:
            optim.move_state(self.optimizer, torch.device("cpu"))

    def _gradients(self, group: Sequence[MicroBatch], epoch: int, step: int) -> Tensor:
        """This process's parts of the step: gradients in the weights, and its share of the mean loss."""
        samples = sum(len(micro) for micro in group)
        parts = cut(group, self.config.images_at_once, self.ranks.world)
        loss_sum = torch.zeros((), device=self.base.device)
        try:
            for part in parts[self.ranks.rank :: self.ranks.world]:
                rows = (part.start, len(part.samples), part.total)
                self.adapter.apply_dropout(self.config.seed, step, part.number, rows=rows)
                with self.adapter.computing(self.compute):
                    share = self._losses(part.samples, epoch).sum() / samples
                    if share.requires_grad:  # not where module_dropout left everything out
                        self.scaler.scale(share).backward()
                loss_sum += share.detach()
        finally:
            self.adapter.apply_dropout()
        return loss_sum

    def _update(self, step: int) -> None:
        """The optimizer's step, in fp32 whatever the weights are kept in."""
        device = self.base.device
        if self.config.cpu_offload:
            optim.move_state(self.optimizer, device)
        draw = keyed_generator(self.config.seed, step, "rounding", device=device)
        with optim.in_fp32(self.weights, draw):
            self.scaler.step(self.optimizer)
            if self.config.scale_weight_norms is not None:
                self.adapter.limit_norms(self.config.scale_weight_norms)
        self.park()

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.base.device.type, enabled=self.compute == torch.float16)

    def validate(self, split: Prepared) -> float:
        """The validation loss of the adapter as it is now, without dropout."""
        self.adapter.apply_dropout()
        with self._autocast():
            return validation.validation_loss(self.base, self.config, split)

    def _losses(self, micro: MicroBatch, epoch: int) -> Tensor:
        """Loss of each sample (B) with its own noise and timestep."""
        device, config, prepared = self.base.device, self.config, self.prepared
        views = [prepared.view(self.base, s.item, config, epoch, s.occurrence) for s in micro]
        latents = [view.latent.float() * self.base.latent_scale for view in views]
        draws = [self._draw(sample, latent, epoch) for sample, latent in zip(micro, latents, strict=True)]
        latents_BCHW = torch.stack(latents).to(device)
        noise_BCHW = torch.stack([draw.noise for draw in draws]).to(device)
        input_noise_BCHW = torch.stack([draw.input_noise for draw in draws]).to(device)
        timesteps_B = torch.stack([draw.timestep for draw in draws]).to(device)
        noisy_BCHW = loss.add_noise(latents_BCHW, input_noise_BCHW, timesteps_B, self.alphas_cumprod)
        sizes = [Sizes(*view.sizes) for view in views]
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
            masks_B1HW=_masks([view.mask for view in views], latents_BCHW),
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
        """Off where everything has the compute type already. Norms then return it as well, as when images are drawn
        with the LoRA, and not fp32: that is half the memory of what they keep for backward."""
        has_type = self.base.compute_dtype == self.compute and not self.adapter.needs_autocast
        is_on = self.compute != torch.float32 and not has_type
        return torch.autocast(self.base.device.type, self.compute, enabled=is_on)

    def _caption(self, sample: Sample, epoch: int) -> str:
        return caption_for(sample.item, self.config, epoch, sample.occurrence, self.now)

    def _text(self, captions: list[str]) -> TextStates:
        if self.config.updates_text_encoder:
            return self._encode(captions)
        cached = self.prepared.text(captions)
        if cached is None:
            cached = self._states_of_frozen(captions)
        return cached.to(self.base.device)

    def _states_of_frozen(self, captions: list[str]) -> TextStates:
        """States of text encoders that no longer change, LoRA included.  What was encoded once is kept."""
        known = self._remembered
        if len(known) > MAX_REMEMBERED:
            known.clear()
        for caption in captions:
            if caption not in known:  # one by one: a resumed run then finds the same bits
                with torch.no_grad():
                    known[caption] = self._encode([caption]).to("cpu")
        return TextStates.join([known[caption] for caption in captions])

    def _encode(self, captions: list[str]) -> TextStates:
        return self.base.encode_captions(captions, self.config)


def cut(group: Sequence[MicroBatch], at_once: int, world: int) -> list[StepPart]:
    """A step's micro-batches as parts of at most ``at_once`` images, at least one for each process where
    there are images enough."""
    while True:
        parts = [
            StepPart(number, micro[start : start + at_once], start, len(micro))
            for number, micro in enumerate(group)
            for start in range(0, len(micro), at_once)
        ]
        if len(parts) >= world or at_once == 1:
            return parts
        at_once = max(1, max(len(part.samples) for part in parts) // 2)


def _masks(masks: Sequence[Tensor | None], latents_BCHW: Tensor) -> Tensor | None:
    """Weights of the loss (B, 1, h, w), 1 where an image has none; None if none of them has any."""
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(latents_BCHW.shape[2:])
    return torch.stack([whole if mask is None else mask for mask in masks])[:, None].to(latents_BCHW.device)


def _compute_type(config: TrainConfig, base: Base) -> torch.dtype:
    """mixed_precision as a type; the base's own weights must be that type or fp32."""
    wanted = compute_type("bf16" if config.full_bf16 else config.mixed_precision, base.device)
    if base.compute_dtype not in (torch.float32, wanted):
        raise ConfigError(
            f"mixed_precision = {config.mixed_precision} computes in {wanted}, "
            f"but the base was loaded in {base.compute_dtype}",
            "load the base in that type or in float32",
        )
    return wanted
