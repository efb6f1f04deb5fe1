"""Write a base as one .safetensors in the original layout: the reverse of what loaders do, for tests only.

Works on any network with the real ones' structure.  Names follow Stability's own code; ``text_model.`` comes
back after ``cond_stage_model.transformer.`` where transformers has flattened it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.bases.base import Base

UNET_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_single_file(base: Base, path: Path) -> Path:
    """Write the whole base, in the number types of its networks."""
    save_file({name: tensor.contiguous() for name, tensor in single_file_tensors(base).items()}, path)
    return path


def single_file_tensors(base: Base) -> dict[str, Tensor]:
    """Every tensor of the file by its name there.  Works on the meta device too."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_tensors(base.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_tensors(base.vae).items()}
    prefix = "cond_stage_model." if base.family == "sd15" else "conditioner.embedders.0."
    for name, tensor in base.text_encoders[0].state_dict().items():
        tensors[f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if base.family == "sdxl":
        tensors |= {
            f"conditioner.embedders.1.model.{k}": v
            for k, v in open_clip_tensors(base.text_encoders[1]).items()
        }
    return tensors


def unet_tensors(unet: torch.nn.Module) -> dict[str, Tensor]:
    stride = int(unet.config.layers_per_block) + 1
    attentive = [hasattr(block, "attentions") for block in unet.up_blocks]
    return {_unet_name(name, stride, attentive): tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str, stride: int, attentive: list[bool]) -> str:
    module, _, ending = name.rpartition(".")
    if module in UNET_OUTER:
        return f"{UNET_OUTER[module]}.{ending}"
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{place}.{_inner(kind, inner)}"
    block, kind, number, *inner = rest
    index = int(block) * stride + int(number)
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * stride}.0.op.{ending}"
    if kind == "upsamplers":
        slot = 2 if attentive[int(block)] else 1
        return f"output_blocks.{int(block) * stride + stride - 1}.{slot}.conv.{ending}"
    place = f"input_blocks.{index + 1}" if side == "down_blocks" else f"output_blocks.{index}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{_inner(kind, inner)}"


def _inner(kind: str, inner: list[str]) -> str:
    return ".".join([RESNET[inner[0]], *inner[1:]] if kind == "resnets" else inner)


def vae_tensors(vae: torch.nn.Module) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    tensors = {}
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", r"down.\1.downsample.conv", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        name = re.sub(r"(up\.\d+)\.resnets\.(\d+)", r"\1.block.\2", name)
        name = re.sub(r"(up\.\d+)\.upsamplers\.0\.conv", r"\1.upsample.conv", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            head, _, tail = name.partition("mid_block.attentions.0.")
            layer, _, ending = tail.rpartition(".")
            name = f"{head}mid.attn_1.{VAE_ATTENTION[layer]}.{ending}"
            if ending == "weight" and layer != "group_norm":
                tensor = tensor[:, :, None, None]  # 1×1 convolutions in the original
        tensors[name] = tensor
    return tensors


def open_clip_tensors(encoder: torch.nn.Module) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for name, tensor in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None or match[2].endswith(("q_proj", "k_proj", "v_proj")):
            continue
        tensors[f"transformer.resblocks.{match[1]}.{OPEN_CLIP[match[2]]}.{match[3]}"] = tensor
    for layer in range(encoder.config.num_hidden_layers):
        for ending in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{ending}"] for part in "qkv"]
            tensors[f"transformer.resblocks.{layer}.attn.in_proj_{ending}"] = torch.cat(parts)
    return tensors
