"""Batches: what a part of a step is computed from – drawn and stacked on the CPU, and sent to the device ahead of time.

Owns the random numbers of a sample, from a generator keyed by (seed, epoch, image, occurrence), and the copies to the
device: on a GPU from pinned memory, without waiting, while the part before is still computed. Does not own what is
computed with them (``stepper``).

Shapes: B batch, C latent channels, h w latent sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.adapters import keyed_generator
from trainer.bases import Base, Sizes, TextStates, onto
from trainer.config import TrainConfig
from trainer.data import START, Item, Moment, Prepared, caption_for
from trainer.loop import loss


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
class Batch:
    """The numbers of a part, on the device. ``input_noise_BCHW`` is ``noise_BCHW`` itself where both are the same.
    ``states``: of cached captions. ``masks_B1HW`` and ``weights_B`` weigh the loss; None: by 1."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    input_noise_BCHW: Tensor
    timesteps_B: Tensor
    sizes: list[Sizes]
    captions: list[str]
    states: TextStates | None
    masks_B1HW: Tensor | None
    weights_B: Tensor | None


class Batches:
    """Makes the batches of a run. ``ahead`` starts one, ``take`` returns it."""

    def __init__(
        self, config: TrainConfig, base: Base, prepared: Prepared, steps: range, begun: Moment = START
    ) -> None:
        self.now = begun
        self._config = config
        self._base = base
        self._prepared = prepared
        self._steps = steps
        self._made: tuple[object, Batch] | None = None

    def take(self, part: StepPart, epoch: int, step: int) -> Batch:
        """The batch of a part of a step, made now if it was not ahead."""
        made, self._made = self._made, None
        if made is not None and made[0] == _key(part, epoch, step):
            return made[1]
        return self._make(part.samples, epoch, step)

    def ahead(self, part: StepPart, epoch: int, step: int) -> None:
        """Make the batch of the part that comes next, while the device computes. Nothing to gain on a CPU."""
        if self._base.device.type != "cuda":
            return
        self._made = None
        with contextlib.suppress(Exception):  # ``take`` makes it again, and raises in the step that it is for
            self._made = _key(part, epoch, step), self._make(part.samples, epoch, step)

    def forget(self) -> None:
        """Drop what was made ahead."""
        self._made = None

    def _make(self, micro: MicroBatch, epoch: int, step: int) -> Batch:
        config, prepared, base = self._config, self._prepared, self._base
        now, device = replace(self.now, step=step), base.device
        views = [prepared.view(base, s.item, config, epoch, s.occurrence) for s in micro]
        latents = [view.latent.float() * base.latent_scale for view in views]
        draws = [self._draw(sample, latent, epoch) for sample, latent in zip(micro, latents, strict=True)]
        captions = [caption_for(s.item, config, epoch, s.occurrence, now) for s in micro]
        states = None if config.updates_text_encoder else prepared.text(captions)
        masks_B1HW, weights_B = _masks([view.mask for view in views], latents[0]), _weights(micro, config)
        noise_BCHW = onto(torch.stack([draw.noise for draw in draws]), device)
        is_same = all(draw.input_noise is draw.noise for draw in draws)
        return Batch(
            onto(torch.stack(latents), device),
            noise_BCHW,
            noise_BCHW if is_same else onto(torch.stack([draw.input_noise for draw in draws]), device),
            onto(torch.stack([draw.timestep for draw in draws]), device),
            [Sizes(*view.sizes) for view in views],
            captions,
            None if states is None else states.to(device),
            None if masks_B1HW is None else onto(masks_B1HW, device),
            None if weights_B is None else onto(weights_B, device),
        )

    def _draw(self, sample: Sample, latent_CHW: Tensor, epoch: int) -> Draw:
        """What is drawn for a sample in an epoch, on CPU.  ``latent_CHW`` is scaled."""
        config = self._config
        generator = keyed_generator(config.seed, epoch, sample.item.sha256, sample.occurrence)
        timestep = torch.randint(self._steps.start, self._steps.stop, (), generator=generator)
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


def _key(part: StepPart, epoch: int, step: int) -> object:
    return epoch, step, part.number, part.start, [(s.item.sha256, s.occurrence) for s in part.samples]


def _masks(masks: Sequence[Tensor | None], latent_CHW: Tensor) -> Tensor | None:
    """Weights of the loss (B, 1, h, w), 1 where an image has none; None if none of them has any."""
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(latent_CHW.shape[1:])
    return torch.stack([whole if mask is None else mask for mask in masks])[:, None]


def _weights(micro: MicroBatch, config: TrainConfig) -> Tensor | None:
    """What each sample's loss is multiplied by (B): prior_loss_weight for regularisation images."""
    if config.prior_loss_weight == 1.0 or not any(sample.item.is_reg for sample in micro):
        return None
    return torch.tensor([config.prior_loss_weight if sample.item.is_reg else 1.0 for sample in micro])
