"""The real sizes from the shipped configurations: without memory, or filled with quick random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.bases import detect
from trainer.bases.base import Base, Parts
from trainer.bases.clipbpe import clip_tokenizer
from trainer.bases.families import FAMILIES
from trainer.bases.load import CLASSES


def meta_base(family: str) -> Base:
    """Every module of the published base, on the meta device."""
    config = {path.parent.name: detect.read_json(path) for path in FAMILIES[family].configs.glob("*/*.json")}
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with init_empty_weights():
        encoders = tuple(
            kind(CLIPTextConfig.from_dict(config[name]))
            for kind, name in zip(kinds, FAMILIES[family].text_encoders, strict=False)
        )
        unet = UNet2DConditionModel.from_config(config["unet"])
        vae = AutoencoderKL.from_config(config["vae"])
    tokenizer = clip_tokenizer()
    parts = Parts(unet, vae, encoders, (tokenizer,) * len(encoders), config["scheduler"])
    return CLASSES[family](family, "meta", parts)


def random_base(family: str) -> Base:
    """The published base's networks in fp16 with small repeating random weights: finite, seconds to make."""
    base = meta_base(family)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).half()
    with torch.no_grad():
        for module in base.modules():
            torch.nn.Module.half(module).to_empty(device="cpu")
            for name, weight in module.named_parameters():
                if weight.dim() == 1:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                    continue
                flat = weight.view(-1)
                for start in range(0, flat.numel(), block.numel()):
                    part = flat[start : start + block.numel()]
                    part.copy_(block[: part.numel()])
    return base


def random_clip(path: Path) -> Path:
    """ViT-B-32 with random weights that do not look untrained (open_clip's initial logit scale is refused)."""
    torch.manual_seed(0)
    weights = open_clip.create_model("ViT-B-32").state_dict()
    weights["logit_scale"] = torch.tensor(4.6)
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path)
    return path


def louder(base: Any) -> None:
    """Random networks draw almost one grey, in which an adapter would not be seen."""
    with torch.no_grad():
        base.unet.conv_out.weight.mul_(20)
        base.vae.decoder.conv_out.weight.mul_(20)
