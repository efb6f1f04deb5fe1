"""Stepper: one optimizer step from a group of micro-batches – forward, backward, clip, update.

Owns how a batch is split, what is shared with other processes, and the dry step that measures peak memory. Dropout's
random numbers are keyed by (seed, step, micro-batch); those of a sample are ``batches``'s.  ``loop`` decides which
samples make a step.

On a GPU a step waits for the device once, for its loss and gradient norm: whether it is skipped depends on them. What
the next part needs is made and sent before that. More waits come from some optimizers of other libraries (Prodigy,
D-Adaptation, paged ones), from cpu_offload, and from the first step: docs/benchmarks.md counts them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import oom as memory
from trainer.adapters import Adapter, keyed_generator
from trainer.bases import (
    Base,
    TextStates,
    compute_type,
    families,
    plain_alphas_cumprod,
    zero_terminal_snr,
)
from trainer.config import TrainConfig
from trainer.data import START, Moment, Prepared
from trainer.errors import ConfigError
from trainer.events import Rehearsed
from trainer.loop import loss, optim, validation
from trainer.loop.batches import Batch, Batches, MicroBatch, StepPart, cut
from trainer.loop.ranks import ALONE, Ranks

MAX_REMEMBERED = 1024  # captions whose states a run keeps in RAM: 1.9 GB for SDXL's 225 tokens in fp32

Following = tuple[int, list[MicroBatch]]  # epoch and micro-batches of a step


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
        steps = range(config.first_timestep, min(config.end_timestep, len(plain)))
        self.batches = Batches(config, base, prepared, steps, begun)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove dropout and gradients, however training ended."""
        self.adapter.apply_dropout()
        self.batches.forget()
        self.optimizer.zero_grad(set_to_none=True)

    def step(
        self, group: Sequence[MicroBatch], epoch: int, step: int, following: Following | None = None
    ) -> StepOutcome:
        """Forward, backward, clip, update.  Every sample of the group has the same weight, however
        the batch is split.  ``following``: epoch and micro-batches of the next step."""
        # a schedule-free optimizer computes y from x and back: that does not give the same bits
        self.is_untouched = not optim.is_schedule_free(self.optimizer)
        draw = keyed_generator(self.config.seed, step, "averaging", device=self.base.device)
        with optim.in_training(self.optimizer, self.weights, draw):
            with self.ranks.agreed():
                loss_sum = self._gradients(group, epoch, step, following)
            self.ranks.sum_(loss_sum)
            self.ranks.sum_gradients_(self.weights)
            with self.ranks.agreed():
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

    def _gradients(
        self, group: Sequence[MicroBatch], epoch: int, step: int, following: Following | None
    ) -> Tensor:
        """This process's parts of the step: gradients in the weights, and its share of the mean loss."""
        samples = sum(len(micro) for micro in group)
        parts = self._own_parts(group)
        coming = [(part, epoch, step) for part in parts[1:]]
        if following is not None:
            coming += [(part, following[0], step + 1) for part in self._own_parts(following[1])[:1]]
        loss_sum = torch.zeros((), device=self.base.device)
        try:
            for number, part in enumerate(parts):
                rows = (part.start, len(part.samples), part.total)
                self.adapter.apply_dropout(self.config.seed, step, part.number, rows=rows)
                with self.adapter.computing(self.compute):
                    batch = self.batches.take(part, epoch, step)
                    share = self._losses(batch).sum() / samples
                    del batch
                    if share.requires_grad:  # not where module_dropout left everything out
                        self.scaler.scale(share).backward()
                loss_sum += share.detach()
                if number < len(coming):
                    self.batches.ahead(*coming[number])
        finally:
            self.adapter.apply_dropout()
        return loss_sum

    def _own_parts(self, group: Sequence[MicroBatch]) -> list[StepPart]:
        parts = cut(group, self.config.images_at_once, self.ranks.world)
        return parts[self.ranks.rank :: self.ranks.world]

    def _update(self, step: int) -> None:
        """The optimizer's step, in fp32 whatever the weights are kept in."""
        device = self.base.device
        if self.config.cpu_offload:
            optim.move_state(self.optimizer, device)
        draw = keyed_generator(self.config.seed, step, "rounding", device=device)
        with optim.in_fp32(self.weights, draw):
            with optim.without_waits(self.optimizer):
                self.scaler.step(self.optimizer)
            if self.config.scale_weight_norms is not None:
                self.adapter.limit_norms(self.config.scale_weight_norms)
        self.park()

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.base.device.type, enabled=self.compute == torch.float16)

    def validate(self, split: Prepared) -> float:
        """The validation loss of the adapter as it is now, without dropout."""
        self.adapter.apply_dropout()
        with self.adapter.computing(self.compute), self._autocast():
            return validation.validation_loss(self.base, self.config, split)

    def _losses(self, batch: Batch) -> Tensor:
        """Loss of each sample (B) with its own noise and timestep."""
        noisy_BCHW = loss.add_noise(
            batch.latents_BCHW, batch.input_noise_BCHW, batch.timesteps_B, self.alphas_cumprod
        )
        with self._autocast():
            states = self._text(batch.captions) if batch.states is None else batch.states
            predicted_BCHW = self.base.predict(noisy_BCHW, batch.timesteps_B, states, batch.sizes)
        target_BCHW = batch.noise_BCHW
        if self.config.v_parameterization:
            target_BCHW = loss.velocity(
                batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B, self.alphas_cumprod
            )
        losses_B = loss.sample_losses(
            predicted_BCHW,
            target_BCHW,
            batch.timesteps_B,
            self.alphas_cumprod,
            self.config,
            masks_B1HW=batch.masks_B1HW,
            weights_alphas=self.plain_alphas,
        )
        return losses_B if batch.weights_B is None else losses_B * batch.weights_B

    def _autocast(self) -> torch.autocast:
        """Off where everything has the compute type already. Norms then return it as well, as when images are drawn
        with the LoRA, and not fp32: that is half the memory of what they keep for backward."""
        has_type = self.base.compute_dtype == self.compute and not self.adapter.needs_autocast
        is_on = self.compute != torch.float32 and not has_type
        return torch.autocast(self.base.device.type, self.compute, enabled=is_on)

    def _text(self, captions: list[str]) -> TextStates:
        if self.config.updates_text_encoder:
            return self._encode(captions)
        return self._states_of_frozen(captions).to(self.base.device)

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
