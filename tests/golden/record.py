"""The golden training: a few steps of mini-sd15 on drawn images, and the losses it gave when they were recorded.

    python -m tests.golden.record      writes tests/golden/mini_sd15_losses.json anew

Do that only when the arithmetic of training is meant to change, and say why in the commit: every trial of
every study is compared with numbers that this arithmetic made.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.adapters.adapter import inject
from trainer.bases.base import Base
from trainer.bases.load import load_base
from trainer.config import TrainConfig
from trainer.data import cache
from trainer.data.dataset import read_dataset
from trainer.events import Step
from trainer.loop import loop

FILE = Path(__file__).with_name("mini_sd15_losses.json")
SETTINGS: dict[str, Any] = {
    "resolution": 64,
    "min_bucket_reso": 32,
    "bucket_reso_steps": 32,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "text_encoder_lr": 5e-4,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "network_dim": 4,
    "network_alpha": 2,
    "conv_dim": 2,
    "network_type": "LoCon",
    "min_snr_gamma": 5,
    "noise_offset": 0.05,
    "shuffle_caption": True,
    "seed": 7,
}
IMAGES = 8


def draw(folder: Path) -> Path:
    """Images and captions in whole numbers only: the same bytes of pixels everywhere."""
    place = folder / "1_zed figure"
    place.mkdir(parents=True)
    rows, columns = np.mgrid[0:64, 0:64]
    for number in range(IMAGES):
        planes = [(rows * (number + 1) + columns * (3 * channel + 2)) % 256 for channel in range(3)]
        Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"zed figure, number {number}, red, blue")
    return folder


def golden_losses(base: Base, folder: Path) -> list[float]:
    """The loss of each step, on CPU with one thread."""
    config = TrainConfig(**SETTINGS)
    data = read_dataset(folder, config)
    adapter = inject(base, config)
    try:
        prepared = cache.prepare(base, data, config)
        events = loop.train(config, base, adapter, prepared)
        return [event.loss for event in events if isinstance(event, Step)]
    finally:
        adapter.remove()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = golden_losses(load_base("mini-sd15"), draw(Path(folder) / "images"))
    facts = {
        "settings": SETTINGS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "losses": losses,
    }
    FILE.write_text(json.dumps(facts, indent=1) + "\n")
    print("\n".join(f"{loss:.9g}" for loss in losses))


if __name__ == "__main__":
    main()
