"""load_base(): a name, hub id, diffusers folder or single .safetensors → Base.

Steps: find the files, detect the family from headers and configurations, check the name and shape of every
tensor against the networks in the configurations, and only then read weights. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.bases import assumed, detect
from trainer.bases.base import Base, Parts, compute_type
from trainer.bases.clipbpe import clip_tokenizer
from trainer.bases.detect import short_name as short_name
from trainer.bases.families import (
    FAMILIES,
    known_base,
    published_name,
)
from trainer.bases.hub import hub_folder
from trainer.bases.networks import SHOWN_KEYS, check_tensors, empty_network, fill, present_name
from trainer.bases.sd15 import SD15
from trainer.bases.sdxl import SDXL
from trainer.bases.vae import load_vae, with_vae
from trainer.config import TrainConfig
from trainer.errors import ModelFileError, first_line
from trainer.files import sha256_file
from trainer.oom import memory_named
from trainer.tensorfile import load_tensors, read_header
from trainer.text import clean_text

CLASSES: dict[str, type[Base]] = {kind.family: kind for kind in (SD15, SDXL)}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# Keys of a configuration that describe how it was written, in addition to those that start with "_".
BOOKKEEPING = frozenset({"transformers_version", "torch_dtype", "dtype"})


def load_base(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    no_half_vae: bool = False,
    settings: TrainConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Base:
    """Load the base ``spec``, frozen, on ``device``.

    ``spec``: mini-sd15, mini-sdxl, sd15, sdxl, a hub id ``org/name``, a diffusers folder, or a single .safetensors
    in the original layout.  ``dtype``: dtype of the weights; default ``compute_type("auto", device)``. The VAE uses
    the same dtype, except that SDXL's VAE runs in fp32 instead of fp16, which overflows (sd-scripts --no_half_vae).
    ``settings`` of a run: its ``vae`` replaces that of the base, and its ``v_parameterization`` and
    ``zero_terminal_snr`` count for a base that does not say what it predicts (``assumed``).
    ``say`` gets what the base finds out about itself later, for example that another VAE overflows in fp16.
    """
    with memory_named(f"out of memory while loading {clean_text(short_name(spec))} on {device}"):
        return _loaded(spec, device, dtype, revision, no_half_vae, settings, say)


def _loaded(
    spec: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    revision: str | None,
    no_half_vae: bool,
    settings: TrainConfig | None,
    say: Callable[[str], None],
) -> Base:
    dtype = dtype or compute_type("auto", device)
    path = _locate(spec, revision)
    if path.is_dir():
        family = detect.family_of_folder(path)
        parts, weight_paths = _parts_of_folder(path, family, dtype, no_half_vae)
        configs = path
    else:
        header = read_header(path)
        family = detect.family_of_file(path, header)
        schedule = detect.schedule_of_file(header)
        parts, weight_paths = _parts_of_file(path, family, dtype, no_half_vae, schedule), {"file": path}
        configs = FAMILIES[family].configs
    known = known_base(spec)
    said = known.schedule if known is not None else assumed.assumed_schedule(assumed.said_at(path), settings)
    if said:
        parts = replace(parts, scheduler_config={**parts.scheduler_config, **said})
    identity = _identity(family, weight_paths, configs, parts)
    if settings is not None and settings.vae:
        network, digest = load_vae(settings.vae, dict(parts.vae.config), parts.vae.dtype)
        parts, identity = replace(parts, vae=network), with_vae(identity, digest)
    base = CLASSES[family](short_name(spec), identity, parts)
    base.say = say
    if known is None and said and settings is not None:
        say(assumed.assumption(base.name, None, settings))
    return base.to(device)


def _locate(spec: str, revision: str | None) -> Path:
    """The folder or file of a spec; downloads a hub model that is not cached."""
    found = detect.locate(spec)
    return found or hub_folder(published_name(spec), revision=revision, is_complete=_is_complete)


def _identity(family: str, weight_paths: Mapping[str, Path], configs: Path, parts: Parts) -> str:
    """sha256 of everything that decides what the networks compute: weights, configurations, noise schedule
    and tokenizers. It does not depend on the location; every fine-tune has its own identity."""
    facts = {"scheduler": _deciding(parts.scheduler_config)}
    for component in ("unet", "vae", *FAMILIES[family].text_encoders):
        facts[component] = _deciding(detect.read_json(configs / component / "config.json"))
    for name, tokenizer in zip(FAMILIES[family].tokenizers, parts.tokenizers, strict=True):
        facts[name] = {
            "words": tokenizer.get_vocab(),
            "merges": json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges"),
            "marks": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
            "length": tokenizer.model_max_length,
        }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, path in sorted(weight_paths.items()):
        digest.update(f"{name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that only describe where, when and by which version it was written."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in BOOKKEEPING}


# Diffusers folders


def _parts_of_folder(
    folder: Path, family: str, dtype: torch.dtype, no_half_vae: bool
) -> tuple[Parts, dict[str, Path]]:
    """All networks of a folder, checked and loaded, and their weight files."""
    networks: dict[str, Any] = {}
    weight_paths: dict[str, Path] = {}
    for component in ("unet", "vae", *FAMILIES[family].text_encoders):
        model = empty_network(component, detect.read_json(folder / component / "config.json"))
        files = component_files(folder, component)
        names = {name: shape for file in files for name, shape in read_header(file).shapes.items()}
        renamed = {present_name(model, name): name for name in names}
        check_tensors(folder / component, model, {new: names[old] for new, old in renamed.items()})
        old_names = {old: new for new, old in renamed.items()}
        wanted = _component_type(component, family, dtype, no_half_vae)
        fill(
            model,
            ((old_names[name], tensor) for file in files for name, tensor in load_tensors(file).items()),
            wanted,
        )
        networks[component] = model
        weight_paths |= {f"{component}/{file.name}": file for file in files}
    tokenizers = tuple(
        _folder_tokenizer(folder / name, networks[encoder])
        for name, encoder in zip(FAMILIES[family].tokenizers, FAMILIES[family].text_encoders, strict=True)
    )
    scheduler = detect.read_json(folder / "scheduler" / "scheduler_config.json")
    return _assembled(networks, family, tokenizers, scheduler), weight_paths


def component_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files of one network: plain before fp16, single file before shards.
    Raises ModelFileError for pickles."""
    stem = WEIGHTS[component]
    inside = folder / component
    for variant in ("", ".fp16"):
        whole = inside / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        for index in (
            inside / f"{stem}.safetensors.index{variant}.json",
            inside / f"{stem}{variant}.safetensors.index.json",
        ):
            if index.is_file():
                return _shards(index)
    if any(inside.glob("*.bin")):
        raise ModelFileError(
            f"{inside} has its weights only as a pickle (.bin), which could run arbitrary code; it was not opened",
            "download the safetensors version, or convert it in an environment you trust",
        )
    raise ModelFileError(
        f"{inside} has no weights", f"{stem}.safetensors is missing; download the model again"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = detect.read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    paths = [index.parent / name for name in names]
    bad = [path.name for path in paths if path.parent != index.parent or not path.is_file()]
    if bad or not paths:
        raise ModelFileError(
            f"{index} lists files that are missing: {', '.join(bad[:SHOWN_KEYS])}", "download it again"
        )
    return paths


def _is_complete(folder: Path) -> bool:
    """Whether a cached hub folder can be loaded without the network."""
    try:
        family = detect.family_of_folder(folder)
        for component in ("unet", "vae", *FAMILIES[family].text_encoders):
            detect.read_json(folder / component / "config.json")
            component_files(folder, component)
    except ModelFileError:
        return False
    return all(
        (folder / name / "tokenizer.json").is_file()
        or ((folder / name / "vocab.json").is_file() and (folder / name / "merges.txt").is_file())
        for name in FAMILIES[family].tokenizers
    )


def _folder_tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a folder. If the folder sets no maximum length (it is 10³⁰ then), that of
    the encoder is used."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise ModelFileError(f"{folder} is missing", "the model folder is incomplete; download it again")
    limit = int(encoder.config.max_position_embeddings)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.model_max_length = min(int(tokenizer.model_max_length), limit)
    except Exception as error:  # the library passes on any parser error
        raise ModelFileError(
            f"{folder} is not a CLIP tokenizer: {first_line(error)[:160]}", "download the model again"
        ) from None
    if not 256 <= len(tokenizer) <= encoder.config.vocab_size:
        raise ModelFileError(
            f"{folder} has {len(tokenizer)} tokens, but the text encoder has {encoder.config.vocab_size}",
            "use the tokenizer that belongs to this text encoder",
        )
    return tokenizer


# Single files in the original layout


def _parts_of_file(
    path: Path, family: str, dtype: torch.dtype, no_half_vae: bool, schedule: Mapping[str, Any]
) -> Parts:
    """All networks of a single file, converted to diffusers' names, checked and loaded with the bundled
    configurations. ``schedule`` holds the noise schedule settings of the file."""
    configs = FAMILIES[family].configs
    original = load_tensors(path)
    networks: dict[str, Any] = {}
    for component in ("unet", "vae", *FAMILIES[family].text_encoders):
        model = empty_network(component, detect.read_json(configs / component / "config.json"))
        tensors = {present_name(model, k): v for k, v in _converted(component, model, original).items()}
        check_tensors(path, model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, component)
        fill(model, tensors.items(), _component_type(component, family, dtype, no_half_vae))
        networks[component] = model
    tokenizers = tuple(
        clip_tokenizer(0 if name == "tokenizer_2" else None) for name in FAMILIES[family].tokenizers
    )
    scheduler = detect.read_json(configs / "scheduler" / "scheduler_config.json")
    return _assembled(networks, family, tokenizers, {**scheduler, **schedule})


def _converted(component: str, model: Any, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one network under diffusers' names, converted by diffusers."""
    from diffusers.loaders import single_file_utils as convert

    if component == "unet":
        part = _beginning(original, detect.UNET)
        return convert.convert_ldm_unet_checkpoint(part, dict(model.config))
    if component == "vae":
        return convert.convert_ldm_vae_checkpoint(
            _beginning(original, "first_stage_model."), dict(model.config)
        )
    if component == "text_encoder_2":
        prefix = "conditioner.embedders.1.model."
        return convert.convert_open_clip_checkpoint(model, _beginning(original, prefix), prefix=prefix)
    for prefix in convert.LDM_CLIP_PREFIX_TO_REMOVE:
        part = _beginning(original, prefix)
        if part:
            return {name.removeprefix(prefix): tensor for name, tensor in part.items()}
    return {}


def _beginning(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Networks


def _component_type(component: str, family: str, dtype: torch.dtype, no_half_vae: bool) -> torch.dtype:
    if component == "vae" and (no_half_vae or (dtype == torch.float16 and not FAMILIES[family].half_vae)):
        return torch.float32
    return dtype


def _assembled(
    networks: Mapping[str, Any], family: str, tokenizers: tuple[Any, ...], scheduler: dict[str, Any]
) -> Parts:
    return Parts(
        networks["unet"],
        networks["vae"],
        tuple(networks[name] for name in FAMILIES[family].text_encoders),
        tokenizers,
        scheduler,
    )
