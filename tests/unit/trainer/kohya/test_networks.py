"""network_module and network_args in the words of sd-scripts and LyCORIS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.kohya.read import KohyaFile, read_kohya

LYCORIS = 'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_alpha = 4\n'


def read(folder: Path, text: str) -> KohyaFile:
    path = folder / "k.toml"
    path.write_text('pretrained_model_name_or_path = "mini-sd15"\nresolution = 64\nseed = 1\n' + text)
    return read_kohya(path)


def lycoris(folder: Path, *arguments: str, more: str = "") -> KohyaFile:
    return read(folder, f"{LYCORIS}{more}network_args = {list(arguments)!r}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # kohya_ss always writes conv_dim and conv_alpha
        (
            ["preset=attn-mlp", "algo=locon", "conv_dim=8", "conv_alpha=1"],
            {"network_type": "LoRA", "conv_dim": None, "lycoris_preset": ""},
        ),
        (["algo=locon", "preset=attn-mlp"], {"network_type": "LoRA", "lycoris_preset": ""}),
        (["algo=loha", "conv_dim=0", "conv_alpha=0"], {"conv_dim": 0, "lycoris_preset": "full"}),
        (["algo=loha", "conv_dim="], {"conv_dim": 8, "conv_alpha": 4.0}),
        (["algo=loha", "conv_dim=2", "conv_alpha=0"], {"conv_dim": 2, "conv_alpha": 2.0}),
        (["algo=loha", "preset=unet-only"], {"lycoris_preset": "unet-only", "network_type": "LoHa"}),
        (["algo=lokr", "full_matrix=True", "factor=8"], {"full_matrix": True, "factor": 8}),
        (["algo=lokr", "decompose_both=True"], {"decompose_both": True}),
        (["algo=lokr", "decompose_both=False"], {"decompose_both": False}),
        (["algo=lokr", "use_cp=True"], {"use_tucker": True}),
        (["algo=locon", "use_tucker=False", "use_scalar=True"], {"use_tucker": False, "use_scalar": True}),
        (["algo=locon", "rs_lora=True", "train_norm=True"], {"rs_lora": True, "train_norm": True}),
        (["algo=full"], {"network_type": "Full", "lycoris_preset": "full"}),
        (["algo=ia3"], {"network_type": "IA3"}),
        (["algo=diag-oft", "constraint=0.01", "rescaled=True"], {"constraint": 0.01, "rescaled": True}),
        (["algo=boft", "constrain=0.01"], {"network_type": "BOFT", "constraint": 0.01}),
        (['algo="glora"'], {"network_type": "GLoRA"}),
        (['algo="dylora"', "block_size=2"], {"network_type": "DyLoRA", "unit": 2}),
        (["algo=locon", "rank_dropout=0.25"], {"rank_dropout": 0.25, "rank_dropout_rows": True}),
        (["algo=locon", "dropout=0.25"], {"network_dropout": 0.0}),
        (["algo=locon", "dropout=0.25", "bypass_mode=True"], {"network_dropout": 0.25}),
    ],
)
def test_an_argument_of_lycoris_means_the_same_here(
    tmp_path: Path, arguments: list[str], expected: dict[str, Any]
) -> None:
    config = lycoris(tmp_path, *arguments).require_all().config
    assert {name: getattr(config, name) for name in expected} == expected


def test_lokr_takes_ten_thousand_as_full_matrices(tmp_path: Path) -> None:
    text = LYCORIS.replace("network_dim = 8", "network_dim = 10000")
    config = read(tmp_path, text + 'network_args = ["algo=lokr", "factor=8"]').require_all().config
    assert (config.network_type, config.network_dim, config.conv_dim) == ("LoKr", 10000, 10000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["algo=loha", "dropout=0.1"], "network_args dropout = 0.1: LyCORIS has none for LoHa"),
        (
            ["algo=locon", "dropout=0.1"],
            "network_args dropout = 0.1: LyCORIS applies it with bypass_mode only",
        ),
        (["preset=attn-mlp", "conv_dim=8"], "network_args conv_dim = 8: preset = attn-mlp trains no 3×3"),
        (
            ["algo=locon", "rank_dropout_scale=True"],
            "network_args rank_dropout_scale = true: LyCORIS does not",
        ),
        (["algo=ia3", "train_on_input=True"], "network_args train_on_input = true: LyCORIS does not read it"),
        (["algo=locon", "con_dim=8"], "network_args con_dim = 8: did you mean conv_dim?"),
        (["algo=locon", "block_dims=1"], "network_args block_dims = 1: lycoris.kohya does not read it"),
    ],
)
def test_what_lycoris_ignores_has_no_effect_and_is_said(
    tmp_path: Path, arguments: list[str], line: str
) -> None:
    file = lycoris(tmp_path, *arguments).require_all()
    assert any(said.startswith(line) for said in file.without_effect), file.without_effect


def test_network_dropout_of_loha_is_a_line_and_no_error(tmp_path: Path) -> None:
    file = lycoris(tmp_path, "algo=loha", more="network_dropout = 0.1\n").require_all()
    assert file.config.network_dropout == 0.0
    assert "network_dropout = 0.1: LyCORIS has none for LoHa" in file.without_effect


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dora_wd=True"], "dora_wd: the norm of W + ΔW is a constant of the gradient"),
        (["algo=lokr", "decompose_both=False"], "network_args decompose_both = False: off here"),
        (["algo=full"], "algo = full: weight decay"),
        (["algo=dylora"], "algo = dylora: scaled by"),
        (["algo=ia3", "preset=ia3"], "network_args preset = ia3: the modules that end in"),
    ],
)
def test_what_differs_on_purpose_is_said(tmp_path: Path, arguments: list[str], line: str) -> None:
    assert any(said.startswith(line) for said in lycoris(tmp_path, *arguments).require_all().differs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'network_module = "networks.loha"\nnetwork_dim = 8\nnetwork_args = ["conv_dim=4", "use_tucker=True"]',
            {"network_type": "LoHa", "conv_dim": 4, "conv_alpha": 1.0, "use_tucker": True},
        ),
        (
            'network_module = "networks.lokr"\nnetwork_dim = 8\nnetwork_args = ["factor=4", "rank_dropout=0.1"]',
            {"network_type": "LoKr", "factor": 4, "rank_dropout": 0.1, "rank_dropout_rows": False},
        ),
        ('network_module = "networks.lora_fa"', {"network_type": "LoRA-FA"}),
        (
            'network_module = "networks.dylora"\nnetwork_dim = 8\nnetwork_args = ["unit=4", "conv_dim=8"]',
            {"network_type": "DyLoRA", "unit": 4, "conv_dim": 8, "conv_alpha": 1.0},
        ),
        (
            'network_module = "networks.oft"\nnetwork_dim = 4\nnetwork_alpha = 0.001',
            {
                "network_type": "OFT",
                "oft_blocks": True,
                "constraint": 0.001,
                "lycoris_preset": "attn-only",
                "network_train_unet_only": True,
            },
        ),
        (
            'network_args = ["block_dims=1,2,3", "conv_block_dims=4,5,6"]',
            {"block_dims": "1,2,3", "conv_block_dims": "4,5,6"},
        ),
        ('network_args = ["conv_block_dims=4,5,6"]', {"conv_block_dims": ""}),
        ("network_args = ['conv_dim=\"8\"', 'conv_alpha=\"2\"']", {"conv_dim": 8, "conv_alpha": 2.0}),
        (
            'base_weights = ["a.safetensors", "b.safetensors"]\nbase_weights_multiplier = [1.0, 0.5]',
            {"base_weights": "a.safetensors;b.safetensors", "base_weights_multiplier": "1.0,0.5"},
        ),
        (
            'network_weights = "a.safetensors"\ndim_from_weights = true',
            {"dim_from_weights": True, "network_weights": "a.safetensors"},
        ),
    ],
)
def test_network_modules_of_sd_scripts(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    config = read(tmp_path, text).require_all().config
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_module_for_another_model_is_named_as_that(tmp_path: Path) -> None:
    (line,) = read(tmp_path, 'network_module = "networks.lora_flux"').refused
    assert line == "network_module = networks.lora_flux: it is for another model than SD1.5 and SDXL"


def test_an_unknown_argument_of_networks_lora_is_said_with_what_it_meant(tmp_path: Path) -> None:
    file = read(tmp_path, 'network_args = ["conv_dims=8", "algo=lokr"]').require_all()
    assert "network_args conv_dims = 8: did you mean conv_dim?" in file.without_effect
    assert any(line.startswith("network_args algo = lokr: ") for line in file.without_effect)
