"""The base of one run of ``hpo train``: loaded for the run's settings, in 8 bits if asked, with each network
on the device only when needed.

After the images and captions are encoded, the VAE and the text encoders move to RAM and come back only for samples.
With random_crop or color_aug the VAE stays: images are encoded anew each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from trainer.adapters import merge_base_weights
from trainer.bases import Base, compute_type, load_base
from trainer.compute import fp8
from trainer.config import TrainConfig
from trainer.data import Dataset, Prepared, preflight
from trainer.oom import release


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
    """Which device each network of a base is on while one LoRA is trained."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.device = base.device
        self._away: list[nn.Module] = []

    def prepare(self, config: TrainConfig) -> None:
        """Before an adapter is injected: everything on the device, the U-Net in 8 bits if asked."""
        self._bring()
        if config.fp8_base and not fp8.holds_fp8(self.base.unet):
            fp8.convert(self.base.unet)

    def settle(self, config: TrainConfig, prepared: Prepared) -> None:
        """After encoding: networks that training does not need leave the device. Text encoders that are still
        needed but not trained are kept in 8 bits as well, or run on the CPU with cpu_offload."""
        done = prepared.states is not None
        if config.fp8_base and not done and not config.trains_text_encoder:
            for encoder in self.base.text_encoders:
                if not fp8.holds_fp8(encoder):
                    fp8.convert(encoder)
        self._away = [] if prepared.encodes_anew else [self.base.vae]
        if done or (config.cpu_offload and not config.updates_text_encoder):
            self._away += self.base.text_encoders
        self._send()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Everything on the device while samples are drawn."""
        away = self._away
        self._bring()
        try:
            yield
        finally:
            self._away = away
            self._send()

    def _bring(self) -> None:
        for network in self._away:
            nn.Module.to(network, self.device)
        self._away = []

    def _send(self) -> None:
        for network in self._away:
            nn.Module.to(network, "cpu")
        release(self.device)
