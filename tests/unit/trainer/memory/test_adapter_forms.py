"""The planner knows the sizes of every type of adapter."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.adapters import count_weights
from trainer.config import TrainConfig
from trainer.memory.footprint import base_facts, predict
from trainer.memory.networks import meta_base


@pytest.mark.parametrize(
    "values",
    [
        {"network_type": "Full", "lycoris_preset": "full"},
        {"network_type": "LoKr", "network_dim": 10000, "conv_dim": 0},
        {
            "network_type": "LoHa",
            "network_dim": 4,
            "lycoris_preset": "full",
            "use_tucker": True,
            "train_norm": True,
        },
        {"network_type": "DyLoRA", "network_dim": 8, "unit": 4},
        {"network_type": "LoRA", "network_dim": 8, "lycoris_preset": "unet-only"},
    ],
)
def test_the_bytes_of_an_adapter_are_those_of_its_weights(values: dict[str, Any]) -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="mini-sd15", resolution=64, optimizer_type="AdamW", **values
    )
    facts = base_facts("mini-sd15")
    parts = predict(config, facts).parts
    count = count_weights(meta_base(facts), config)
    assert parts["adapter"] == 4 * count
    assert parts["optimizer state"] == 8 * count


def test_lora_fa_holds_weights_that_it_does_not_train() -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="mini-sd15",
        resolution=64,
        optimizer_type="AdamW",
        network_type="LoRA-FA",
        network_dim=8,
    )
    facts = base_facts("mini-sd15")
    parts = predict(config, facts).parts
    trained = count_weights(meta_base(facts), config)
    whole = count_weights(meta_base(facts), config.with_values({"network_type": "LoRA"}))
    assert (parts["adapter"], parts["optimizer state"]) == (4 * whole, 8 * trained)
