"""Which modules are trained, at which rank and alpha: sd-scripts 48d368f and LyCORIS f49d30d, executed (meta device).

Recorded with ``create_network`` of ``networks/lora.py`` (network_dim 8, network_alpha 4) and ``lycoris/kohya.py``
(network_dim 4, network_alpha 1) on sd-scripts' ``UNet2DConditionModel`` and ``SdxlUNet2DConditionModel`` and the text
encoders of transformers: counts, and sha256 of the sorted names.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest

from tests.fullsize import meta_base
from trainer.adapters.targets import Target, targets_of
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError


@cache
def base_of(family: str) -> Base:
    return meta_base(family)


def trained(family: str, **values: Any) -> list[Target]:
    return targets_of(base_of(family), TrainConfig(**values))


def counts(targets: list[Target]) -> tuple[int, int]:
    unet = sum(target.component == "unet" for target in targets)
    return unet, len(targets) - unet


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


# preset, conv_dim → (U-Net, text encoders, sha256 of the names)
PRESETS = {
    "sd15": {
        ("full", None): (282, 72, "e35566b602ec90bc"),
        ("full", 0): (230, 72, "802476f71316a957"),
        ("full-lin", None): (230, 72, "802476f71316a957"),
        ("attn-mlp", None): (192, 72, "3b0b58f74c4028ff"),
        ("attn-only", None): (128, 48, "c26708a3eeb1fdce"),
        ("unet-only", None): (282, 0, "e42284eed01d957d"),
        ("unet-only", 0): (230, 0, "8faa4395b5ec3854"),
        ("unet-transformer-only", None): (192, 0, "bdfc29d0bf3d9ac6"),
        ("unet-convblock-only", None): (88, 0, "6f4885988310b428"),
        ("unet-convblock-only", 0): (36, 0, "0fbd4b143c02a208"),
    },
    "sdxl": {
        ("full", None): (788, 264, "231dc80db7c1b20b"),
        ("full", 0): (750, 264, "5043f59d484e60e0"),
        ("full-lin", None): (750, 264, "5043f59d484e60e0"),
        ("attn-mlp", None): (722, 264, "1063b91c0a4164d0"),
        ("attn-only", None): (560, 176, "366789de0541f922"),
        ("unet-only", None): (788, 0, "6eaed2d7a4528e0a"),
        ("unet-only", 0): (750, 0, "c484ede37102c72b"),
        ("unet-transformer-only", None): (722, 0, "5d819b833e27947d"),
        ("unet-convblock-only", None): (66, 0, "c4ccfbb377487cab"),
        ("unet-convblock-only", 0): (28, 0, "1835960a0c3185af"),
    },
}


@pytest.mark.parametrize("family", PRESETS)
def test_presets_of_lycoris_train_the_same_modules(family: str) -> None:
    for (preset, conv_dim), (unet, text, names) in PRESETS[family].items():
        found = trained(family, lycoris_preset=preset, network_type="LoHa", network_dim=4, conv_dim=conv_dim)
        assert counts(found) == (unet, text), preset
        assert digest([target.key for target in found]) == names, preset


@pytest.mark.parametrize(("family", "unet"), [("sd15", 228), ("sdxl", 750)])
def test_conv_dim_0_of_networks_lora_still_trains_narrow_layers_of_resnets(family: str, unet: int) -> None:
    """There "0" is not None, so the classes of resnets are searched, and only rank 0 is skipped."""
    found = trained(family, network_dim=8, network_alpha=4, conv_dim=0)
    assert counts(found)[0] == unet and {target.rank for target in found} == {8}


def block_values(family: str) -> dict[str, str]:
    """The block settings that were recorded: ranks 0 to 4 and other alphas for each block."""
    numbers = range({"sd15": 25, "sdxl": 23}[family])
    return {
        "block_dims": ",".join(str(n % 5) for n in numbers),
        "block_alphas": ",".join(str((n % 5) / 2 + 0.5) for n in numbers),
        "conv_block_dims": ",".join(str((n + 1) % 4) for n in numbers),
        "conv_block_alphas": ",".join(str((n % 3) + 0.25) for n in numbers),
    }


# settings → family → (modules, sha256 of "name rank alpha")
BLOCKS: dict[tuple[str, ...], dict[str, tuple[int, str]]] = {
    (): {"sd15": (264, "417623ee0227d546"), "sdxl": (986, "0f7a121163987ede")},
    ("conv_dim",): {"sd15": (350, "7475d927ee669c90"), "sdxl": (1052, "81f00b65cc7d99ee")},
    ("block_dims", "block_alphas"): {
        "sd15": (240, "52f490492588d89f"),
        "sdxl": (862, "ae0ec7b929489d20"),
    },
    ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"): {
        "sd15": (308, "20bdd56d3acee6f1"),
        "sdxl": (913, "cf77251092002e09"),
    },
    ("block_dims", "conv_dim"): {"sd15": (320, "e0c8f914460e84dd"), "sdxl": (921, "60657a013eb25d52")},
    ("mid_lr_weight", "conv_block_dims", "block_alphas"): {
        "sd15": (338, "8e9bf23c7cb4d1cd"),
        "sdxl": (1041, "996e486cf7e7cc4c"),
    },
}


@pytest.mark.parametrize("names", BLOCKS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_ranks_and_alphas_of_blocks_are_those_of_sd_scripts(family: str, names: tuple[str, ...]) -> None:
    middle = {"sd15": "0.5", "sdxl": "0.5,0.5,0"}[family]
    known = block_values(family) | {"conv_dim": 4, "mid_lr_weight": middle}
    values = {name: known[name] for name in names}
    found = trained(family, network_dim=8, network_alpha=4, conv_alpha=1, **values)
    lines = [f"{target.key} {target.rank} {target.alpha:g}" for target in found]
    assert (len(found), digest(lines)) == BLOCKS[names][family]


def test_the_number_of_blocks_must_be_that_of_the_base() -> None:
    with pytest.raises(ConfigError, match="block_dims has 2 values, but this base has 23 blocks"):
        trained("sdxl", block_dims="4,8")
