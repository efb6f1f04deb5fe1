"""The setting vae: another VAE than that of the base, in every form in which VAEs are shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.singlefile import vae_tensors
from tests.tiny import save_folder, tiny_base
from trainer.adapters.metadata import shared_settings, training_metadata
from trainer.bases.base import Base
from trainer.bases.hub import vae_files
from trainer.bases.load import load_base
from trainer.bases.vae import check_vae
from trainer.config import TrainConfig
from trainer.errors import ConfigError, MissingModel, ModelFileError
from trainer.files import sha256_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and the same base with another VAE."""
    root = tmp_path_factory.mktemp("vae")
    base = tiny_base("sd15", full_structure=True)
    plain = save_folder(base, root / "plain")
    generator = torch.Generator().manual_seed(3)
    for weight in base.vae.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return plain, save_folder(base, root / "other")


def as_ldm(other: Path, place: Path) -> str:
    tensors = vae_tensors(load_base(str(other)).vae)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "ldm.safetensors")
    return str(place / "ldm.safetensors")


def in_checkpoint(other: Path, place: Path) -> str:
    tensors = vae_tensors(load_base(str(other)).vae)
    named = {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**named, "model.diffusion_model.x": torch.zeros(1)}, place / "whole.safetensors")
    return str(place / "whole.safetensors")


def as_hub_model(other: Path, place: Path) -> str:
    """A repository in the hub's cache, as a download leaves it."""
    cached = place / "hub" / "models--someone--some-vae"
    shutil.copytree(other / "vae", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    return "someone/some-vae"


FORMS: dict[str, Callable[[Path, Path], str]] = {
    "diffusers file": lambda other, place: str(other / "vae" / "diffusion_pytorch_model.safetensors"),
    "diffusers folder": lambda other, place: str(other / "vae"),
    "folder of a model": lambda other, place: str(other),
    "ldm file": as_ldm,
    "inside a checkpoint": in_checkpoint,
    "hub id": as_hub_model,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_vae_is_used_for_encoding_and_decoding(
    form: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plain, other = folders
    config = TrainConfig(vae=FORMS[form](other, tmp_path))
    usual, wanted, base = load_base(str(plain)), load_base(str(other)), load_base(str(plain), settings=config)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = [each.decode_latents(latents)[0] for each in (usual, wanted, base)]
    assert (pixels[2] == pixels[1]).all() and not (pixels[2] == pixels[0]).all()
    assert base.latent_scale == usual.latent_scale
    assert base.identity not in (usual.identity, wanted.identity)
    assert not any(weight.requires_grad for weight in base.vae.parameters())


def test_without_a_vae_nothing_changes(folders: tuple[Path, Path]) -> None:
    plain = str(folders[0])
    assert load_base(plain).identity == load_base(plain, settings=TrainConfig()).identity


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"encoder.conv_out.weight": (32, 8, 3, 3), "quant_conv.weight": (32, 32, 1, 1)},
            "16 latent channels",
        ),
        ({"encoder.conv_out.weight": (32, 8, 3, 3)}, "16 latent channels, as SD3, FLUX"),
        ({"encoder.conv_out.weight": (8, 8, 3, 3, 3)}, "a VAE for video"),
        ({"encoder.layers.0.weight": (8, 3, 3, 3)}, "a tiny autoencoder"),
        ({"lora_unet_x.lora_down.weight": (8, 3)}, "a LoRA"),
        ({"model.diffusion_model.x": (8, 3)}, "a model without a VAE"),
        ({"x": (8, 3)}, "not a VAE of SD1.5 or SDXL"),
    ],
)
def test_a_file_that_is_something_else_is_named(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match=said):
        check_vae(str(tmp_path / "x.safetensors"))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MissingModel, match="no such file or folder"):
        check_vae("absent.safetensors")
    with pytest.raises(ModelFileError, match="has no VAE"):
        check_vae(str(tmp_path))
    with pytest.raises(ConfigError, match="Windows path"):
        check_vae("C:\\vae\\x.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(ModelFileError, match="pickle"):
        check_vae(str(tmp_path / "x.ckpt"))


def test_what_a_vae_of_the_hub_consists_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of stabilityai/sd-vae-ft-mse, of a base, and of a repository with pickles alone."""
    weights = "diffusion_pytorch_model"
    own = ["README.md", "config.json", f"{weights}.bin", f"{weights}.safetensors"]
    assert vae_files(own) == ["config.json", f"{weights}.safetensors"]
    base = ["config.json", "unet/config.json", "vae/config.json", f"vae/{weights}.fp16.safetensors"]
    assert vae_files(base) == ["vae/config.json", f"vae/{weights}.fp16.safetensors"]
    with pytest.raises(ModelFileError, match="no VAE"):
        vae_files(["config.json", f"{weights}.bin"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFileError, match="someone/absent is not on this machine"):
        check_vae("someone/absent")


def test_the_metadata_names_it_as_sd_scripts_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """ss_vae_hash: sha256 of 64 KiB from 1 MiB on, first 8 digits (sd-scripts 48d368f, train_util.model_hash)."""
    base: Base = load_base(str(folders[0]))
    path = tmp_path / "some.vae.safetensors"
    path.write_bytes(bytes(range(256)) * 8192)
    config = TrainConfig(vae=str(path))
    found = training_metadata(base, config)
    assert (found["ss_vae_name"], found["ss_vae_hash"]) == ("some.vae.safetensors", "7daca209")
    assert found["ss_new_vae_hash"] == sha256_file(path)
    assert shared_settings(config, "x")["vae"] == "some.vae.safetensors"
    hub = TrainConfig(vae="madebyollin/sdxl-vae-fp16-fix")
    assert training_metadata(base, hub)["ss_vae_name"] == hub.vae == shared_settings(hub, "x")["vae"]
    assert "ss_vae_name" not in training_metadata(base, TrainConfig())
    json.dumps(found)
