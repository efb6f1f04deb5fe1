"""network_module and network_args in the words of sd-scripts and LyCORIS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.adapters import preset_of
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.kohya import export
from trainer.kohya.read import KohyaFile, from_kohya, read_kohya

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
            'network_module = "networks.dylora"\nnetwork_dim = 8\nnetwork_alpha = 4\n'
            'network_args = ["unit=4", "conv_dim=8", "conv_alpha=2"]',
            {"network_type": "DyLoRA", "unit": 4, "conv_dim": 8, "conv_alpha": 4.0},
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


@pytest.mark.parametrize(
    ("module", "instead"),
    [
        ("networks.lora_flux", "it is for FLUX; for SD1.5 and SDXL use networks.lora"),
        ("networks.lora_sd3", "it is for Stable Diffusion 3; for SD1.5 and SDXL use networks.lora"),
        ("networks.oft_flux", "it is for FLUX; for SD1.5 and SDXL use networks.lora"),
        ("networks.control_net_lllite", "it trains a ControlNet and no LoRA; for a LoRA use networks.lora"),
        (
            "locon.locon_kohya",
            'it became part of LyCORIS; use lycoris.kohya with network_args = ["algo=locon"]',
        ),
        ("lycoris.locon", "use lycoris.kohya"),
        ("networks.lorafa", "did you mean networks.lora_fa?"),
        (
            "my.own",
            "use networks.lora; supported: networks.lora, networks.loha, networks.lokr, networks.lora_fa, "
            "networks.dylora, networks.oft, lycoris.kohya",
        ),
    ],
)
def test_a_module_that_is_not_supported_is_one_finding_with_what_to_use_instead(
    tmp_path: Path, module: str, instead: str
) -> None:
    text = f'network_module = "{module}"\nnetwork_args = ["conv_dim=4", "algo=abc"]'
    (line,) = read(tmp_path, text).refused
    assert line == f"network_module = {module}: {instead}"


def test_network_type_decides_in_place_of_a_module_that_is_not_supported(tmp_path: Path) -> None:
    table = {
        "pretrained_model_name_or_path": "mini-sd15",
        "network_module": "networks.lora_flux",
        "network_args": ["train_blocks=all"],
        "network_dim": 8,
    }
    file = from_kohya(tmp_path / "k.toml", table, ours={"network_type": "LoHa"}).require_all()
    assert (file.config.network_type, file.config.network_dim) == ("LoHa", 8)
    (line,) = [line for line in file.translated if line.startswith("network_module")]
    assert line == "network_module = networks.lora_flux → ignored, because network_type is given"
    assert (
        "network_args train_blocks = all: it is of a network_module that is not supported"
        in file.without_effect
    )


def test_an_algorithm_that_is_not_supported_is_one_finding_too(tmp_path: Path) -> None:
    (line,) = lycoris(tmp_path, "algo=abba", "conv_dim=4").refused
    assert line.startswith("network_args algo = abba: ")


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("networks.lora_fa", ["loraplus_lr_ratio=16"], "loraplus_lr_ratio = 16: networks.lora_fa does not"),
        ("networks.loha", ["block_dims=4"], "block_dims = 4: networks.loha does not read it"),
        ("networks.lokr", ["down_lr_weight=sine"], "down_lr_weight = sine: networks.lokr does not read it"),
        (
            "lycoris.kohya",
            ["algo=dylora", "loraplus_lr_ratio=16"],
            "loraplus_lr_ratio = 16: LyCORIS raises the rate of lora_up only, which its dylora does not have",
        ),
        ("lycoris.kohya", ["algo=loha", "loraplus_unet_lr_ratio=2"], "loraplus_unet_lr_ratio = 2: LyCORIS"),
    ],
)
def test_what_a_network_module_does_not_read_has_no_effect_here_either(
    tmp_path: Path, module: str, arguments: list[str], line: str
) -> None:
    text = f'network_module = "{module}"\nnetwork_dim = 8\nnetwork_args = {arguments!r}'
    file = read(tmp_path, text).require_all()
    assert any(said.startswith(f"network_args {line}") for said in file.without_effect), file.without_effect
    config = file.config
    assert (config.uses_loraplus, config.block_dims, config.down_lr_weight) == (False, "", "")


def test_lora_plus_of_sd_scripts_own_loha_is_refused_unless_it_is_decided(tmp_path: Path) -> None:
    """networks/network_base.py raises the rate of hada_w2_a and lokr_w1."""
    text = 'network_module = "networks.loha"\nnetwork_args = ["loraplus_lr_ratio=16"]'
    (line,) = read(tmp_path, text).refused
    assert line.startswith("network_args loraplus_lr_ratio = 16: networks.loha raises the rate of hada_w2_a")


def test_a_dylora_whose_convolutions_have_another_rank_is_refused_as_sd_scripts_does(tmp_path: Path) -> None:
    (line,) = read(tmp_path, 'network_module = "networks.dylora"\nnetwork_args = ["conv_dim=8"]').refused
    assert line == "network_args conv_dim = 8: networks.dylora wants that of network_dim, 4"


def test_an_oft_that_cannot_turn_is_refused(tmp_path: Path) -> None:
    """networks/oft.py limits the rotation to alpha · outputs."""
    (line,) = read(tmp_path, 'network_module = "networks.oft"\nnetwork_alpha = 0').refused
    assert line == "network_alpha = 0: networks.oft trains nothing with it; use 0.001"


def test_an_unknown_argument_of_networks_lora_is_said_with_what_it_meant(tmp_path: Path) -> None:
    file = read(tmp_path, 'network_args = ["conv_dims=8", "algo=lokr"]').require_all()
    assert "network_args conv_dims = 8: did you mean conv_dim?" in file.without_effect
    assert any(line.startswith("network_args algo = lokr: ") for line in file.without_effect)


def test_files_of_the_network_are_exported_as_sd_scripts_reads_them(tmp_path: Path) -> None:
    (tmp_path / "1_zed man").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "1_zed man" / "a.png")
    files, preset = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "p.toml"
    config = TrainConfig(
        train_data_dir=str(tmp_path),
        base_weights=";".join(map(str, files)),
        base_weights_multiplier="0.5",
        network_type="LoHa",
        lycoris_preset=str(preset),
    )
    found = export.to_kohya(config, "sd15", "sd15", tmp_path / "out").config
    assert found["base_weights"] == [str(file) for file in files]
    assert found["base_weights_multiplier"] == [0.5, 1.0]
    assert f"preset={preset}" in found["network_args"]
    again = from_kohya(tmp_path / "config.toml", dict(found)).require_all().config
    assert again.base_weights == config.base_weights and again.lycoris_preset == str(preset)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('unet_target_name = ["*.to_k"]', "not a regular expression"),
        ('[module_algo_map.CrossAttention]\nalgo = "loha"', "module_algo_map"),
        ("enable_conv = 1", "not true or false"),
        ("unet_target_nam = []", "unknown key"),
    ],
)
def test_a_preset_file_that_cannot_be_meant_is_an_error(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        preset_of(str(tmp_path / "p.toml"))
    (tmp_path / "p.toml").write_text('unet_target_name = ["*.to_k"]\nuse_fnmatch = true')
    assert preset_of(str(tmp_path / "p.toml")).use_fnmatch


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "1_zed man").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "1_zed man" / "a.png")
    return tmp_path


OFT = {"network_type": "OFT", "oft_blocks": True, "network_train_unet_only": True, "constraint": 0.5}
NETWORKS = [
    {**OFT, "network_dim": 4, "lycoris_preset": "attn-only"},
    {**OFT, "network_dim": 4},
    {**OFT, "network_dim": 4, "conv_dim": 4},
    {"network_type": "DyLoRA", "network_dim": 8, "unit": 4},
    {"network_type": "DyLoRA", "network_dim": 8, "unit": 2, "train_norm": True},
    {"network_type": "DyLoRA", "network_dim": 8, "lycoris_preset": "attn-only", "rs_lora": False},
    {"network_type": "LoHa", "rank_dropout": 0.1, "rank_dropout_rows": True, "lycoris_preset": "unet-only"},
]


@pytest.mark.parametrize("values", NETWORKS, ids=str)
def test_every_network_reads_back_as_itself(images: Path, values: dict[str, Any]) -> None:
    config = TrainConfig(train_data_dir=str(images), **values)
    found = export.to_kohya(config, "sd15", "sd15", images / "out")
    again = from_kohya(images / "k.toml", dict(found.config)).require_all().config
    assert {name: getattr(again, name) for name in values} == values


@pytest.mark.parametrize(
    "values",
    [
        {**OFT, "constraint": 0.0},
        {**OFT, "rescaled": True},
        {**OFT, "network_train_unet_only": False},
        {"network_type": "LoRA-FA", "train_norm": True},
        {"network_type": "LoRA-FA", "lycoris_preset": "full"},
    ],
    ids=str,
)
def test_a_network_that_sd_scripts_does_not_have_is_not_exported_as_another(
    images: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"networks\.(oft|lora_fa)"):
        export.to_kohya(TrainConfig(train_data_dir=str(images), **values), "sd15", "sd15", images / "out")


def test_scaled_rank_dropout_is_said_where_lycoris_trains(images: Path) -> None:
    config = TrainConfig(train_data_dir=str(images), network_type="LoHa", rank_dropout=0.1)
    assert any(
        note.startswith("rank_dropout: LyCORIS")
        for note in export.to_kohya(config, "sd15", "sd15", images).notes
    )
