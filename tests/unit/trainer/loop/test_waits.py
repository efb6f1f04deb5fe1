"""How often a training step waits for the GPU, counted on the pretend card."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.pretendcard import pretend_card
from tests.tiny import in_type, tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.loop.loop import train

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "text encoder trained": ("sd15", {"network_dropout": 0.1}),
    "U-Net only, accumulated": (
        "sdxl",
        {"network_train_unet_only": True, "gradient_accumulation_steps": 2, "train_batch_size": 1},
    ),
    "checkpointing, rank dropout": ("sd15", {"gradient_checkpointing": True, "rank_dropout": 0.2}),
    "OFT": ("sd15", {"network_type": "OFT", "network_dim": 2, "network_train_unet_only": True}),
    "8-bit": ("sd15", {"optimizer_type": "AdamW8bit", "network_train_unet_only": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once_for_its_loss_and_norm(case: str) -> None:
    family, values = CASES[case]
    with pretend_card() as card:
        base = tiny_base(family)
        in_type(base, torch.bfloat16)
        base.to("cuda")
        config = tiny_config(mixed_precision="bf16", max_train_epochs=4, **values)
        adapter = inject(base, config)
        prepared = tiny_prepared(base, config)
        if config.trains_text_encoder:
            prepared = dataclasses.replace(prepared, states=None)
        steps = train(config, base, adapter, prepared)
        next(steps)
        next(steps)
        with card.count() as counts:
            next(steps)
        steps.close()
    assert [place.rpartition(" in ")[2] for place in map(str, counts.syncs)] == ["_make_update"]
    assert counts.to_card_bytes > 0
