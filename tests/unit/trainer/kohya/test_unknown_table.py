"""The table of keys that sd-scripts does not know."""

from __future__ import annotations

import re

from trainer.kohya.keys import KNOWN_KEYS
from trainer.kohya.unknown import UNKNOWN_MEANT, meaning


def test_no_key_of_sd_scripts_is_called_unknown() -> None:
    assert not set(UNKNOWN_MEANT) & KNOWN_KEYS


def test_a_meaning_that_names_a_setting_names_one_that_exists() -> None:
    named = {key: re.match(r"is (\w+_\w+)", text) for key, text in UNKNOWN_MEANT.items()}
    wrong = {
        key: found[1]
        for key, found in named.items()
        if found and found[1] not in KNOWN_KEYS and "_args" not in UNKNOWN_MEANT[key]
        if not re.search(r"of (a subset|the subset)", UNKNOWN_MEANT[key])
    }
    assert not wrong


def test_frequent_keys_are_explained() -> None:
    assert "network_args" in meaning("conv_dim", 8)
    assert "base" in meaning("sdxl", True)
    assert "lr_scheduler_num_cycles" in meaning("lr_restart_cycles", 3)
    assert "network_train_unet_only" in meaning("train_text_encoder", False)
