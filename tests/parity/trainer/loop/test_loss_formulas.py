"""Noise, targets and weights equal their formulas, reimplemented here, and those of diffusers if available."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from tests.tiny import SCHEDULER
from trainer.bases.base import alphas_cumprod
from trainer.bases.schedule import zero_terminal_snr
from trainer.config import TrainConfig
from trainer.loop import loss

ALPHAS = alphas_cumprod(SCHEDULER)
STEPS = torch.tensor([0, 1, 50, 333, 500, 750, 998, 999])
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def config(**values) -> TrainConfig:
    return TrainConfig(**values)


def snr_of(step: int) -> float:
    alpha = float(ALPHAS[step])
    return alpha / (1 - alpha)


def by_hand(formula) -> torch.Tensor:
    return torch.tensor([formula(int(step)) for step in STEPS], dtype=torch.float32)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(len(STEPS), 4, 8, 8, generator=generator) for _ in range(2))
    return first, second


def test_the_velocity_is_ddpms():
    latents, noise = pair()
    ours = loss.velocity(latents, noise, STEPS, ALPHAS)
    torch.testing.assert_close(ours, scheduler().get_velocity(latents, noise, STEPS), rtol=0, atol=0)


def test_zero_terminal_snr_is_diffusers_rescaling():
    reference = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler().betas), dim=0)
    ours = zero_terminal_snr(ALPHAS)
    torch.testing.assert_close(ours, reference, rtol=2e-4, atol=1e-6)
    assert ours[-1] == 0.0
    assert ours[0] == pytest.approx(float(ALPHAS[0]), rel=1e-6)


def test_each_weight_is_its_formula():
    def like(step):
        return min(snr_of(step), 1000) / (min(snr_of(step), 1000) + 1)

    cases = {
        ("min_snr_gamma", 5.0, False): lambda s: min(snr_of(s), 5) / snr_of(s),
        ("min_snr_gamma", 5.0, True): lambda s: min(snr_of(s), 5) / (snr_of(s) + 1),
        ("debiased_estimation_loss", True, False): lambda s: 1 / math.sqrt(min(snr_of(s), 1000)),
        ("debiased_estimation_loss", True, True): lambda s: 1 / (min(snr_of(s), 1000) + 1),
        ("scale_v_pred_loss_like_noise_pred", True, True): like,
        ("v_pred_like_loss", 0.5, False): lambda s: 1 + 0.5 / like(s),
    }
    for (name, value, v), formula in cases.items():
        weights = loss.timestep_weights(STEPS, ALPHAS, config(**{name: value, "v_parameterization": v}))
        torch.testing.assert_close(weights, by_hand(formula), rtol=1e-4, atol=1e-7)
    assert loss.timestep_weights(STEPS, ALPHAS, config()) is None


def test_weights_multiply_and_stay_finite_with_zero_terminal_snr():
    both = config(
        min_snr_gamma=5.0,
        debiased_estimation_loss=True,
        v_parameterization=True,
        zero_terminal_snr=True,
        scale_v_pred_loss_like_noise_pred=True,
    )
    parts = [
        {"min_snr_gamma": 5.0},
        {"debiased_estimation_loss": True},
        {"scale_v_pred_loss_like_noise_pred": True},
    ]
    expected = math.prod(
        loss.timestep_weights(STEPS, ALPHAS, config(v_parameterization=True, **part)) for part in parts
    )
    torch.testing.assert_close(loss.timestep_weights(STEPS, ALPHAS, both), expected, **CLOSE)
    predicted, target = pair()
    rescaled = zero_terminal_snr(ALPHAS)
    ours = loss.sample_losses(predicted, target, STEPS, rescaled, both, weights_alphas=ALPHAS)
    assert ours.isfinite().all()


THRESHOLDS = {
    "constant": lambda step: 0.2 * 3,
    "exponential": lambda step: math.exp(-(-math.log(0.2) / 1000) * step) * 3,
    "snr": lambda step: (1 - 0.2) / (1 + math.sqrt(1 / snr_of(step))) ** 2 + 0.2,
}


@pytest.mark.parametrize("schedule", list(THRESHOLDS))
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_is_its_formula_under_every_schedule(schedule, kind):
    predicted, target = pair()
    settings = config(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=3)
    ours = loss.sample_losses(predicted, target, STEPS, ALPHAS, settings)
    turns = by_hand(THRESHOLDS[schedule])
    expected = []
    for row, turn in enumerate(turns):
        error = (predicted[row] - target[row]).double()
        value = 2 * ((error**2 + turn.double() ** 2).sqrt() - turn.double())
        expected.append((value * turn.double() if kind == "huber" else value).mean().float())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_l1_is_the_mean_distance():
    predicted, target = pair()
    ours = loss.sample_losses(predicted, target, STEPS, ALPHAS, config(loss_type="l1"))
    torch.testing.assert_close(ours, (predicted - target).abs().mean(dim=(1, 2, 3)))


def test_a_mask_weighs_elements_before_the_mean():
    predicted, target = pair()
    masks = torch.ones(len(STEPS), 1, 8, 8)
    masks[1, :, :, 4:] = 0.0
    masks[2] = 0.25
    ours = loss.sample_losses(predicted, target, STEPS, ALPHAS, config(), masks_B1HW=masks)
    plain = loss.sample_losses(predicted, target, STEPS, ALPHAS, config())
    half = (predicted[1] - target[1])[:, :, :4].square().sum() / (4 * 8 * 8)
    torch.testing.assert_close(ours, torch.stack([plain[0], half, plain[2] / 4, *plain[3:]]))


def test_an_adaptive_offset_follows_the_latents_mean_and_is_never_negative():
    latents = torch.stack([torch.full((4, 4), value) for value in (-2.0, 0.0, 1.0, 3.0)])
    up, down = (loss.adaptive_offset(latents, 0.1, scale)[:, 0, 0] for scale in (0.05, -0.05))
    torch.testing.assert_close(up, torch.tensor([0.2, 0.1, 0.15, 0.25]))
    torch.testing.assert_close(down, torch.tensor([0.0, 0.1, 0.05, 0.0]))


@pytest.mark.parametrize("shape, iterations", [((4, 16, 24), 6), ((4, 8, 8), 10), ((4, 64, 64), 3)])
def test_pyramid_noise_is_the_formula(shape, iterations):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kept = noise.clone()
    ours = loss.pyramid_noise(noise, iterations, 0.3, torch.Generator().manual_seed(2))
    draws = torch.Generator().manual_seed(2)
    upsample = torch.nn.Upsample(size=shape[1:], mode="bilinear")
    total = noise[None].clone()
    for i in range(iterations):
        r = torch.rand((), generator=draws).item() * 2 + 2
        rows, columns = max(1, int(shape[1] / r**i)), max(1, int(shape[2] / r**i))
        total += upsample(torch.randn(1, shape[0], rows, columns, generator=draws)) * 0.3**i
        if rows == 1 or columns == 1:
            break
    torch.testing.assert_close(ours, (total / total.std())[0])
    assert torch.equal(noise, kept)
    assert ours.std() == pytest.approx(1.0, abs=1e-5)
