"""Predicted against measured memory on a CUDA card: full-size SDXL with random weights, the real loop.  Needs
a GPU; the checks without one are in tests/unit/trainer/memory/test_footprint.py."""

import gc
from pathlib import Path

import pytest
import torch

from hpo.cli.plantable import ADAPTER_ROWS
from trainer.adapters.adapter import inject
from trainer.bases.base import Sizes, TextStates
from trainer.compute import fp8
from trainer.data.cache import Prepared
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import assign_buckets
from trainer.loop import loop
from trainer.memory import footprint, networks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

TOLERANCE = 0.08  # assumed
CELLS = [(row, batch) for row in ADAPTER_ROWS for batch in row.measured_gb]


def random_sdxl(is_fp8):
    """The U-Net on the GPU in bf16, without VAE and text encoders, as in a run with cached states."""
    base = networks.meta_base(footprint.base_facts("sdxl"))
    base.unet.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in base.unet.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.001)
    if is_fp8:
        fp8.convert(base.unet)
    base.unet.to("cuda")
    base.compute_dtype = torch.bfloat16
    return base


def random_images(base, config, count):
    """A prepared dataset of random latents and text states."""
    side_px = config.resolution
    items = tuple(
        Item(Path(f"{n}.png"), f"image {n}", 1, side_px, side_px, f"{n:064x}") for n in range(count)
    )
    cells = side_px // base.latent_factor_px
    latents = {item.sha256: torch.randn(4, cells, cells) for item in items}
    sizes = {item.sha256: Sizes((side_px, side_px), (0, 0), (side_px, side_px)) for item in items}
    states = {item.caption: TextStates(torch.randn(1, 77, 2048), torch.randn(1, 1280)) for item in items}
    data = Dataset(Path("random"), items, "sks", "thing")
    return Prepared(data, assign_buckets(items, config), latents, sizes, states)


@pytest.mark.parametrize(("row", "batch"), CELLS, ids=[f"{row.name} × {batch}" for row, batch in CELLS])
def test_the_predicted_peak_is_within_8_percent_of_the_measured_one(row, batch):
    config = row.config(batch).with_values({"max_train_steps": 3, "max_train_epochs": None})
    predicted = footprint.predict(config, footprint.base_facts("sdxl"))
    if torch.cuda.mem_get_info()[0] < predicted.peak_bytes * (1 + TOLERANCE):
        pytest.skip(f"needs {predicted.peak_bytes / 1e9:.1f} GB")
    base = random_sdxl(config.fp8_base)
    adapter = inject(base, config)
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in loop.train(config, base, adapter, random_images(base, config, 3 * batch)):
            pass
        measured = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    finally:
        adapter.remove()
        base.free()
    assert predicted.allocated_bytes == pytest.approx(measured[0], rel=TOLERANCE)
    assert predicted.reserved_bytes == pytest.approx(measured[1], rel=TOLERANCE)
