"""Networks without weights, and filling them: the part that every loader shares.

Owns the construction of empty networks, today's names of tensors, and the check and loading of their weights. Does not
own which files there are (``trainer.bases.load``, ``trainer.bases.vae``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn

from trainer.errors import ModelFileError, first_line
from trainer.oom import is_out_of_memory

# Names in older VAE folders → current diffusers names.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
SHOWN_KEYS = 5


def empty_network(component: str, config: dict[str, Any]) -> Any:
    """A network without memory for its weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        with init_empty_weights():
            if component == "unet":
                return UNet2DConditionModel.from_config(config)
            if component == "vae":
                return AutoencoderKL.from_config(config)
            kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
            return kind(CLIPTextConfig.from_dict(config))
    except Exception as error:  # an invalid configuration can raise anything
        if is_out_of_memory(error):
            raise
        raise ModelFileError(
            f"the configuration of {component} is invalid: {first_line(error)[:160]}",
            "download the model again",
        ) from None


def check_tensors(
    path: Path, model: nn.Module, given: Mapping[str, tuple[int, ...]], component: str = ""
) -> None:
    """Raise ModelFileError unless every tensor of the network is present with the right shape."""
    place = f"{path} ({component})" if component else str(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ModelFileError(
            f"{place} lacks {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:SHOWN_KEYS])}",
            "the file is incomplete or belongs to a different kind of model",
        )
    wrong = [
        f"{name} {given[name]} instead of {shape}" for name, shape in wanted.items() if given[name] != shape
    ]
    if wrong:
        raise ModelFileError(
            f"{place} has {len(wrong)} tensors with a different shape: {', '.join(wrong[:SHOWN_KEYS])}",
            "the file belongs to a different kind of model",
        )


def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]] | Any, dtype: torch.dtype) -> None:
    """Load the weights tensor by tensor, so that peak memory is the network plus one tensor."""
    wanted = model.state_dict().keys()
    for name, tensor in tensors:
        if name not in wanted:
            continue
        owner_path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        value = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[attribute] = value
    assert not any(parameter.is_meta for parameter in model.parameters())


def present_name(model: nn.Module, name: str) -> str:
    """The name of a tensor in the installed libraries: handles older VAE attention names
    and CLIP's ``text_model.`` prefix."""
    for old, new in OLD_ATTENTION.items():
        if old in name and ".attentions." in name:
            name = name.replace(old, new)
    if name.startswith("text_model.") and not hasattr(model, "text_model"):
        return name.removeprefix("text_model.")
    return name
