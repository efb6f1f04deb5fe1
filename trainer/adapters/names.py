"""Every name that a LoRA file may give to a layer of a base.

A file names layers as diffusers does or as Stability's own code does (``input_blocks_4_1_…``), which kohya uses for
SDXL.  Owns the second spelling.  Does not own how tools write keys (``keys``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.adapters.keys import Name
from trainer.bases import Base

LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
# diffusers' names inside a resnet, and outside the blocks → Stability's (sd-scripts library/sdxl_model_util.py)
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<what>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True)
class Place:
    """A layer of a base: where it is, and kohya's key for it."""

    component: str
    path: str
    key: str
    layer: Any


def places_of(base: Base) -> dict[Name, Place]:
    """Every name of every layer that a LoRA file can change: linear layers, convolutions and norms."""
    found: dict[Name, Place] = {}
    known = [table for tables in (base.lora_names(), base.conv_names()) for table in tables.items()]
    keys = {(component, path): key for component, table in known for path, key in table.items()}
    original = any("_blocks_" in mark for mark in base.facts.lora_marks)
    for component, network in base.components().items():
        for path, layer in network.named_modules():
            if not isinstance(layer, LAYERS):
                continue
            plain = path.removeprefix("text_model.").replace(".", "_")
            names = [plain]
            if component == "unet" and (other := original_path(base.unet, path)):
                names.append(other.replace(".", "_"))
            key = keys.get((component, path)) or _key(base, component, names, original)
            for name in names:
                found[Name(component, name)] = Place(component, path, key, layer)
    return found


def original_path(unet: Any, path: str) -> str | None:
    """The path of a diffusers U-Net's layer in Stability's code, SD1.5's or SDXL's; None if it has none there."""
    if path in _ENDS:
        return _ENDS[path]
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    what, layer, rest = match["what"], int(match["layer"]), match["rest"]
    if what == "resnets":
        rest = _RESNET.get(rest, rest)
    if match["side"] is None:
        return f"middle_block.{2 * layer + (what == 'attentions')}.{rest}"
    block, stride = int(match["block"]), int(unet.config.layers_per_block) + 1
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * stride}.0.op"
    if what == "upsamplers":  # behind the attention, where the block has one
        has_attention = hasattr(unet.up_blocks[block], "attentions")
        return f"output_blocks.{(block + 1) * stride - 1}.{1 + has_attention}.{rest}"
    number = block * stride + layer
    side = f"input_blocks.{number + 1}" if match["side"] == "down" else f"output_blocks.{number}"
    return f"{side}.{int(what == 'attentions')}.{rest}"


def _key(base: Base, component: str, names: list[str], original: bool) -> str:
    """kohya's key of a layer that sd-scripts' own networks do not train."""
    if component == "unet":
        return f"lora_unet_{names[-1 if original else 0]}"
    prefix = dict(zip(base.facts.text_encoders, base.facts.text_prefixes, strict=False))[component]
    return f"{prefix}_{names[0]}" if names[0] == "text_projection" else f"{prefix}_text_model_{names[0]}"
