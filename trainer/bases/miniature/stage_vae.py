"""Stages vae and decoder: the autoencoder that both bases share (AutoencoderKL, factor 8, four latent channels).

Stage vae trains it whole. Stage decoder goes on with the decoder alone, on slightly noisy latents: the
encoder, and so every latent that the denoising networks learn from, stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.bases.miniature import wild, world
from trainer.bases.miniature.fitting import Plan, finished, fit, load_weights

PLAN = Plan("vae", steps=4800, lr=2e-3, warmup_steps=100, weight_decay=0.0, ema=0.998, muon_lr=0.02)
DECODER_PLAN = Plan(
    "decoder", steps=2000, lr=1e-3, warmup_steps=50, weight_decay=0.0, ema=0.998, muon_lr=0.012
)
DECODER_NOISE = 0.08  # of the latents' spread, assumed: what a denoising network leaves behind
BATCH = 8
OBJECT_WEIGHT = (
    10.0  # squared error where the picture differs from its ground; plain L1 left every colour brown
)
KL_WEIGHT = 1e-4  # assumed: keeps the latents smooth enough for diffusion


def new_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def picture(rng: np.random.Generator, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    if rng.random() < 0.82:
        scene = world.sample_scene(int(rng.integers(1 << 40)))
        image = world.render(scene, size_px)
        mask = world.object_mask(image, scene)
    else:
        image, mask = wild.render_creature(wild.sample_creature(rng), rng, size_px)
    if rng.random() < 0.02:
        image = wild.treat(image, rng)
    return image, mask


def to_tensor(images_BHW3: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_of_step(step: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures and the weight of each pixel: more on objects and close around them.

    Without the rim, stars and crosses grow into blobs: paint outside an object costs little there.
    """
    rng = np.random.default_rng((step, seed))
    size_px, batch = (128, BATCH // 4) if step % 6 == 5 else (64, BATCH)
    pairs = [picture(rng, size_px) for _ in range(batch)]
    x_B3HW = to_tensor(np.stack([p[0] for p in pairs])).to(device, memory_format=torch.channels_last)
    mask_B1HW = torch.from_numpy(np.stack([p[1] for p in pairs]))[:, None].to(device)
    near = F.max_pool2d(mask_B1HW.float(), 7, 1, 3)
    return x_B3HW, 1.0 + (OBJECT_WEIGHT - 1.0) * near


def build_vae(work: Path, device: str) -> AutoencoderKL:
    torch.manual_seed(11)
    vae = new_vae().to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int) -> Tensor:
        x_B3HW, weight = batch_of_step(step, 11, device)
        posterior = vae.encode(x_B3HW).latent_dist
        error = vae.decode(posterior.sample()).sample - x_B3HW
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return (weight * error.pow(2)).mean() + 0.05 * (weight * error.abs()).mean() + KL_WEIGHT * kl

    fit(PLAN, vae, loss_of_step, work)
    return finished_vae(work, device)


def build_decoder(work: Path, device: str) -> AutoencoderKL:
    vae = new_vae()
    load_weights(PLAN.name, vae, work, averaged=True)
    vae.to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    spread = 1.0 / finished_vae(work, device).config.scaling_factor

    def loss_of_step(step: int) -> Tensor:
        x_B3HW, weight = batch_of_step(step, 12, device)
        with torch.no_grad():
            z = vae.encode(x_B3HW).latent_dist.mean
            z = z + DECODER_NOISE * spread * torch.rand(len(z), 1, 1, 1, device=device) * torch.randn_like(z)
        error = vae.decode(z).sample - x_B3HW
        return (weight * error.pow(2)).mean() + 0.1 * (weight * error.abs()).mean()

    fit(DECODER_PLAN, vae, loss_of_step, work)
    return finished_vae(work, device)


@torch.no_grad()
def finished_vae(work: Path, device: str) -> AutoencoderKL:
    """The trained autoencoder with the factor that gives its latents unit variance."""
    vae = new_vae().to(device).eval().requires_grad_(False)
    load_weights(DECODER_PLAN.name if finished(DECODER_PLAN, work) else PLAN.name, vae, work, averaged=True)
    images = np.stack([world.render(world.sample_scene(10_000_000 + i)) for i in range(256)])
    latents = torch.cat(
        [vae.encode(to_tensor(images[i : i + 32]).to(device)).latent_dist.mean for i in range(0, 256, 32)]
    )
    vae.register_to_config(scaling_factor=round(float(1.0 / latents.std()), 4))
    return vae


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, size_px: int = 64) -> float:
    scenes = [world.sample_scene(20_000_000 + i) for i in range(64)]
    x = to_tensor(np.stack([world.render(s, size_px) for s in scenes])).to(vae.device)
    return float(F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample, x))
