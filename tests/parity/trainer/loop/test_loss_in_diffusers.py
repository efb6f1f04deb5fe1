"""Noise and loss weights equal diffusers' own."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from tests.tiny import SCHEDULER
from trainer.bases.base import alphas_cumprod
from trainer.config import TrainConfig
from trainer.loop.loss import add_noise, min_snr_weight, sample_losses


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def test_adding_noise_is_ddpms():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
    steps = torch.randint(0, 1000, (8,), generator=generator)
    ours = add_noise(latents, noise, steps, alphas_cumprod(SCHEDULER))
    torch.testing.assert_close(ours, scheduler().add_noise(latents, noise, steps), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_formula_of_diffusers_training_scripts(gamma):
    steps = torch.arange(1000)
    snr = compute_snr(scheduler(), steps)
    reference = torch.stack([snr, gamma * torch.ones_like(steps)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(min_snr_weight(steps, alphas_cumprod(SCHEDULER), gamma), reference)


def test_the_mean_of_sample_losses_is_mse():
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    ours = sample_losses(predicted, target, torch.arange(5), alphas_cumprod(SCHEDULER), TrainConfig()).mean()
    torch.testing.assert_close(ours, torch.nn.functional.mse_loss(predicted, target))
