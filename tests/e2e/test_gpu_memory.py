"""On a real card: the peak of the dry step is what `hpo plan` predicts, for full-size SDXL with random
weights that were loaded there, with an image and a caption encoded before it – as in a run."""

import pytest
import torch

from hpo.train.placement import Place
from tests.fullsize import random_base
from tests.tiny import in_type, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases.base import Sizes
from trainer.config import TrainConfig
from trainer.data.buckets import Bucket
from trainer.errors import OutOfMemory
from trainer.events import Rehearsed
from trainer.loop.loop import Conduct, train
from trainer.memory.footprint import base_facts, predict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STACKS = {
    "checkpointing": {"gradient_checkpointing": True},
    "full bf16, checkpointing": {"gradient_checkpointing": True, "full_bf16": True},
    "fp8 base, checkpointing": {"gradient_checkpointing": True, "fp8_base": True},
    "no checkpointing": {},
}


@pytest.mark.parametrize("values", STACKS.values(), ids=STACKS)
def test_the_prediction_is_within_8_percent_of_the_card(values):
    base = random_base("sdxl")
    config = TrainConfig(
        resolution=1024,
        enable_bucket=False,
        train_batch_size=1,
        network_dim=32,
        network_train_unet_only=True,
        mixed_precision="bf16",
        max_train_steps=1,
        **values,
    )
    in_type(base, torch.bfloat16)
    base.to("cuda")
    place = Place(base)
    place.prepare(config)
    with torch.no_grad():
        base.encode_images(torch.zeros(1, 3, 1024, 1024), [torch.Generator().manual_seed(0)])
    prepared = tiny_prepared(base, config, images=1)
    for key in prepared.latents:
        prepared.latents[key] = torch.randn(4, 128, 128)
        prepared.sizes[key] = Sizes((1024, 1024), (0, 0), (1024, 1024))
        prepared.buckets[key] = Bucket(1024, 1024)
    adapter = inject(base, config)
    place.settle(config, prepared)
    try:
        event = next(train(config, base, adapter, prepared, Conduct(rehearse=True)))
    except OutOfMemory:
        pytest.skip("this card is too small for it")
    finally:
        adapter.remove()
        base.free()
    assert isinstance(event, Rehearsed) and event.peak_bytes is not None
    predicted = predict(config, base_facts("sdxl"), bucket_px=(1024, 1024)).peak_bytes
    assert event.peak_bytes == pytest.approx(predicted, rel=0.08)
