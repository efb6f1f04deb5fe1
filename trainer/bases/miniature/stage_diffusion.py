"""Stages sd15 and sdxl: the two denoising networks, on pre-encoded latents, with frozen text encoders.

Array legend: B batch, L tokens, D text width, C latent channels, h w latent size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.bases.miniature import captions, stage_clip, stage_text, world
from trainer.bases.miniature.fitting import Plan, fit, load_weights, save_atomic
from trainer.bases.miniature.stage_vae import finished_vae, to_tensor

SD15_PX, SDXL_PX = 64, 128
SD15_PLAN = Plan("sd15", steps=4000, lr=1e-3, warmup_steps=100, ema=0.998, muon_lr=0.01)
SD15_FIGURES_PLAN = Plan("sd15-figures", steps=2200, lr=5e-4, warmup_steps=50, ema=0.998, muon_lr=0.006)
SDXL_PLAN = Plan("sdxl", steps=3600, lr=1e-3, warmup_steps=100, ema=0.998, muon_lr=0.01)
SDXL_LAST_PLAN = Plan("sdxl-last", steps=700, lr=5e-4, warmup_steps=30, ema=0.995, muon_lr=0.005)
SDXL_WORDS_PLAN = Plan("sdxl-words", steps=1400, lr=5e-4, warmup_steps=50, ema=0.997, muon_lr=0.005)
FIGURES_SHARES = {"single": 0.4, "pair": 0.15, "figure": 0.45}  # figures have the most to say
SDXL_SHARES = {"single": 0.6, "pair": 0.1, "figure": 0.3}
BATCHES = {SD15_PX: 32, SDXL_PX: 24}
POOLS = {SD15_PX: 16_000, SDXL_PX: 8_000}
DROPOUT = 0.12  # share of captions dropped, for classifier-free guidance
SNR_GAMMA = 5.0  # min-SNR-gamma, arXiv 2303.09556
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class Conditioning:
    """What the network is told: token states, and for sdxl the pooled projection."""

    text_BLD: Tensor
    pooled_BE: Tensor | None = None


Encode = Callable[[list[str]], Conditioning]


def new_sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SD15_PX // 8,
        layers_per_block=1,
        block_out_channels=(64, 112, 112),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=stage_text.WIDTH_1,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SDXL_PX // 8,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + stage_text.EMBED,
        cross_attention_dim=stage_text.WIDTH_1 + stage_text.WIDTH_2,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
    )


def text_encoders(work: Path) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    towers = stage_clip.load_towers(stage_clip.TEXT_PLAN, work)
    first = stage_text.text_encoder_from_open_clip(towers.clip.state_dict(), towers.tokenizer)
    return first.requires_grad_(False), towers.text_2.eval().requires_grad_(False)


def sd15_encode(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: str) -> Encode:
    @torch.no_grad()
    def encode(captions: list[str]) -> Conditioning:
        return Conditioning(encoder(stage_text.token_ids(tokenizer, captions).to(device)).last_hidden_state)

    return encode


def sdxl_encode(
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    device: str,
) -> Encode:
    """As SDXL: the last but one states of both encoders without final norm, and the second's projection.

    Gradients reach an encoder whose weights require them.
    """

    def encode(captions: list[str]) -> Conditioning:
        outs = [
            encoder(stage_text.token_ids(tokenizer, captions).to(device), output_hidden_states=True)
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        ]
        text_BLD = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        return Conditioning(text_BLD, outs[1].text_embeds)

    return encode


def tokenizer_2() -> CLIPTokenizer:
    """SDXL's second tokenizer pads with "!"."""
    return stage_text.new_tokenizer(pad_token="!")


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, size_px: int, work: Path, device: str) -> Tensor:
    """Scaled latents of the pool's scenes, made once and kept beside the checkpoints."""
    path = work / f"latents-{size_px}.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    chunks = []
    for start in range(0, POOLS[size_px], 50):
        images = np.stack([world.render(world.sample_scene(i), size_px) for i in range(start, start + 50)])
        chunks.append(
            (vae.encode(to_tensor(images).to(device)).latent_dist.mean * vae.config.scaling_factor).cpu()
        )
    latents = torch.cat(chunks)
    save_atomic({"latents": latents}, path, {"size_px": str(size_px)})
    return latents


