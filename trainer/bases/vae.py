"""Another VAE than that of the base (setting ``vae``): a .safetensors file, a diffusers folder, or a hub id.

SD1.5 and SDXL have the same VAE architecture; the latent scale stays that of the base's family, as in sd-scripts
(library/model_util.py: load_vae). Owns finding, recognising and reading it. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.bases import detect
from trainer.bases.families import known_base, published_name
from trainer.bases.hub import hub_folder, require_network, vae_files
from trainer.errors import MissingModel, ModelFileError
from trainer.files import sha256_file
from trainer.paths import user_path
from trainer.tensorfile import load_tensors, read_header
from trainer.text import clean_text

IN_CHECKPOINT = "first_stage_model."
LATENT_CHANNELS = 4
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Tensor names (or parts of them) → what has them. The first match counts.
FOREIGN = (
    (("lora_unet_", "lora_te", "lora_A", "lora_down"), "a LoRA"),
    (("quantize.embedding",), "a VQ model"),
    (("taesd", "encoder.layers.", "decoder.layers.", "encoder.0.", "decoder.1."), "a tiny autoencoder (TAESD)"),
    (("decoder.upsamples.", "temporal", "time_stack", "decoder.head."), "a VAE for video"),
    (("model.diffusion_model.", "down_blocks.0.attentions."), "a model without a VAE"),
    (("text_model.",), "a text encoder"),
)  # fmt: skip


def locate_vae(spec: str) -> Path | None:
    """The file or the folder with config.json; None for a hub id that would have to be looked up.

    Raises MissingModel for a path or name that is nowhere, ModelFileError for a folder without a VAE.
    """
    spec = user_path(spec, "vae")
    path = Path(spec)
    if known_base(spec) is not None and not path.exists():
        found = detect.locate(spec)
        return None if found is None else _folder(found)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        read_header(path)
        return path
    if path.suffix.lower() in ENDINGS or path.is_absolute() or spec.count("/") != 1:
        raise MissingModel(
            f"vae = {clean_text(spec)[:200]}: there is no such file or folder",
            "correct the path, give a hub id such as stabilityai/sd-vae-ft-mse, or leave vae out",
        )
    return None


def _folder(folder: Path) -> Path:
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file() and any(place.glob("diffusion_pytorch_model*.safetensors")):
            return place
    raise ModelFileError(
        f"vae = {folder} has no VAE", "a VAE folder has config.json and diffusion_pytorch_model.safetensors"
    )


def _weights(folder: Path) -> Path:
    """The one weight file of a VAE folder: plain before fp16."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"), key=lambda path: len(path.name))
    return files[0]


def load_vae(spec: str, config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, str]:
    """The VAE ``spec`` as a network of the base's architecture ``config``, and the sha256 of its file.

    Raises MissingModel or ModelFileError, which names a file that is something else.
    """
    from trainer.bases import networks  # loads diffusers' loaders

    path = locate_vae(spec)
    if path is None:
        path = _folder(
            hub_folder(published_name(spec), revision=None, is_complete=_is_complete, choose=vae_files)
        )
    file = _weights(path) if path.is_dir() else path
    model = networks.empty_network("vae", dict(config))
    tensors = _tensors(file, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    networks.check_tensors(file, model, shapes, "VAE")
    networks.fill(model, tensors.items(), dtype)
    return model.requires_grad_(False).eval(), sha256_file(file)


def _is_complete(folder: Path) -> bool:
    try:
        return bool(_folder(folder))
    except ModelFileError:
        return False


def check_vae(spec: str) -> None:
    """Raise what ``load_vae`` would, as far as the names and shapes in the file tell it."""
    path = locate_vae(spec)
    if path is None:
        _check_cached(published_name(spec))
    else:
        file = _weights(path) if path.is_dir() else path
        _recognise(file, read_header(file).shapes)


def _check_cached(repo: str) -> None:
    """A VAE of the hub cannot be downloaded if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, try_to_load_from_cache

    names = ("config.json", "vae/config.json")
    is_cached = any(isinstance(try_to_load_from_cache(repo, name), str) for name in names)
    if constants.HF_HUB_OFFLINE and not is_cached:
        require_network(repo)


def _recognise(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The prefix of the VAE's tensors. Raises ModelFileError that names a file that is something else."""
    prefix = IN_CHECKPOINT if any(name.startswith(IN_CHECKPOINT) for name in shapes) else ""
    out = shapes.get(f"{prefix}encoder.conv_out.weight")
    is_flat = len(out or ()) == 4
    if (
        out is not None
        and is_flat
        and out[0] == 2 * LATENT_CHANNELS
        and f"{prefix}quant_conv.weight" in shapes
    ):
        return prefix
    if out is not None and is_flat and out[0] != 2 * LATENT_CHANNELS:
        what = f"a VAE with {out[0] // 2} latent channels, as SD3, FLUX and others have"
    elif out is not None and len(out) == 5:
        what = "a VAE for video"
    else:
        named = (what for parts, what in FOREIGN if any(part in name for part in parts for name in shapes))
        what = next(named, "not a VAE of SD1.5 or SDXL")
    raise ModelFileError(
        f"vae = {clean_text(str(file))} is {what}",
        f"SD1.5 and SDXL need a VAE with {LATENT_CHANNELS} latent channels, such as sdxl-vae-fp16-fix or "
        "vae-ft-mse-840000; or leave vae out",
    )


def _tensors(file: Path, model: Any) -> dict[str, torch.Tensor]:
    """The tensors under diffusers' names, from either layout, alone or inside a checkpoint."""
    from diffusers.loaders import single_file_utils as convert

    from trainer.bases import networks

    prefix = _recognise(file, read_header(file).shapes)
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_tensors(file).items()
        if name.startswith(prefix)
    }
    if any(name.startswith("encoder.down.") for name in found):
        original = {IN_CHECKPOINT + name: tensor for name, tensor in found.items()}
        found = convert.convert_ldm_vae_checkpoint(original, dict(model.config))
    return {networks.present_name(model, name): tensor for name, tensor in found.items()}


def with_vae(identity: str, digest: str) -> str:
    """The identity of a base with another VAE: everything that is computed or cached with it depends on both."""
    return hashlib.sha256(f"{identity} vae {digest}".encode()).hexdigest()
