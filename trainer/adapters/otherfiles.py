"""What a safetensors file is that holds no LoRA, from the names of its tensors.

Owns the marks of the other files that people keep beside LoRAs.  Does not own files that are no safetensors
(``trainer.filekinds``).  Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.bases import LoraLayer, made_for

_EMBEDDING_WIDTHS = {768: "SD1.5", 1024: "SD2", 1280: "SDXL"}
# A tensor's name → what the file is.  The first mark that a name has counts.
_MARKS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"^(?:unet|text_encoder):\d+:(?:up|down)$",
            "a LoRA of the first lora tool, whose tensors have numbers instead of names",
        ),
        (r"^lllite_", "a ControlNet-LLLite"),
        (r"^lora_controlnet$", "a Control-LoRA, which is a ControlNet"),
        (r"^control_model\.|^controlnet_|controlnet_cond_embedding|^input_hint_block", "a ControlNet"),
        (r"^(?:ip_adapter|image_proj)\.", "an IP-Adapter"),
        (r"^adapter\.body\.|^body\.\d+\.(?:block1|in_conv)", "a T2I adapter"),
        (r"^(?:model\.1\.sub\.\d|body\.\d+\.rdb\d|RRDB_trunk|conv_body)", "an upscaler"),
        (r"motion_modules\.", "a motion module (AnimateDiff)"),
        (
            r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|down|up|mid)|^(?:post_)?quant_conv",
            "a VAE",
        ),
        (r"^(?:vision_model|visual)\.", "an image encoder"),
        (
            r"^(?:text_model\.|cond_stage_model\.|conditioner\.)|^(?:encoder|model)\.(?:block|layers)\.\d|^transformer\.resblocks",
            "a text encoder",
        ),
        (r"^optimizer\.|exp_avg", "the state of an optimizer"),
    )
)
_UNET = re.compile(
    r"^(?:model\.diffusion_model\.|diffusion_model\.|unet\.|down_blocks\.\d|conv_in\.|input_blocks\.\d)"
)


def what_is(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file with these tensors is, or ""."""
    if embedding := _embedding(shapes):
        return embedding
    unet = next((name for name in shapes if _UNET.match(name)), None)
    control = next((what for p, what in _MARKS if "Control" in what and any(p.search(n) for n in shapes)), "")
    if unet and not control:
        return _model(shapes, unet)
    for pattern, what in _MARKS:
        if any(pattern.search(name) for name in shapes):
            return what
    weights = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    model = made_for([LoraLayer("unet", name.replace(".", "_"), name) for name in weights], {})
    return f"a full {model.title} model" if "unknown" not in model.title and " or " not in model.title else ""


def _model(shapes: Mapping[str, tuple[int, ...]], unet: str) -> str:
    whole = any(
        name.startswith(("first_stage_model.", "cond_stage_model.", "conditioner.")) for name in shapes
    )
    prefix = "model.diffusion_model." if unet.startswith("model.") else ""
    layers = []
    for name, shape in shapes.items():
        if name.endswith(".weight") and name.startswith(prefix) and len(shape) in (2, 4):
            path = name.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
            layers.append(LoraLayer("unet", path, name, shape[1], shape[0], len(shape) == 4))
    model = made_for(layers, {}).title
    known = "" if "unknown" in model or " or " in model else f" of {model}"
    return (
        f"a full checkpoint{known}"
        if whole
        else f"the U-Net or transformer{known} without the rest of the model"
    )


def _embedding(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A textual inversion: one or two tables of few vectors (A1111: emb_params, diffusers: <token>, SDXL: clip_l and
    clip_g)."""
    if not 1 <= len(shapes) <= 4 or any(len(shape) not in (1, 2) for shape in shapes.values()):
        return ""
    if "clip_g" in shapes:
        return "an embedding (textual inversion) for SDXL"
    for name, shape in shapes.items():
        named = name in ("emb_params", "clip_l", "string_to_param.*", "*") or re.fullmatch(r"<.+>", name)
        if named or (len(shapes) == 1 and shape[-1] in _EMBEDDING_WIDTHS and "." not in name):
            model = _EMBEDDING_WIDTHS.get(shape[-1])
            return "an embedding (textual inversion)" + (f" for {model}" if model else "")
    return ""
