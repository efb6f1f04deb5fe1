"""Noise, targets and the diffusion loss: one function per formula, with its source.

Every formula acts on samples one by one, so that a loss does not depend on how samples are batched.  Where
sd-scripts draws once per batch (offset strength, pyramid ratios), each sample draws its own here.

Shapes: B batch, C latent channels, h w latent sides, T training timesteps.  ᾱ is ``alphas_cumprod`` (T,).
SNR = ᾱ / (1 − ᾱ).  "sd-scripts" is kohya-ss/sd-scripts, library/custom_train_functions.py and train_util.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import TrainConfig

MAX_SNR = 1000.0  # sd-scripts: SNR is infinite where no noise is left


# Noise


def add_noise(
    latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (DDPM, arXiv 2006.11239 eq. 4)."""
    alpha_B111 = alphas_cumprod[timesteps_B].view(-1, 1, 1, 1)
    return alpha_B111.sqrt() * latents_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW


def velocity(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0: the target of v-prediction (arXiv 2202.00512, appendix D)."""
    alpha_B111 = alphas_cumprod[timesteps_B].view(-1, 1, 1, 1)
    return alpha_B111.sqrt() * noise_BCHW - (1 - alpha_B111).sqrt() * latents_BCHW


def offset_noise(noise_BCHW: Tensor, draw_BC11: Tensor, noise_offset: float | Tensor) -> Tensor:
    """Noise with a random brightness per channel; the offset noise is also the target (sd-scripts;
    crosslabs.org "Diffusion with Offset Noise")."""
    return noise_BCHW + noise_offset * draw_BC11


def adaptive_offset(latents_CHW: Tensor, noise_offset: float, adaptive_noise_scale: float) -> Tensor:
    """noise_offset + scale · |mean latent| of each channel (C, 1, 1), not below 0 (sd-scripts)."""
    mean_C11 = latents_CHW.mean(dim=(1, 2), keepdim=True).abs()
    return (noise_offset + adaptive_noise_scale * mean_C11).clamp(min=0.0)


def pyramid_noise(noise_CHW: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Noise plus coarser and coarser noise, level i by r^i (r from 2 to 4) and weaker by discount^i, brought
    back to unit deviation (sd-scripts; wandb.ai/johnowhitaker/multires_noise)."""
    channels, height, width = noise_CHW.shape
    total_CHW = noise_CHW.clone()
    for level in range(iterations):
        ratio = 2.0 + 2.0 * float(torch.rand((), generator=generator))
        rows, columns = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = torch.randn((1, channels, rows, columns), generator=generator)
        total_CHW += (
            functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * discount**level
        )
        if rows == 1 or columns == 1:
            break
    return total_CHW / total_CHW.std()


# Weights over timesteps


def snr(timesteps_B: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """SNR (B) of some timesteps."""
    alpha_B = alphas_cumprod[timesteps_B]
    return alpha_B / (1 - alpha_B)


def min_snr_weight(
    timesteps_B: Tensor, alphas_cumprod: Tensor, gamma: float, *, v_prediction: bool = False
) -> Tensor:
    """min(SNR, γ) / SNR for ε-prediction, min(SNR, γ) / (SNR + 1) for v (arXiv 2303.09556 eq. 5)."""
    snr_B = snr(timesteps_B, alphas_cumprod)
    return snr_B.clamp(max=gamma) / (snr_B + 1 if v_prediction else snr_B)


def debiased_weight(timesteps_B: Tensor, alphas_cumprod: Tensor, *, v_prediction: bool = False) -> Tensor:
    """1 / √SNR for ε-prediction (arXiv 2310.08442), 1 / (SNR + 1) for v (sd-scripts)."""
    snr_B = snr(timesteps_B, alphas_cumprod).clamp(max=MAX_SNR)
    return 1 / (snr_B + 1) if v_prediction else 1 / snr_B.sqrt()


def noise_like_weight(timesteps_B: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """SNR / (SNR + 1): turns v-prediction's squared error into noise prediction's (sd-scripts)."""
    snr_B = snr(timesteps_B, alphas_cumprod).clamp(max=MAX_SNR)
    return snr_B / (snr_B + 1)


def timestep_weights(timesteps_B: Tensor, alphas_cumprod: Tensor, config: TrainConfig) -> Tensor | None:
    """What each sample's loss is multiplied by (B), all weightings in sd-scripts' order; None: nothing.

    ``alphas_cumprod`` is the schedule before ``zero_terminal_snr``, as in sd-scripts: rescaled, the last
    weight would be 0 / 0.
    """
    v = config.v_parameterization
    weight_B: Tensor | None = None
    if config.min_snr_gamma is not None:
        weight_B = min_snr_weight(timesteps_B, alphas_cumprod, config.min_snr_gamma, v_prediction=v)
    if config.scale_v_pred_loss_like_noise_pred:
        factor = noise_like_weight(timesteps_B, alphas_cumprod)
        weight_B = factor if weight_B is None else weight_B * factor
    if config.v_pred_like_loss:
        factor = 1 + config.v_pred_like_loss / noise_like_weight(timesteps_B, alphas_cumprod)
        weight_B = factor if weight_B is None else weight_B * factor
    if config.debiased_estimation_loss:
        factor = debiased_weight(timesteps_B, alphas_cumprod, v_prediction=v)
        weight_B = factor if weight_B is None else weight_B * factor
    return weight_B


# The loss


def huber_threshold(timesteps_B: Tensor, alphas_cumprod: Tensor, config: TrainConfig) -> Tensor:
    """Where huber and smooth_l1 turn from squared to absolute error (B) (sd-scripts; arXiv 2403.16728).

    snr: (1 − c) / (1 + σ)² + c with σ = √(1 / SNR); exponential: scale · c^(t / T); constant: scale · c.
    """
    steps = len(alphas_cumprod)
    if config.huber_schedule == "exponential":
        rate = math.log(config.huber_c) / steps
        return torch.exp(rate * timesteps_B) * config.huber_scale
    if config.huber_schedule == "snr":
        alpha_B = alphas_cumprod[timesteps_B]
        sigma_B = ((1 - alpha_B) / alpha_B).sqrt()
        return (1 - config.huber_c) / (1 + sigma_B) ** 2 + config.huber_c
    return torch.full(timesteps_B.shape, config.huber_c * config.huber_scale, device=timesteps_B.device)


def pointwise(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod: Tensor,
    config: TrainConfig,
) -> Tensor:
    """The error of every element: l2, l1, or huber 2d(√(e² + d²) − d), smooth_l1 2(√(e² + d²) − d) with
    d from ``huber_threshold`` (sd-scripts)."""
    if config.loss_type == "l2":
        return functional.mse_loss(predicted_BCHW, target_BCHW, reduction="none")
    if config.loss_type == "l1":
        return functional.l1_loss(predicted_BCHW, target_BCHW, reduction="none")
    turn_B111 = huber_threshold(timesteps_B, alphas_cumprod, config).view(-1, 1, 1, 1)
    root_BCHW = ((predicted_BCHW - target_BCHW) ** 2 + turn_B111**2).sqrt() - turn_B111
    return 2 * turn_B111 * root_BCHW if config.loss_type == "huber" else 2 * root_BCHW


def sample_losses(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod: Tensor,
    config: TrainConfig,
    *,
    masks_B1HW: Tensor | None = None,
    weights_alphas: Tensor | None = None,
) -> Tensor:
    """Loss of each sample (B), fp32: the error averaged over C, h, w, times its timestep weight.

    ``alphas_cumprod`` is the schedule that noise was added with; ``weights_alphas`` the one before
    ``zero_terminal_snr``, where they differ.  Masks weigh the elements before the average (sd-scripts).
    """
    loss_BCHW = pointwise(predicted_BCHW.float(), target_BCHW.float(), timesteps_B, alphas_cumprod, config)
    if masks_B1HW is not None:
        loss_BCHW = loss_BCHW * masks_B1HW
    loss_B = loss_BCHW.mean(dim=(1, 2, 3))
    weight_B = timestep_weights(
        timesteps_B, alphas_cumprod if weights_alphas is None else weights_alphas, config
    )
    return loss_B if weight_B is None else loss_B * weight_B
