"""Presets of kohya_ss are read as kohya_ss itself hands them to sd-scripts.

tests/data/kohya_ss_presets.json holds presets and what kohya_ss 45088f0 wrote into config_lora-DATE.toml for each of
them, recorded by running its own ``update_my_data`` and ``train_model``:

    python -m tests.bench.write_presets OUT --kohya-ss CHECKOUT --record tests/data/kohya_ss_presets.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from trainer.kohya.frontends import recognise

CASES = json.loads((ROOT / "tests" / "data" / "kohya_ss_presets.json").read_text(encoding="utf-8"))
# Written by kohya_ss and not read by sd-scripts, or without effect on the result.
IGNORED = {
    "epoch",
    "noise_offset_type",
    "dynamo_backend",
    "max_data_loader_n_workers",
    "wandb_run_name",
    "output_name",
}
# sd-scripts' own defaults, which kohya_ss writes for fields that a preset lacks.
DEFAULTS = {
    "clip_skip": 1,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "loss_type": "l2",
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "max_grad_norm": 1.0,
    "prior_loss_weight": 1.0,
    "gradient_accumulation_steps": 1,
    "save_model_as": "safetensors",
    "sample_sampler": "euler_a",  # of sample images alone
    "lr_scheduler_args": [],
    "optimizer_args": [],
    "network_args": [],
}


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say nothing, and arguments by name with numbers as numbers."""
    found = {name: value for name, value in settings.items() if name not in IGNORED}
    found = {name: value for name, value in found.items() if DEFAULTS.get(name) != value}
    for name in ("network_args", "optimizer_args"):
        if name in found:
            found[name] = {
                key: number(value) for key, _, value in (entry.partition("=") for entry in found[name])
            }
    return found


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["preset"]["LoRA_type"])
def test_a_preset_is_read_as_kohya_ss_writes_it(case: dict[str, Any]) -> None:
    theirs = comparable(case["written"])
    ours = comparable(dict(recognise(Path("p.json"), json.dumps(case["preset"]).encode()).settings))
    if "dataset_config" in case["preset"]:  # a place of another machine
        ours.pop("dataset_config")
    # A preset without the field is older than it: kohya_ss then counted the images, and its window has 1600 today.
    if theirs.get("max_train_steps") == 1600 and "max_train_steps" not in case["preset"]:
        assert ours.pop("max_train_epochs") == 1
        del theirs["max_train_steps"]
    if "max_train_epochs" in theirs:  # epochs win in sd-scripts
        theirs.pop("max_train_steps", None)
    assert ours == theirs


def test_every_type_of_the_window_for_these_models_is_recorded() -> None:
    from trainer.kohya.frontends import kohya_ss_networks

    recorded = {case["preset"]["LoRA_type"] for case in CASES}
    assert recorded >= {*kohya_ss_networks._LYCORIS, *kohya_ss_networks._NATIVE}
