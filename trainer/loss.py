"""The diffusion loss: one function per formula, with its source.

Shapes: B batch, C latent channels, h w latent sides.  ᾱ is ``alphas_cumprod`` (T,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(
    latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε (DDPM, arXiv 2006.11239 eq. 4)."""
    alpha_B111 = alphas_cumprod[timesteps_B].view(-1, 1, 1, 1)
    return alpha_B111.sqrt() * latents_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW


def offset_noise(noise_BCHW: Tensor, draw_BC11: Tensor, noise_offset: float) -> Tensor:
    """Noise with a random brightness per channel; the offset noise is also the target (sd-scripts;
    crosslabs.org "Diffusion with Offset Noise")."""
    return noise_BCHW + noise_offset * draw_BC11


def min_snr_weight(timesteps_B: Tensor, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """min(SNR, γ) / SNR for ε-prediction, SNR = ᾱ / (1 − ᾱ) (arXiv 2303.09556 eq. 5)."""
    alpha_B = alphas_cumprod[timesteps_B]
    snr_B = alpha_B / (1 - alpha_B)
    return snr_B.clamp(max=gamma) / snr_B


def sample_losses(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod: Tensor,
    min_snr_gamma: float | None,
) -> Tensor:
    """Loss of each sample (B), fp32: squared error averaged over C, h, w, times its timestep weight."""
    squared = torch.nn.functional.mse_loss(predicted_BCHW.float(), target_BCHW.float(), reduction="none")
    loss_B = squared.mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        loss_B = loss_B * min_snr_weight(timesteps_B, alphas_cumprod, min_snr_gamma)
    return loss_B
