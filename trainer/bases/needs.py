"""Needs: the memory that a base's networks take while they compute without gradients.

Owns three formulas on the configurations of the networks. They stand for the traced peaks of diffusers' AutoencoderKL
and UNet2DConditionModel (``tests/unit/trainer/memory/test_phases.py`` compares them), workspace of convolutions
included, so that nothing has to be traced at a time when a card waits. Sizes in bytes, images in px.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.card import SPARE_BYTES
from trainer.oom import CUDA_CONTEXT_BYTES

SAFE_SHARE = 15.5 / 16  # assumed: 0.5 of 16 GB stays free
ADAPTER_BYTES = (
    1_900_000_000  # a LoRA of rank 128 on SDXL's U-Net and text encoders in fp32 (counted: 1.82 GB)
)
# Assumed: with 16 images of 512² (4 of 1024²) a card of 16 GB is busy. More at once are no faster, and a stop waits
# for the chunk. Larger cards are faster: in proportion to their memory.
CARD_CELLS, CARD_BYTES = 16 * 64 * 64, 16e9
MAX_BATCH = 32
ALONE_FROM_PX = 512 * 512  # assumed: on a card, more images of this size at once are no faster in a VAE
SMALLEST_TILE_PX, TILE_STEP_PX = 256, 64
# Tensors of the first block at full size that exist at the peak, counted from traces:
DECODE_TENSORS = 9.6  # of the VAE's decoder, with the copies that a convolution makes
ENCODE_TENSORS = 6.1  # of its encoder
DENOISE_TENSORS = 28.0  # of the U-Net, with its skip connections: 27.0 in SD1.5, 22.3 in SDXL, under autocast


def encode_bytes(vae: Mapping[str, Any], width_px: int, height_px: int, element_bytes: int) -> int:
    """One image through the VAE's encoder. ``vae``: its configuration."""
    return round(ENCODE_TENSORS * _first(vae) * width_px * height_px * element_bytes)


def decode_bytes(vae: Mapping[str, Any], width_px: int, height_px: int, element_bytes: int) -> int:
    """One image through the VAE's decoder. ``vae``: its configuration."""
    return round(DECODE_TENSORS * _first(vae) * width_px * height_px * element_bytes)


def denoise_bytes(unet: Mapping[str, Any], latent_cells: int, rows: int, element_bytes: int) -> int:
    """One call of the U-Net. ``rows``: two for each guided image; ``latent_cells``: of one image."""
    return round(DENOISE_TENSORS * _first(unet) * latent_cells * rows * element_bytes)


def text_bytes(encoder: Mapping[str, Any], rows: int, element_bytes: int) -> int:
    """One call of a CLIP text encoder that hands out the states of every layer; twelve tensors inside a layer."""
    width, length = int(encoder["hidden_size"]), int(encoder.get("max_position_embeddings", 77))
    return (int(encoder["num_hidden_layers"]) + 12) * rows * length * width * element_bytes


def _first(config: Mapping[str, Any]) -> int:
    return int(config["block_out_channels"][0])


def work_space(card_bytes: int, held_bytes: int) -> int:
    """Bytes for work on a card of this size that holds so many bytes and nothing else."""
    return max(0, round(card_bytes * SAFE_SHARE) - CUDA_CONTEXT_BYTES - SPARE_BYTES - held_bytes)


def drawn_at_once(
    unet: Mapping[str, Any], cells: int, unet_bytes: int, element_bytes: int, card_bytes: int
) -> int:
    """Images per chunk on a card, for images of ``cells`` latent cells with guidance. It depends on the memory that
    the card has, not on what is free: the same card always uses the same chunks, so stored ones can be reused."""
    each = denoise_bytes(unet, cells, 2, element_bytes)
    fitting = work_space(card_bytes, unet_bytes + ADAPTER_BYTES) // max(1, each)
    busy = int(CARD_CELLS * max(1.0, card_bytes / CARD_BYTES)) // cells
    return max(1, min(MAX_BATCH, busy, fitting))


def decoded_at_once(count: int, width_px: int, height_px: int) -> int:
    """Images that a card decodes at once: one large image fills it, more at once only take memory."""
    return min(max(1, count), max(1, ALONE_FROM_PX // (width_px * height_px)))


def tile_px(whole_bytes: int, width_px: int, height_px: int, space: int) -> int | None:
    """The side of a tile that fits where an image does not; None where the whole image fits, or is no larger."""
    if whole_bytes <= space or max(width_px, height_px) <= SMALLEST_TILE_PX:
        return None
    side = max(width_px, height_px)
    while side > SMALLEST_TILE_PX:
        side = max(SMALLEST_TILE_PX, side // 2 // TILE_STEP_PX * TILE_STEP_PX)
        if tile_bytes(whole_bytes, width_px, height_px, side) <= space:
            break
    return side


def tile_bytes(whole_bytes: int, width_px: int, height_px: int, side_px: int) -> int:
    """What one tile needs, of what the whole image would."""
    return whole_bytes * min(side_px, width_px) * min(side_px, height_px) // (width_px * height_px)
