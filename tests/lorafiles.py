"""LoRA files under the key names of public tools: real names and real widths, few modules, rank 2.

``FILES`` says for each what it is.  Sources of the names: sd-scripts networks/, LyCORIS lycoris/modules, ComfyUI
comfy/lora.py, diffusers loaders/lora_conversion_utils.py and utils/state_dict_utils.py,
OneTrainer modules/modelSaver, PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

R = 2
T = "transformer_blocks_0"
Tensors = dict[str, Tensor]
KOHYA, PEFT, PROCESSOR = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("down.weight", "up.weight"),
)
SD1 = {"ss_base_model_version": "sd_v1", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
XL = SD1 | {"ss_base_model_version": "sdxl_base_v1-0"}


def filled(*shape: int, at: float = 0.01) -> Tensor:
    return torch.full(shape, at, dtype=torch.float16)


def lora(
    key: str,
    inner: int,
    outer: int,
    *,
    kernel: int = 0,
    alpha: float | None = 1.0,
    halves: tuple[str, str] = KOHYA,
    dot: str = ".",
) -> Tensors:
    """A LoRA module of a layer with these widths; ``kernel``: of a convolution."""
    sides = (kernel, kernel) if kernel else ()
    ones = (1, 1) if kernel else ()
    tensors = {
        f"{key}{dot}{halves[0]}": filled(R, inner, *sides),
        f"{key}{dot}{halves[1]}": filled(outer, R, *ones),
    }
    return tensors | ({} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)})


def loras(layers: Mapping[str, tuple[int, int]], prefix: str = "", **more: object) -> Tensors:
    """One LoRA module per layer."""
    return {
        name: t for key, sides in layers.items() for name, t in lora(prefix + key, *sides, **more).items()
    }  # type: ignore[arg-type]


@dataclass(frozen=True)
class File:
    """A file and what it is: kind, the model it is for, its parts in words, and words of its warnings."""

    kind: str
    model: str
    tensors: Callable[[], Tensors]
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ("U-Net",)
    warns: tuple[str, ...] = ()

    def write(self, path: Path) -> Path:
        save_file(self.tensors(), path, dict(self.metadata) or None)
        return path


def _attention(dot: str, cross: int, width: int, block: str) -> dict[str, tuple[int, int]]:
    place = f"{block}{dot}transformer_blocks{dot}0{dot}"
    return {f"{place}attn1{dot}to_q": (width, width), f"{place}attn2{dot}to_k": (cross, width)}


DOWN_0, DOWN_1, UP_0 = "down_blocks_0_attentions_0", "down_blocks_1_attentions_0", "up_blocks_0_attentions_1"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"


def _kohya_sd15() -> Tensors:
    unet = _attention("_", 768, 320, DOWN_0)
    return (
        loras(unet, "lora_unet_")
        | lora(f"lora_te_{TEXT}", 768, 768)
        | lora(f"lora_unet_{DOWN_0}_proj_in", 320, 320, kernel=1)
    )


def _kohya_sdxl(alpha: float | None = 1.0) -> Tensors:
    unet = loras(_attention("_", 2048, 640, "input_blocks_4_1"), "lora_unet_", alpha=alpha)
    return (
        unet
        | lora(f"lora_te1_{TEXT}", 768, 768, alpha=alpha)
        | lora(f"lora_te2_{TEXT}", 1280, 1280, alpha=alpha)
    )


def _diffusers_sdxl(halves: tuple[str, str] = PEFT, prefix: str = "unet.") -> Tensors:
    return loras(_attention(".", 2048, 640, "down_blocks.1.attentions.0"), prefix, alpha=None, halves=halves)


def _processors(prefix: str) -> Tensors:
    place = f"{prefix}down_blocks.1.attentions.1.transformer_blocks.1.attn2.processor."
    layers = {"to_q": (640, 640), "to_k": (2048, 640), "to_out": (640, 640)}
    return loras(
        {f"{name}_lora": sides for name, sides in layers.items()}, place, alpha=None, halves=PROCESSOR
    )


def _norms() -> Tensors:
    return {
        f"lora_unet_mid_block_attentions_0_{T}_norm1.{what}": filled(1280) for what in ("w_norm", "b_norm")
    }


def _full() -> Tensors:
    key = f"lora_unet_{DOWN_0}_{T}_attn1_to_out_0"
    return {f"{key}.diff": filled(320, 320), f"{key}.diff_b": filled(320)} | _norms()


def _ia3() -> Tensors:
    key = f"lora_unet_mid_block_attentions_0_{T}_"
    return {
        f"{key}attn2_to_k.weight": filled(1280),
        f"{key}attn2_to_k.on_input": torch.tensor(0),
        f"{key}ff_net_2.weight": filled(5120),
        f"{key}ff_net_2.on_input": torch.tensor(1),
    }


def _tucker() -> Tensors:
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    return lora(key, 320, 320, kernel=1) | {f"{key}.lora_mid.weight": filled(R, R, 3, 3)}


def _dora(key: str, width: int, name: str = "dora_scale", shape: tuple[int, ...] = ()) -> Tensors:
    return lora(key, width, width) | {f"{key}.{name}": filled(*(shape or (width, 1)), at=1.0)}


def _loha(key: str, inner: int, outer: int) -> Tensors:
    return {
        f"{key}.hada_w1_a": filled(outer, R),
        f"{key}.hada_w1_b": filled(R, inner),
        f"{key}.hada_w2_a": filled(outer, R),
        f"{key}.hada_w2_b": filled(R, inner),
        f"{key}.alpha": torch.tensor(1.0),
    }


def _lokr(key: str, inner: tuple[int, int], outer: tuple[int, int]) -> Tensors:
    return {f"{key}.lokr_w1": filled(outer[0], inner[0]), f"{key}.lokr_w2": filled(outer[1], inner[1])}


def _bundle() -> Tensors:
    names = {
        f"bundle_emb.two words.{encoder}": filled(4, width)
        for encoder, width in (("clip_l", 768), ("clip_g", 1280))
    }
    return _kohya_sdxl() | names


XL_TO_K = f"lora_unet_input_blocks_4_1_{T}_attn2_to_k"
TEXTS = ("U-Net", "first text encoder", "second text encoder")
NO_ALPHA = "no module has an alpha: readers take the rank (scale 1)"
OT = {"ot_branch": "master", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
ORIGINAL = "output_blocks.5.1.transformer_blocks.1.attn1.to_v"
FILES: dict[str, File] = {
    "kohya SD1.5": File("LoRA", "SD1.5", _kohya_sd15, SD1, ("U-Net", "text encoder")),
    "kohya SDXL": File("LoRA", "SDXL", _kohya_sdxl, XL, TEXTS),
    "kohya SDXL, metadata removed": File("LoRA", "SDXL", _kohya_sdxl, {}, TEXTS),
    "metadata of another model": File(
        "LoRA", "SDXL", _kohya_sdxl, SD1, TEXTS, ("the metadata says SD1.5", "2048 wide", "the file decides")
    ),
    "only a text encoder": File(
        "LoRA", "SD1.5", lambda: lora(f"lora_te_{TEXT}", 768, 768), {}, ("text encoder",)
    ),
    "only SDXL's first text encoder": File(
        "LoRA", "SDXL", lambda: lora(f"lora_te1_{TEXT}", 768, 768), {}, ("first text encoder",)
    ),
    "only SDXL's second text encoder": File(
        "LoRA", "SDXL", lambda: lora(f"lora_te2_{TEXT}", 1280, 1280), {}, ("second text encoder",)
    ),
    "only the first text encoder, diffusers": File(
        "LoRA",
        "SD1.5 or SDXL",
        lambda: lora("text_encoder.text_model.encoder.layers.0.mlp.fc1", 768, 3072, alpha=None, halves=PEFT),
        {},
        ("text encoder",),
        (NO_ALPHA,),
    ),
    "LCM, SDXL": File(
        "LoCon",
        "SDXL",
        lambda: (
            loras(_attention("_", 2048, 640, DOWN_1), "lora_unet_")
            | lora("lora_unet_down_blocks_1_resnets_0_conv1", 320, 640, kernel=3)
            | lora("lora_unet_up_blocks_0_upsamplers_0_conv", 1280, 1280, kernel=3)
        ),
    ),
    "OneTrainer, dotted, DoRA": File("DoRA", "SDXL", lambda: _dora(f"unet.{ORIGINAL}", 640), OT),
    "OneTrainer, bundled embedding": File(
        "LoRA",
        "SDXL",
        _bundle,
        {"ot_branch": "master"},
        TEXTS,
        ("'two words' (clip_g, clip_l)", "not attached"),
    ),
    "OneTrainer OFT": File(
        "OFT",
        "SDXL",
        lambda: {f"lora_unet_{DOWN_1}_transformer_blocks_1_attn1_to_q.oft_R.weight": filled(20, 496)},
    ),
    "LyCORIS full and norms": File("full differences + norms", "SD1.5", _full, SD1),
    "LoRA and norms": File(
        "LoRA + norms", "SD1.5", lambda: _kohya_sd15() | _norms(), SD1, ("U-Net", "text encoder")
    ),
    "LyCORIS IA3": File("IA3", "SD1.5", _ia3, SD1),
    "LyCORIS Tucker": File("LoCon with a Tucker core", "SD1.5", _tucker, SD1),
    "LyCORIS LoHa": File("LoHa", "SDXL", lambda: _loha(XL_TO_K, 2048, 640)),
    "LyCORIS LoKr": File("LoKr", "SDXL", lambda: _lokr(XL_TO_K, (32, 64), (20, 32))),
    "LyCORIS LoKr with DoRA": File(
        "LoKr with DoRA magnitudes",
        "SDXL",
        lambda: _lokr(XL_TO_K, (32, 64), (20, 32)) | {f"{XL_TO_K}.dora_scale": filled(640, 1)},
    ),
    "LyCORIS diag-oft": File("OFT", "SDXL", lambda: {f"{XL_TO_K}.oft_blocks": filled(20, 32, 32)}, XL),
    "kohya OFT": File(
        "OFT",
        "SDXL",
        lambda: {"oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks": filled(4, 160, 160)},
    ),
    "LyCORIS boft": File("BOFT", "SDXL", lambda: {f"{XL_TO_K}.oft_blocks": filled(4, 20, 32, 32)}, XL),
    "LyCORIS GLoRA": File(
        "GLoRA",
        "SDXL",
        lambda: {
            f"{XL_TO_K}.{n}.weight": filled(*s)
            for n, s in (("a1", (2048, R)), ("a2", (R, 2048)), ("b1", (640, R)), ("b2", (R, 2048)))
        },
        {},
        ("U-Net",),
        (NO_ALPHA,),
    ),
    "PEFT LoKr": File(
        "LoKr",
        "SD1.5 or SD2",
        lambda: _lokr(
            "base_model.model.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
            (32, 40),
            (32, 40),
        ),
    ),
    "diffusers SDXL": File("LoRA", "SDXL", _diffusers_sdxl, {"format": "pt"}, ("U-Net",), (NO_ALPHA,)),
    "diffusers, an adapter's name": File(
        "LoRA",
        "SDXL",
        lambda: _diffusers_sdxl(("lora_A.default_0.weight", "lora_B.default_0.weight")),
        {},
        ("U-Net",),
        (NO_ALPHA,),
    ),
    "diffusers DoRA": File(
        "DoRA",
        "SDXL",
        lambda: (
            _diffusers_sdxl()
            | {
                "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": filled(
                    640, at=1.0
                )
            }
        ),
        {},
        ("U-Net",),
        (NO_ALPHA,),
    ),
    "diffusers before 0.18": File("LoRA", "SDXL", lambda: _processors("unet."), {}, ("U-Net",), (NO_ALPHA,)),
    "diffusers before 0.18, no prefix": File(
        "LoRA", "SDXL", lambda: _processors(""), {}, ("U-Net",), (NO_ALPHA,)
    ),
    "B-LoRA": File(
        "LoRA",
        "SDXL",
        lambda: loras(
            _attention(".", 2048, 1280, "up_blocks.0.attentions.1"),
            "unet.",
            alpha=None,
            halves=("lora.down.weight", "lora.up.weight"),
        ),
        {},
        ("U-Net",),
        (NO_ALPHA,),
    ),
    "B-LoRA, sliced": File(
        "LoRA",
        "SDXL",
        lambda: loras(_attention("_", 2048, 1280, "output_blocks_1_1"), "lora_unet_", alpha=None),
        {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "64", "ss_network_alpha": "32"},
        ("U-Net",),
        (NO_ALPHA + ", though the metadata says alpha 32 of dim 64",),
    ),
    "ComfyUI": File(
        "LoRA",
        "SDXL",
        lambda: loras(_attention(".", 2048, 640, "input_blocks.4.1"), "diffusion_model.", alpha=None),
        {},
        ("U-Net",),
        (NO_ALPHA,),
    ),
    "SimpleTuner LyCORIS": File(
        "LoKr", "SDXL", lambda: _lokr(f"lycoris_{DOWN_1}_{T}_attn2_to_k", (32, 64), (20, 32))
    ),
}


def _foreign(
    model: str, key: str, inner: int, outer: int, halves: tuple[str, str] = PEFT, part: str = "transformer"
) -> File:
    return File("LoRA", model, lambda: lora(key, inner, outer, halves=halves), {}, (part,))


FOREIGN: tuple[File, ...] = (
    _foreign("SD2", f"lora_unet_{DOWN_0}_{T}_attn2_to_k", 1024, 320, KOHYA, "U-Net"),
    _foreign(
        "the SDXL refiner",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        1280,
        768,
        KOHYA,
        "U-Net",
    ),
    _foreign("FLUX", "lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216, KOHYA),
    _foreign("FLUX", "lora_unet_single_transformer_blocks_0_attn_to_k_", 3072, 3072, KOHYA),
    _foreign("FLUX", "transformer.transformer_blocks.0.attn.to_q", 3072, 3072),
    _foreign("FLUX", "diffusion_model.single_blocks.3.linear1", 3072, 21504),
    _foreign("FLUX", "lora_transformer_single_transformer_blocks_0_attn_to_q", 3072, 3072, KOHYA),
    _foreign("FLUX.2", "diffusion_model.double_blocks.0.img_attn.qkv", 6144, 18432),
    _foreign("Chroma", "diffusion_model.distilled_guidance_layer.in_proj", 64, 5120),
    _foreign(
        "SD3",
        "transformer.base_model.model.transformer_blocks.4.attn.to_q",
        1536,
        1536,
        ("lora.down.weight", "lora.up.weight"),
    ),
    _foreign("SD3", "lora_unet_joint_blocks_0_x_block_attn_qkv", 2432, 7296, KOHYA),
    _foreign("HunyuanVideo", "lora_unet_double_blocks_0_img_mlp_fc1", 3072, 12288, KOHYA),
    _foreign("HunyuanImage 2.1", "lora_unet_double_blocks_0_img_attn_qkv", 3584, 10752, KOHYA),
    _foreign("Wan", "diffusion_model.blocks.0.self_attn.q", 5120, 5120),
    _foreign("Wan", "lora_unet_blocks_0_cross_attn_k_img", 5120, 5120, KOHYA),
    _foreign("Wan", "transformer.blocks.0.attn1.to_q", 1536, 1536),
    _foreign("Qwen-Image", "transformer.transformer_blocks.0.img_mlp.net.0.proj", 3072, 12288),
    _foreign(
        "Qwen-Image",
        "transformer_blocks.59.attn.to_q",
        3072,
        3072,
        ("lora_A.default.weight", "lora_B.default.weight"),
    ),
    _foreign("Z-Image", "diffusion_model.layers.0.attention.qkv", 3840, 11520),
    _foreign("Lumina", "lora_unet_layers_0_attention_qkv", 2304, 3840, KOHYA),
    _foreign(
        "Stable Cascade", "lora_prior_unet_down_blocks_0_2_attention_attn_to_q", 2048, 2048, KOHYA, "prior"
    ),
    _foreign("LTX-Video", "transformer.transformer_blocks.0.attn1.to_q", 2048, 2048),
    _foreign("PixArt", "lora_transformer_transformer_blocks_0_attn1_to_k", 1152, 1152, KOHYA),
    _foreign("Sana", "transformer.transformer_blocks.0.attn2.to_q", 2240, 2240),
    _foreign("CogVideoX", "transformer.transformer_blocks.0.attn1.to_q", 1920, 1920),
    _foreign("Hunyuan-DiT", "lora_unet_blocks_0_attn1_Wqkv", 1408, 4224, KOHYA),
    _foreign("HiDream", "transformer.double_stream_blocks.0.block.attn1.to_q", 2560, 2560),
    _foreign("AuraFlow", "transformer.joint_transformer_blocks.0.attn.to_q", 3072, 3072),
    _foreign("Anima", "lora_unet_llm_adapter_blocks_0_self_attn_q_proj", 1024, 1024, KOHYA),
    _foreign("Cosmos", "lora_unet_blocks_0_self_attn_q_proj", 2048, 2048, KOHYA),
    _foreign("a language model", "base_model.model.model.layers.0.self_attn.q_proj", 4096, 4096),
    _foreign("an unknown model", "transformer.stages.0.mixer.proj", 768, 768),
)
