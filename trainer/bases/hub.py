"""Download a base from the Hugging Face hub: the cached copy first, then the network if the hub is reachable.

Downloads safetensors and configurations, never pickles.  HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and proxies
work as in huggingface_hub.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from trainer.errors import ModelFileError

PROBE_SECONDS = 5.0  # timeout of our own check; huggingface_hub retries an unreachable hub for 47 s
INDEX = "*.safetensors.index*.json"  # index of shards; diffusers also writes ….safetensors.index.fp16.json
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIGURATION = (
    "model_index.json",
    *(f"{component}/config.json" for component in COMPONENTS),
    "scheduler/scheduler_config.json",
    *(
        f"{tokenizer}/{name}"
        for tokenizer in ("tokenizer", "tokenizer_2")
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
        )
    ),
)


def hub_folder(
    repo: str,
    *,
    revision: str | None,
    is_complete: Callable[[Path], bool],
    choose: Callable[[list[str]], list[str]] | None = None,
) -> Path:
    """The local folder of a hub model; downloads missing files. ``is_complete`` checks a cached copy, ``choose`` names
    the files to download (default: ``base_files``)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelFileError(
            f"{repo} is not a valid hub id: {str(error)[:160]}", "write it as org/name"
        ) from None
    require_network(repo)
    return _download(repo, revision, choose or (lambda names: base_files(repo, names)))


def require_network(repo: str) -> None:
    """Raise ModelFileError if the hub cannot be reached or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise _unreachable(repo, "HF_HUB_OFFLINE is set")
    endpoint = without_login(constants.ENDPOINT)  # a login is not needed for this check
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # any answer means that it is reachable
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _unreachable(repo, f"{endpoint} does not answer ({reason})") from None


def without_login(text: str) -> str:
    """A text without the user names and passwords in its URLs, safe to print."""
    return re.sub(r"//[^/\s]*@", "//", text)


def weight_files(names: list[str]) -> list[str]:
    """The files of a repository to download: per component the fp16 variant if there is one, else the plain
    safetensors. Raises ModelFileError for a component that has only pickles."""
    chosen = [name for name in names if name in CONFIGURATION]
    for component in COMPONENTS:
        inside = [name for name in names if name.startswith(component + "/")]
        tensors = [name for name in inside if fnmatch(name, "*.safetensors") or fnmatch(name, INDEX)]
        tensors = [name for name in tensors if "non_ema" not in name and "openvino" not in name]
        half = [name for name in tensors if ".fp16" in name]
        if inside and not tensors and any(name.endswith(".bin") for name in inside):
            raise ModelFileError(
                f"the model has {component} only as a pickle (.bin), which could run arbitrary code when loaded",
                "choose a model with safetensors files",
            )
        chosen += half or [name for name in tensors if ".fp16" not in name]
    return chosen


def base_files(repo: str, names: list[str]) -> list[str]:
    """The files of a whole base (``weight_files``)."""
    if "model_index.json" not in names:
        raise ModelFileError(f"{repo} on the hub is not a diffusers model: it has no model_index.json", "")
    return weight_files(names)


def vae_files(names: list[str]) -> list[str]:
    """The files of a VAE, at the top of its repository or in its folder vae: plain weights before fp16."""
    for place in ("", "vae/"):
        weights = [
            name
            for name in (f"{place}diffusion_pytorch_model{part}.safetensors" for part in ("", ".fp16"))
            if name in names
        ]
        if weights and f"{place}config.json" in names:
            return [f"{place}config.json", weights[0]]
    raise ModelFileError(
        "the repository has no VAE: no config.json with diffusion_pytorch_model.safetensors",
        "give another repository, or a .safetensors file",
    )


def _download(repo: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = HfApi().list_repo_files(repo, revision=revision)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=choose(names)))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelFileError(
            f"the hub has no model {repo}{f' at {revision}' if revision else ''}, or it needs a login",
            "check the name; for a gated model run `hf auth login` first",
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelFileError(
            f"downloading {repo} failed: {type(error).__name__}: {_first_line(error)}",
            "run the same command again; finished files are kept",
        ) from None


def _first_line(error: Exception) -> str:
    return without_login(next(iter(str(error).splitlines()), ""))[:200]


def _unreachable(repo: str, why: str) -> ModelFileError:
    return ModelFileError(
        f"{repo} is not on this machine and cannot be downloaded: {why}",
        "give a local folder or .safetensors file, set HF_ENDPOINT to a mirror, or use --base mini-sd15",
    )