def train_unet(
    plan: Plan,
    unet: UNet2DConditionModel,
    latents_NChw: Tensor,
    encode: Encode,
    work: Path,
    device: str,
    size_px: int,
    shares: dict[str, float] | None = None,
    trained: nn.Module | None = None,
) -> None:
    """Train on the pool's scenes; ``shares`` draws their kinds so often, else as the world has them.

    ``trained`` holds the network and what is trained along with it (default: the network alone).
    """
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2  # type: ignore[operator]
    alphas = torch.cumprod(1 - betas, 0).to(device)
    snr = alphas / (1 - alphas)
    weight_T = snr.clamp(max=SNR_GAMMA) / snr
    scenes = [world.sample_scene(i) for i in range(len(latents_NChw))]
    latents_NChw = latents_NChw.to(device)
    batch = BATCHES[size_px]
    of_kind = {kind: np.array([i for i, s in enumerate(scenes) if s.kind == kind]) for kind in shares or ()}

    def drawn(rng: np.random.Generator) -> np.ndarray:
        if shares is None:
            return rng.integers(0, len(scenes), batch)
        kinds = rng.choice(list(shares), batch, p=list(shares.values()))
        return np.array([rng.choice(of_kind[kind]) for kind in kinds])

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng((step, 51 if shares is None else 52))
        index = drawn(rng)
        said = [
            captions.caption(scenes[i], int(rng.integers(1 << 30)), complete=bool(rng.random() < 0.4))
            for i in index
        ]
        dropped = rng.random(batch) < DROPOUT
        cond = encode(["" if drop else text for text, drop in zip(said, dropped, strict=True)])
        clean = latents_NChw[torch.from_numpy(index).to(device)]
        noise = torch.randn(clean.shape).to(device)
        t = torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch * 1000).long().to(device)
        a = alphas[t][:, None, None, None]
        extra: dict[str, dict[str, Tensor]] = {}
        text_BLD = cond.text_BLD
        if cond.pooled_BE is not None:
            # Half of the dropped captions are zeros, as SDXL's pipeline does it; half are the empty caption.
            zero = torch.from_numpy(dropped & (rng.random(batch) < 0.5)).to(device)
            text_BLD = text_BLD.masked_fill(zero[:, None, None], 0.0)
            ids = np.tile([size_px, size_px, 0, 0, size_px, size_px], (batch, 1))
            odd = rng.random(batch) < 0.25  # other original sizes and crops: the picture is the same
            ids[odd, :4] = np.concatenate(
                [rng.integers(64, 513, (batch, 2)), rng.integers(0, 65, (batch, 2))], 1
            )[odd]
            pooled_BE = cond.pooled_BE.masked_fill(zero[:, None], 0.0)
            time_ids = torch.from_numpy(ids).float().to(device)
            extra = {"added_cond_kwargs": {"text_embeds": pooled_BE, "time_ids": time_ids}}
        predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, text_BLD, **extra).sample
        return (weight_T[t] * (predicted - noise).pow(2).mean((1, 2, 3))).mean()

    fit(plan, unet if trained is None else trained, loss_of_step, work)


def sd15_pipeline(work: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline around this network, in full precision on the CPU."""
    return StableDiffusionPipeline(
        vae=finished_vae(work, "cpu"),
        text_encoder=text_encoders(work)[0],
        tokenizer=stage_text.new_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(
    work: Path, unet: UNet2DConditionModel, second: CLIPTextModelWithProjection
) -> StableDiffusionXLPipeline:
    first, _ = text_encoders(work)
    return StableDiffusionXLPipeline(
        vae=finished_vae(work, "cpu"),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=stage_text.new_tokenizer(),
        tokenizer_2=tokenizer_2(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def save_pipeline(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path) -> None:
    """fp16 safetensors in diffusers' folder layout, without a trace of where it was built."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and "_name_or_path" in config:
            del config["_name_or_path"]
            path.write_text(json.dumps(config, indent=2) + "\n")


def build_sd15(work: Path, weights: Path, device: str) -> None:
    latents = latent_pool(finished_vae(work, device), SD15_PX, work, device)
    encode = sd15_encode(stage_text.new_tokenizer(), text_encoders(work)[0].to(device), device)
    torch.manual_seed(51)
    unet = new_sd15_unet().to(device)
    train_unet(SD15_PLAN, unet, latents, encode, work, device, SD15_PX)
    train_unet(SD15_FIGURES_PLAN, unet, latents, encode, work, device, SD15_PX, FIGURES_SHARES)
    save_pipeline(sd15_pipeline(work, unet.cpu().eval()), weights / "mini-sd15")


def build_sdxl(work: Path, weights: Path, device: str) -> None:
    latents = latent_pool(finished_vae(work, device), SDXL_PX, work, device)
    first, second = text_encoders(work)
    tokenizers = (stage_text.new_tokenizer(), tokenizer_2())
    encode = sdxl_encode(tokenizers, (first.to(device), second.to(device)), device)
    torch.manual_seed(61)
    unet = new_sdxl_unet().to(device)
    train_unet(SDXL_PLAN, unet, latents, encode, work, device, SDXL_PX)
    train_unet(SDXL_LAST_PLAN, unet, latents, encode, work, device, SDXL_PX, SDXL_SHARES)
    # The contrastive states of "square" lie close beside those of "circle"; the second encoder learns to part them.
    both = nn.ModuleDict({"unet": unet, "text_encoder_2": second.requires_grad_(True)})
    train_unet(SDXL_WORDS_PLAN, unet, latents, encode, work, device, SDXL_PX, SDXL_SHARES, both)
    save_pipeline(sdxl_pipeline(work, unet.cpu().eval(), second.cpu().eval()), weights / "mini-sdxl")


def trained_unet(plan: Plan, unet: UNet2DConditionModel, work: Path) -> UNet2DConditionModel:
    """The averaged weights of a running or finished training, to look at."""
    load_weights(plan.name, unet, work, averaged=True)
    return unet.eval()
