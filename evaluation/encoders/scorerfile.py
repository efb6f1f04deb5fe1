"""The weights file of a scorer: finding it, offline first, and refusing files that do not fit.

Owns open_clip's tags, the hub cache and what can be read from file names and tensor names. Does not own
the networks; see ``evaluation.encoders.embed``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import snapshot_download, try_to_load_from_cache
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

from trainer.bases import require_network, without_login
from trainer.errors import MissingModel, ModelFileError
from trainer.reading import read_small
from trainer.tensorfile import read_header

TAGS_SHOWN = 8
MAX_JSON_BYTES = 1_000_000  # configurations have a few kB


def check_safetensors(path: Path, *, transformers: bool = False) -> list[str]:
    """Names of the tensors. Raises ModelFileError if the file is missing, truncated, a pickle, or in the transformers
    layout (unless ``transformers`` is set)."""
    if not path.is_file():
        raise MissingModel(f"{path} does not exist", "give the path of the scorer's weights")
    keys = list(read_header(path).shapes)
    if not transformers and any(key.startswith("vision_model.") for key in keys):
        raise ModelFileError(
            f"{path} is in the transformers layout, which open_clip cannot read",
            "download the open_clip file (open_clip_model.safetensors) of the same model",
        )
    return keys


def tag_in_name(model: str, path: Path) -> str | None:
    """The tag in the name of a file or its folder. The tag determines mean, std and activation."""
    name = f"{path.parent.name}/{path.name}".lower().replace("-", "_")
    tags = [
        tag for twin in _twins(model) for tag in list_pretrained_tags_by_model(twin) if tag.lower() in name
    ]
    return max(tags, key=len, default=None)


def tag_of_sha(model: str, sha: str) -> str | None:
    """The tag of a file by its sha256, whatever its name: OpenAI's download URLs contain the sha256."""
    for twin in _twins(model):
        for tag in list_pretrained_tags_by_model(twin):
            if f"/{sha}/" in get_pretrained_cfg(twin, tag).get("url", ""):
                return tag
    return None


def facts_of_tag(model: str, tag: str) -> dict[str, Any]:
    """open_clip's settings for a tag (mean, std, resizing, activation), from the model or its
    twin; empty if unknown."""
    return next((facts for twin in _twins(model) if (facts := get_pretrained_cfg(twin, tag))), {})


def _twins(model: str) -> tuple[str, str]:
    """The model, and its variant with the other activation (which may not exist)."""
    plain = model.removesuffix("-quickgelu")
    return (model, plain if model != plain else plain + "-quickgelu")


def check_quick_gelu(model: str, tag: str | None, weights: str) -> None:
    """Raise ModelFileError if weights and model differ in QuickGELU. open_clip loads a file with the wrong
    activation without a warning, and the scores are wrong (mlfoundations/open_clip issues 771 and 915)."""
    if tag is None:
        return
    twin = _twins(model)[1]
    has = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    if bool(facts_of_tag(model, tag).get("quick_gelu", False)) != has and twin in open_clip.list_models():
        raise ModelFileError(
            f"the weights {weights} belong to {twin}, not to {model} (QuickGELU)",
            f"write --clip {twin}:{weights}",
        )


def tags_shown(model: str) -> str:
    """The first tags of a model, to show in a hint."""
    return ", ".join(list_pretrained_tags_by_model(model)[:TAGS_SHOWN]) or "none"


def file_of_tag(model: str, tag: str) -> Path:
    """The weights file of a tag: from the hub cache, else downloaded. Fails at once without a network."""
    facts = get_pretrained_cfg(model, tag)
    repository, _, name = facts.get("hf_hub", "").rpartition("/")
    for candidate in (name,) if name else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, candidate) if repository else None
        if isinstance(cached, str):
            return Path(cached)
    hint = f"give a file: --clip {model}:/path/to/weights.safetensors, or set HF_ENDPOINT to a mirror"
    try:
        require_network(f"{model}:{tag}")
    except ModelFileError as error:
        raise ModelFileError(error.message, hint) from None
    try:
        return Path(download_pretrained(facts))
    except Exception as error:  # many types of hub and network errors
        raise ModelFileError(
            f"{model}:{tag} could not be downloaded: {without_login(str(error))}", hint
        ) from None


def model_folder(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder with the files of a hub model, cached or downloaded. The last of ``files`` is optional."""
    needed = files[:-1]
    cached = [try_to_load_from_cache(repository, name, revision=revision) for name in needed]
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    hint = "download it on another computer and give its folder, or set HF_ENDPOINT to a mirror"
    try:
        require_network(repository)
    except ModelFileError as error:
        raise ModelFileError(error.message, hint) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files), revision=revision))
    except Exception as error:  # many types of hub and network errors
        raise ModelFileError(
            f"{repository} could not be downloaded: {without_login(str(error))}", hint
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ModelFileError if it cannot be read."""
    try:
        return json.loads(read_small(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}", "give a complete model folder") from None
