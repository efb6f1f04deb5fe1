"""The base of one run of ``hpo train``: loaded for the run's settings, in 8 bits if asked.

Each network is on the card only when it is needed (``trainer.card``): after the images and captions are encoded, the
VAE and the text encoders leave it and come back only for samples. With random_crop or color_aug the VAE stays: images
are encoded anew each time.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.adapters import merge_base_weights
from trainer.bases import Base, compute_type, load_base
from trainer.compute import fp8
from trainer.config import TrainConfig
from trainer.data import Dataset, Prepared, preflight


def load(config: TrainConfig, data: Dataset, device: str, say: Callable[[str], None]) -> Base:
    """Load the base on its device. Unsupported settings are refused, ignored ones are reported."""
    spec = config.pretrained_model_name_or_path
    say(f"loading {spec} on {device} …")
    base = load_base(
        spec,
        device=device,
        dtype=compute_type("bf16" if config.full_bf16 else config.mixed_precision, device),
        no_half_vae=config.no_half_vae,
        settings=config,
        say=say,
    )
    merge_base_weights(base, config, say)
    preflight.check(
        base, config.with_values({"fp8_base": False})
    )  # its weights go to 8 bits in ``Place.prepare``
    for note in preflight.notes(base, config, data):
        say(f"note: {note}")
    return base


class Place:
    """The base of a run, and what of it is kept in 8 bits. Which network is on the card: ``trainer.card``."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.device = base.device

    def prepare(self, config: TrainConfig) -> None:
        """Before an adapter is injected: the U-Net in 8 bits if asked."""
        if config.fp8_base and not fp8.holds_fp8(self.base.unet):
            fp8.convert(self.base.unet)

    def settle(self, config: TrainConfig, prepared: Prepared) -> None:
        """After encoding: text encoders that are still needed but not trained are kept in 8 bits as well."""
        done = prepared.states is not None
        if config.fp8_base and not done and not config.trains_text_encoder:
            for encoder in self.base.text_encoders:
                if not fp8.holds_fp8(encoder):
                    fp8.convert(encoder)
