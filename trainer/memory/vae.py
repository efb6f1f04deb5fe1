"""The VAE while training, where images are encoded anew each time (random_crop, color_aug): its weights and the memory
that encoding one image takes.

Computed from its configuration, not traced: the formulas are those of diffusers' AutoencoderKL. Sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.bases import needs
from trainer.config import TrainConfig
from trainer.memory.replay import Held, Peak


def encodes_anew(config: TrainConfig) -> bool:
    """Whether the VAE stays on the GPU, because images are others each time."""
    return config.random_crop or config.color_aug


def at_least(peak: Peak, held: Held, encoding: int) -> Peak:
    """The peak of a step with the VAE: the next images are encoded one by one before the update, while what is held is
    there, and the gradients."""
    gradients = sum(held.adapter)
    needed = sum([*held.base.values(), *held.adapter, *held.state]) + gradients + encoding
    if needed <= peak.allocated:
        return peak
    return replace(
        peak,
        allocated=needed,
        reserved=max(peak.reserved, needed),
        activations=encoding,
        gradients=gradients,
        workspace=0,
    )


def weight_bytes(config: TrainConfig, vae: Mapping[str, Any], compute: str) -> int:
    """The VAE's weights; ``compute`` is torch's name of the dtype of computation."""
    return _element(config, compute) * parameters(vae)


def encode_bytes(
    config: TrainConfig, vae: Mapping[str, Any], bucket_px: tuple[int, int], compute: str
) -> int:
    """Activations while one image is encoded."""
    return needs.encode_bytes(vae, *bucket_px, _element(config, compute))


def parameters(vae: Mapping[str, Any]) -> int:
    """Parameters of the VAE: residual blocks of an encoder and a decoder, one attention block in the middle of each,
    and the convolutions around the latents."""
    widths = [int(width) for width in vae["block_out_channels"]]
    blocks, latent = int(vae.get("layers_per_block", 1)), int(vae.get("latent_channels", 4))
    colours = int(vae.get("in_channels", 3))
    first, last = widths[0], widths[-1]
    encoder = _conv(colours, first) + _blocks(widths, first, blocks) + _middle(last, vae) + 2 * last
    encoder += _conv(last, 2 * latent)
    decoder = _conv(latent, last) + _middle(last, vae) + _blocks(widths[::-1], last, blocks + 1) + 2 * first
    decoder += _conv(first, colours)
    return encoder + decoder + _conv(2 * latent, 2 * latent, 1) + _conv(latent, latent, 1)


def _blocks(widths: list[int], given: int, each: int) -> int:
    """Residual blocks, ``each`` on every level, with a convolution that changes the size after all but the last."""
    count = 0
    for place, width in enumerate(widths):
        count += _residual(given, width) + (each - 1) * _residual(width, width)
        count += _conv(width, width) if place < len(widths) - 1 else 0
        given = width
    return count


def _middle(width: int, vae: Mapping[str, Any]) -> int:
    attention = 2 * width + 4 * _conv(width, width, 1) if vae.get("mid_block_add_attention", True) else 0
    return 2 * _residual(width, width) + attention


def _residual(given: int, made: int) -> int:
    shortcut = _conv(given, made, 1) if given != made else 0
    return 2 * given + _conv(given, made) + 2 * made + _conv(made, made) + shortcut


def _conv(given: int, made: int, side: int = 3) -> int:
    return given * made * side * side + made


def _element(config: TrainConfig, compute: str) -> int:
    return 4 if config.no_half_vae or compute == "float32" else 2
