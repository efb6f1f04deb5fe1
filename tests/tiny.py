"""Tiny random bases of both families, in diffusers' own classes: built in well under a second, no files.

``tiny_base("sd15")`` and ``tiny_base("sdxl")`` have every kind of block of the real ones.  With
``full_structure`` they also have every module of the real ones (192 + 72, 722 + 72 + 192 LoRA targets), only
narrow. ``tiny_prepared`` stands for a prepared dataset: random latents, no image files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.bases.base import Base, Parts, Sizes
from trainer.bases.sd15 import SD15
from trainer.bases.sdxl import SDXL
from trainer.config import TrainConfig
from trainer.data.cache import Prepared
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import assign_buckets

TEXT_WIDTH = 16
PROJECTION = 8
TIME_IDS_WIDTH = 4
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A real CLIPTokenizer whose words are single characters: 514 entries, no merges."""
    letters = [chr(code) for code in range(256)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad_token)


def tiny_text_config(layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=PROJECTION,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def tiny_vae() -> AutoencoderKL:
    """Factor 8, four latent channels."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
    )


LOUDER = 2.0**15  # fp16 ends at 65,504


def make_vae_overflow(vae: AutoencoderKL) -> None:
    """Scale what flows between the blocks of encoder and decoder. Every block, and the last layers, begin with a
    group norm, which removes the factor: in fp32 the VAE computes what it did before; in fp16 it overflows."""
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            ends = [half.conv_in]
            for module in half.modules():
                if type(module).__name__ == "ResnetBlock2D":
                    ends.append(module.conv2)
                    if module.conv_shortcut is not None:
                        module.conv_shortcut.bias.mul_(LOUDER)
                elif type(module).__name__ == "Attention":
                    ends.append(module.to_out[0])
                elif type(module).__name__ in ("Upsample2D", "Downsample2D"):
                    module.conv.bias.mul_(LOUDER)
            for layer in ends:
                layer.weight.mul_(LOUDER)
                layer.bias.mul_(LOUDER)


def tiny_sd15_unet(full_structure: bool) -> UNet2DConditionModel:
    attentive = 3 if full_structure else 1
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32, 32) if full_structure else (8, 16),
        layers_per_block=2 if full_structure else 1,
        down_block_types=(*("CrossAttnDownBlock2D",) * attentive, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * attentive),
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
    )


def tiny_sdxl_unet(full_structure: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 32) if full_structure else (8, 16, 16),
        layers_per_block=2 if full_structure else 1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10) if full_structure else (1, 1, 2),
        attention_head_dim=(2, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_IDS_WIDTH + PROJECTION,
        norm_num_groups=4,
    )


def tiny_base(family: str = "sd15", *, seed: int = 0, full_structure: bool = False) -> Base:
    """A random base of a family: 64 px (sd15) or 128 px (sdxl), fp32, CPU.  The global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "sd15":
            encoder = CLIPTextModel(tiny_text_config(12 if full_structure else 2, "quick_gelu"))
            parts = Parts(
                tiny_sd15_unet(full_structure), tiny_vae(), (encoder,), (tiny_tokenizer(),), SCHEDULER
            )
            return SD15("tiny-sd15", f"tiny-sd15-{seed}-{full_structure}", parts)
        encoders = (
            CLIPTextModel(tiny_text_config(12 if full_structure else 2, "quick_gelu")),
            CLIPTextModelWithProjection(tiny_text_config(32 if full_structure else 3, "gelu")),
        )
        tokenizers = (tiny_tokenizer(), tiny_tokenizer(pad_token="!"))
        vae = tiny_vae()
        vae.register_to_config(scaling_factor=0.13025)
        parts = Parts(tiny_sdxl_unet(full_structure), vae, encoders, tokenizers, SCHEDULER)
        return SDXL("tiny-sdxl", f"tiny-sdxl-{seed}-{full_structure}", parts)


def in_type(base: Base, kind: torch.dtype) -> Base:
    """The base with all of its networks in a number type, as if it had been loaded in it."""
    for module in base.modules():
        torch.nn.Module.to(module, kind)  # diffusers' own ``to`` warns of every cast
    base.compute_dtype = kind
    return base


def tiny_pipeline(base: Base) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline around the same networks: the reference of parity tests."""
    shared = {"vae": base.vae, "unet": base.unet, "scheduler": DDIMScheduler(**SCHEDULER)}
    if base.family == "sd15":
        return StableDiffusionPipeline(
            **shared,
            text_encoder=base.text_encoders[0],
            tokenizer=base.tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **shared,
        text_encoder=base.text_encoders[0],
        text_encoder_2=base.text_encoders[1],
        tokenizer=base.tokenizers[0],
        tokenizer_2=base.tokenizers[1],
        add_watermarker=False,
    )


def save_folder(base: Base, folder: Path) -> Path:
    """Write a base as the diffusers folder that ``load_base`` reads."""
    tiny_pipeline(base).save_pretrained(str(folder), safe_serialization=True)
    return folder


def tiny_config(**values: object) -> TrainConfig:
    """Settings for the tiny bases: 64 px, rank 2, AdamW."""
    settings = {
        "resolution": 64,
        "network_dim": 2,
        "network_alpha": 2,
        "optimizer_type": "AdamW",
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "train_batch_size": 2,
        "max_train_epochs": 2,
        "enable_bucket": False,
    }
    return TrainConfig(**(settings | values))


def tiny_prepared(base: Base, config: TrainConfig, images: int = 4, repeats: int = 1) -> Prepared:
    """A dataset of random latents at 64 px."""
    items = tuple(
        Item(Path(f"image_{n}.png"), f"a photo of sks, number {n}", repeats, 64, 64, f"{n:064x}")
        for n in range(images)
    )
    generator = torch.Generator().manual_seed(5)
    latents = {item.sha256: torch.randn(4, 8, 8, generator=generator) / base.latent_scale for item in items}
    sizes = {item.sha256: Sizes((64, 64), (0, 0), (64, 64)) for item in items}
    dataset = Dataset(Path("tiny"), items, "sks", "thing")
    with torch.no_grad():
        states = {item.caption: base.encode_text([item.caption]) for item in items}
    return Prepared(dataset, assign_buckets(items, config), latents, sizes, states)
