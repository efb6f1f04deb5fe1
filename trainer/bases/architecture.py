"""Which model a LoRA file is for: by the shapes of its layers, then by their names, then by its metadata.

Owns the marks of every architecture that LoRA files are shared for; only SD1.5 and SDXL are families of this tool. An
unknown model is never taken for one of them.  Does not own how files spell names (``trainer.adapters.keys``) or full
models (``detect``).  Loads no torch.

Sources of names and widths: ComfyUI comfy/model_detection.py, comfy/supported_models.py; diffusers
loaders/lora_conversion_utils.py; sd-scripts networks/lora_*.py and library/sai_model_spec.py; OneTrainer's LoRA savers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from trainer.bases.families import FAMILIES

_SD15, _SDXL = FAMILIES["sd15"].title, FAMILIES["sdxl"].title
_SD2, _REFINER = "SD2", "the SDXL refiner"
UNKNOWN = "an unknown model"


class LoraLayer(NamedTuple):
    """A layer that a LoRA changes: component, path with underscores, the file's own spelling; its input and output
    width and whether it is a convolution, each None if the file does not show it."""

    component: str
    path: str
    written: str
    inner: int | None = None
    outer: int | None = None
    conv: bool | None = None


class MadeFor(NamedTuple):
    """The model that a LoRA is for.  ``families``: those of this tool that it fits, none for another architecture.
    ``why``: what shows it. ``conflict``: what the metadata says otherwise, or ""."""

    title: str
    families: tuple[str, ...]
    why: str
    conflict: str = ""


# Width of the text states in a U-Net's cross-attention → model.
_CONTEXT = {FAMILIES[name].context_width: FAMILIES[name].title for name in FAMILIES} | {
    1024: _SD2,
    1280: _REFINER,
}
_UNET = re.compile(
    r"(?:down|up|input|output)_blocks_\d|mid_block_|middle_block_\d|time_embed|conv_(?:in|out)$|label_emb|out_[02]$"
)
# Layers that only one layout has: SDXL has no attention in its first block, and deeper transformers.
_ONLY_SDXL = re.compile(
    r"transformer_blocks_[1-9]|^up_blocks_0_attentions|^output_blocks_[0-2]_1_(?:transformer|proj|norm)|^add_embedding|^label_emb"
)
_NOT_SDXL = re.compile(
    r"^down_blocks_0_attentions|^(?:down|up)_blocks_3_|^up_blocks_2_attentions|^input_blocks_[12]_1_"
    r"|^(?:in|out)put_blocks_(?:9|1[01])_|^output_blocks_[6-8]_1_(?:transformer|proj|norm)"
)
# Blocks that are 640 wide in SDXL and 1280 in SD1.5.
_BY_WIDTH = re.compile(r"^(?:up_blocks_1_attentions_\d|output_blocks_[3-5]_1)_transformer_blocks_\d+_attn1_")
_SGM = re.compile(r"^(?:input|output)_blocks_\d|^middle_block_\d")


class _Mark(NamedTuple):
    """A layer name that shows an architecture, where given together with input widths of these layers."""

    title: str
    pattern: str
    widths: tuple[int, ...] = ()


_NEXT_DIT = r"(?:layers|context_refiner|noise_refiner)_\d+_(?:attention|feed_forward|adaLN)"
# The first mark that a layer shows counts.
_MARKS = (
    _Mark("Stable Video Diffusion", r"time_stack|time_mix|temporal_transformer_blocks"),
    _Mark("a motion module (AnimateDiff)", r"motion_modules|temporal_transformer"),
    _Mark("FLUX.2", r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj"),
    _Mark("FLUX.2", r"^(?:double|single)_blocks_\d+_(?:img_attn_qkv|txt_attn_qkv|linear1)", (4096, 6144)),
    _Mark("HunyuanImage 2.1", r"^(?:double|single)_blocks_\d+_", (3584,)),
    _Mark("Chroma", r"distilled_guidance_layer"),
    _Mark(
        "HunyuanVideo",
        r"token_refiner|^double_blocks_\d+_(?:img|txt)_(?:mlp_fc[12]|mod_linear)|^single_blocks_\d+_modulation_linear",
    ),
    _Mark("HiDream", r"double_stream_blocks|single_stream_blocks"),
    _Mark("AuraFlow", r"^joint_transformer_blocks|^(?:double|single)_layers_\d"),
    _Mark("FLUX", r"^(?:double|single)_blocks_\d|^single_transformer_blocks_\d"),
    _Mark("SD3", r"^joint_blocks_\d"),
    _Mark("SD3", r"^(?:transformer_blocks_\d+_attn2?_|context_embedder|pos_embed)", (1536, 2432)),
    _Mark(
        "Qwen-Image",
        r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)|^transformer_blocks_[2-5]\d_attn_",
        (3072,),
    ),
    _Mark("Qwen-Image", r"^transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)"),
    _Mark("FLUX", r"^transformer_blocks_\d+_attn_", (3072,)),
    _Mark("LTX-Video", r"^transformer_blocks_\d+_audio_|audio_to_video|patchify_proj"),
    _Mark("PixArt", r"^transformer_blocks_\d+_(?:attn[12]|ff)_", (1152,)),
    _Mark("PixArt", r"^blocks_\d+_(?:attn_(?:qkv|proj)|cross_attn_(?:q|kv)_linear)"),
    _Mark("Sana", r"^transformer_blocks_\d+_(?:attn[12]_|ff_conv)", (2240, 1600)),
    _Mark("CogVideoX", r"^transformer_blocks_\d+_(?:attn1|ff)_", (1920, 3072)),
    _Mark("LTX-Video", r"^transformer_blocks_\d+_(?:attn[12]|ff)_", (2048, 4096)),
    _Mark("Mochi", r"^blocks_\d+_attn_(?:qkv_[xy]|proj_[xy])"),
    _Mark(
        "Hunyuan-DiT",
        r"^blocks_\d+_(?:attn[12]_(?:Wqkv|q_proj|kv_proj|out_proj)|mlp_fc\d|default_modulation)|mlp_t5",
    ),
    _Mark("Anima", r"llm_adapter"),
    _Mark("Cosmos", r"^blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|adaln_modulation)"),
    _Mark(
        "Wan",
        r"^(?:vace_)?blocks_\d+_(?:(?:self|cross)_attn_[qkvo]|cross_attn_[kv]_img|ffn_(?:\d|net)|attn[12]_)",
    ),
    _Mark("OmniGen2", r"ref_image_(?:refiner|patch)"),
    _Mark("Lumina", rf"^{_NEXT_DIT}", (2304,)),
    _Mark("Z-Image", rf"^{_NEXT_DIT}", (3840,)),
    _Mark("Lumina", rf"^{_NEXT_DIT}"),
    _Mark("Kandinsky 5", r"visual_transformer_blocks|text_transformer_blocks"),
    _Mark("Kandinsky 2", r"^(?:down|up|mid)_block\w+_add_[kv]_proj"),
    _Mark(
        "Stable Cascade",
        r"^(?:down|up)_blocks_\d+_\d+_(?:attention|channelwise|mapper|kv_mapper|depthwise)|clip_txt_mapper",
    ),
    _Mark("Stable Audio", r"transformer_layers_\d+_(?:self_attn|cross_attn|ff)_"),
    _Mark("ACE-Step", r"lyric_(?:encoder|proj)|speaker_embedder"),
    _Mark("a language model", r"^(?:language_)?(?:model_)+(?:language_model_)?layers_\d+_(?:self_attn|mlp)_"),
)
_TOLD = (
    ("FLUX.2", r"flux[._-]?2"),
    ("FLUX", r"flux"),
    ("Chroma", r"chroma"),
    ("SD3", r"\bsd_?3|stable[-_]diffusion[-_]v?3"),
    ("PixArt", r"pixart"),
    ("HunyuanVideo", r"hunyuan[-_ ]?video"),
    ("HunyuanImage 2.1", r"hunyuan[-_ ]?image"),
    ("Hunyuan-DiT", r"hunyuan"),
    ("Wan", r"\bwan"),
    ("Qwen-Image", r"qwen"),
    ("Z-Image", r"z[-_ ]?image"),
    ("Lumina", r"lumina"),
    ("Stable Cascade", r"cascade|w[uü]e?rstchen"),
    ("LTX-Video", r"\bltx"),
    ("Sana", r"\bsana"),
    ("CogVideoX", r"cogvideo"),
    ("Anima", r"\banima\b"),
    ("Cosmos", r"cosmos"),
    ("HiDream", r"hidream"),
    ("AuraFlow", r"aura[-_ ]?flow"),
    ("Kolors", r"kolors"),
    ("Stable Video Diffusion", r"\bsvd\b|video[-_]diffusion"),
    (_REFINER, r"xl\w*[-_. ]?refiner|refiner"),
    (_SDXL, r"sdxl|stable[-_]diffusion[-_]xl|\bxl\b"),
    (_SD2, r"\bsd[-_ ]?v?2|stable[-_]diffusion[-_]v?2"),
    (_SD15, r"\bsd[-_ ]?v?1|stable[-_]diffusion[-_]v?1|stable_diffusion_15"),
)
# Models whose layers have the names and shapes of another one: only the metadata tells them apart.
_LIKE = {"Kolors": _SDXL, "Chroma": "FLUX", "FLUX.2": "FLUX", "Anima": "Cosmos", "HunyuanVideo": "FLUX"}
_TOLD_BY = ("ss_base_model_version", "modelspec.architecture", "base_model", "sd_version")


def made_for(layers: Collection[LoraLayer], metadata: Mapping[str, str]) -> MadeFor:
    """The model that a LoRA with these layers is for."""
    told, said = _told(metadata)
    titles, why, certain = _seen(layers)
    if told is None:
        return _made(titles, why) if titles else MadeFor(UNKNOWN, (), _layers_named(layers))
    if _LIKE.get(told) in titles:
        return _made((told,), said)
    if told in titles:
        return _made((told,), why if len(titles) == 1 else f"{said}; {why}")
    if not titles or not certain:
        return _made((told,), said)
    return _made(titles, why)._replace(conflict=f"the metadata says {told} ({said}), but {why}")


def _made(titles: tuple[str, ...], why: str) -> MadeFor:
    families = tuple(name for name, family in FAMILIES.items() if family.title in titles)
    return MadeFor(" or ".join(titles), families, why)


def _told(metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """The model that the metadata names, and the entry that names it."""
    for key in _TOLD_BY:
        text = metadata.get(key, "")[:200]
        for title, pattern in _TOLD:
            if text and re.search(pattern, text, re.IGNORECASE):
                if title == _SD15 and metadata.get("ss_v2") == "True":
                    return _SD2, "ss_v2 = True"
                return title, f"{key} = {text}"
    if metadata.get("ss_v2") == "True":
        return _SD2, "ss_v2 = True"
    return None, ""


def _seen(layers: Collection[LoraLayer]) -> tuple[tuple[str, ...], str, bool]:
    """(models that the layers fit, what shows it, whether that weighs more than the metadata)."""
    if any(layer.component == "prior" for layer in layers):
        return ("Stable Cascade",), "its layers are named lora_prior_…", True
    body = [layer for layer in layers if layer.component == "unet"]
    for mark in _MARKS:
        if shown := _shows(mark, body):
            width = f", {shown.inner} wide" if mark.widths else ""
            return (mark.title,), f"it has {_short(shown.path)}{width}", True
    if any(_UNET.search(layer.path) for layer in body):
        return _seen_in_unet([layer for layer in body if _UNET.search(layer.path)], layers)
    return ((), "", False) if body else _seen_in_text(layers)


def _shows(mark: _Mark, body: Iterable[LoraLayer]) -> LoraLayer | None:
    pattern = re.compile(mark.pattern)
    for layer in body:
        fits = not mark.widths or layer.inner in mark.widths or layer.outer in mark.widths
        if fits and pattern.search(layer.path):
            return layer
    return None


def _seen_in_unet(
    body: Collection[LoraLayer], layers: Collection[LoraLayer]
) -> tuple[tuple[str, ...], str, bool]:
    cross = [layer for layer in body if re.search(r"attn2_to_[kv]$", layer.path) and layer.inner]
    titles = {_CONTEXT[layer.inner] for layer in cross if layer.inner in _CONTEXT}
    if len(titles) == 1:
        width = next(layer.inner for layer in cross if layer.inner in _CONTEXT)
        return (titles.pop(),), f"cross-attention (attn2 to_k) is {width} wide", True
    usual = not cross  # a miniature has other widths
    found = next(
        (layer.path for layer in body if _ONLY_SDXL.search(layer.path) or _is_wide(layer, 640)), None
    )
    other = next(
        (layer.path for layer in body if _NOT_SDXL.search(layer.path) or _is_wide(layer, 1280)), None
    )
    second = next((layer.path for layer in layers if layer.component == "text_encoder_2"), None)
    if second or (found and not other):
        why = "it has a second text encoder" if second else f"it has {_short(found or '')}"
        return (_SDXL,), why, usual
    linear = {layer.conv for layer in body if re.search(r"proj_(?:in|out)$", layer.path)} - {None}
    if other and not found:
        return _sd1_or_2(layers, linear, _short(other), usual)
    if linear == {True}:
        return (_SD15,), "proj_in and proj_out are convolutions", usual
    sgm = next((layer for layer in body if _SGM.search(layer.path)), None)
    if sgm and re.match(r"(?:lora|oft)_unet_|unet\.", sgm.written):
        return (_SDXL,), f"its layers are named as in SDXL ({_short(sgm.path)})", False
    return _by_text_prefix(layers) or (
        (_SDXL, _SD2) if linear == {False} else (_SD15, _SDXL, _SD2),
        "its few layers fit more than one model",
        False,
    )


def _is_wide(layer: LoraLayer, width: int) -> bool:
    return width in (layer.inner, layer.outer) and _BY_WIDTH.search(layer.path) is not None


def _sd1_or_2(
    layers: Iterable[LoraLayer], linear: set[bool | None], other: str, usual: bool
) -> tuple[tuple[str, ...], str, bool]:
    widths = {layer.inner for layer in layers if layer.component == "text_encoder"}
    if linear == {True} or 768 in widths:
        return (_SD15,), f"it has {other}", usual
    if linear == {False} or 1024 in widths:
        return (_SD2,), f"it has {other}, and linear projections or a text encoder 1024 wide", usual
    return ((_SD15, _SD2) if usual else (_SD15,)), f"it has {other}", False


def _by_text_prefix(layers: Iterable[LoraLayer]) -> tuple[tuple[str, ...], str, bool] | None:
    """What kohya's prefix of the text encoder shows."""
    for layer in layers:
        if layer.written.startswith("lora_te1_"):
            return (_SDXL,), "its text encoder is named lora_te1, as in SDXL", False
        if layer.written.startswith("lora_te_"):
            title = _SD2 if layer.inner == 1024 else _SD15
            return (title,), "its text encoder is named lora_te", layer.inner in (768, 1024)
    return None


def _seen_in_text(layers: Collection[LoraLayer]) -> tuple[tuple[str, ...], str, bool]:
    """A file without layers of a U-Net or transformer."""
    if any(re.search(r"encoder_block_\d", layer.path) for layer in layers):
        return ("FLUX", "SD3"), "it changes a T5 text encoder", False
    if any(layer.component == "text_encoder_2" for layer in layers):
        return (_SDXL,), "it has a second text encoder", False
    if any(layer.inner == 1024 and layer.path.endswith("_proj") for layer in layers):
        return (_SD2,), "its text encoder is 1024 wide", True
    if not any(layer.component == "text_encoder" for layer in layers):
        return (), "", False
    return _by_text_prefix(layers) or (
        (_SD15, _SDXL),
        "it has only the first text encoder, which both have",
        False,
    )


def _layers_named(layers: Collection[LoraLayer]) -> str:
    first = next(iter(layers), None)
    return f"its layers are named like {_short(first.written)}" if first else "it has no layers"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"
