"""Which family a model belongs to, from names, shapes and configurations – before anything is loaded.

An unsupported kind is refused by its name; "it did not load" is no answer to a person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ModelFileError
from trainer.tensorfile import Header

UNET = "model.diffusion_model."
SUPPORTED = "SD1.5 and SDXL bases and their fine-tunes are supported"
MAX_JSON_BYTES = 1_000_000  # the largest configuration file of a published pipeline is a few KB

# Any key that contains the text → what the file is instead of a base.  First match wins.
FOREIGN_KEYS = (
    (".lora_", "a LoRA"),
    ("lora_unet_", "a LoRA"),
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    ("control_model.", "a ControlNet"),
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "an SD3 model"),
)
# A marker key of a whole checkpoint → its kind.
MARKER_KEYS = {
    "edm_mean": "an EDM model (Playground)",
    "edm_vpred.sigma_max": "an EDM v-prediction model",
}
INPUT_CHANNELS = {9: "an inpainting model", 8: "an image-editing model (InstructPix2Pix)", 5: "a depth model"}
# Width of the text states that cross-attention reads → family, or the kind that is refused.
CONTEXT_FAMILY = {768: "sd15", 2048: "sdxl"}
CONTEXT_FOREIGN = {1024: "an SD2.x model", 1280: "the SDXL refiner"}
# What a single file must hold, by family: key beginning → what it is.
SINGLE_FILE_PARTS = {
    "sd15": {"cond_stage_model.transformer.": "text encoder", "first_stage_model.": "VAE"},
    "sdxl": {
        "conditioner.embedders.0.transformer.": "first text encoder",
        "conditioner.embedders.1.model.": "second text encoder",
        "first_stage_model.": "VAE",
    },
}
PIPELINE_FAMILY = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
}
PIPELINE_FOREIGN = {
    "StableDiffusionXLImg2ImgPipeline": "the SDXL refiner",
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionXLInpaintPipeline": "an inpainting model",
    "StableDiffusion3Pipeline": "an SD3 model",
    "FluxPipeline": "a Flux model",
}


def family_of_file(path: Path, header: Header) -> str:
    """sd15 or sdxl for a single file in the original layout, or ModelFileError naming what it is."""
    for text, kind in FOREIGN_KEYS:
        if any(text in name for name in header.shapes):
            raise _refused(path, kind)
    for key, kind in MARKER_KEYS.items():
        if key in header.shapes:
            raise _refused(path, kind)
    first = header.shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise ModelFileError(
            f"{path} holds no U-Net in the original layout ({_sample(header)})",
            "give a whole checkpoint, or the diffusers folder that this file belongs to",
        )
    if len(first) == 4 and first[1] in INPUT_CHANNELS:
        raise _refused(path, INPUT_CHANNELS[first[1]])
    family = _family_of_width(path, _context_width(header))
    for beginning, what in SINGLE_FILE_PARTS[family].items():
        if not any(name.startswith(beginning) for name in header.shapes):
            raise ModelFileError(
                f"{path} has no {what}: it holds only part of a model", "give a whole checkpoint"
            )
    return family


def family_of_folder(folder: Path) -> str:
    """sd15 or sdxl for a diffusers folder, or ModelFileError naming what it is."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelFileError(
            f"{folder} is no diffusers folder: it has no model_index.json",
            "give the folder that holds unet/, vae/ and text_encoder/, or a single .safetensors file",
        )
    pipeline = str(read_json(index).get("_class_name"))
    if pipeline in PIPELINE_FOREIGN:
        raise _refused(folder, PIPELINE_FOREIGN[pipeline])
    if pipeline not in PIPELINE_FAMILY:
        raise _refused(folder, f"a {pipeline[:80]}")
    family = PIPELINE_FAMILY[pipeline]
    unet = read_json(folder / "unet" / "config.json")
    channels = whole(folder / "unet" / "config.json", unet, "in_channels", 4)
    if channels != 4:
        raise _refused(folder, INPUT_CHANNELS.get(channels, f"a model with {channels} input channels"))
    width = whole(folder / "unet" / "config.json", unet, "cross_attention_dim", 1280)
    if width in CONTEXT_FOREIGN:
        raise _refused(folder, CONTEXT_FOREIGN[width])
    whole(folder / "unet" / "config.json", unet, "sample_size")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise _refused(folder, f"a {str(prediction)[:40].replace('_', '-')} model")
    return family


def schedule_of_file(header: Header) -> dict[str, Any]:
    """What a single file says of its noise schedule, in diffusers' names: marker keys ``v_pred`` and
    ``ztsnr`` (as ComfyUI reads them), or modelspec's prediction type."""
    says_v = header.metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
    schedule: dict[str, Any] = {}
    if "v_pred" in header.shapes or says_v:
        schedule["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        schedule["rescale_betas_zero_snr"] = True
    return schedule


def whole(path: Path, config: Mapping[str, Any], key: str, default: Any = None) -> int:
    """A key of a configuration that must be a whole number above 0, or ModelFileError naming both."""
    value = config.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ModelFileError(
            f"{path}: {key} = {str(value)[:80]} is not a whole number above 0",
            "the configuration is damaged, or of a kind that is not supported",
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file, bounded in size, as a table."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(f"{path} is too large for a configuration file", "get the model again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing", "the model's folder is incomplete: get it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} cannot be read: {type(error).__name__}", "get the model again"
        ) from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} is no table of settings", "get the model again")
    return content


def _context_width(header: Header) -> int:
    widths = {
        shape[1]
        for name, shape in header.shapes.items()
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(shape) == 2
    }
    return next(iter(widths)) if len(widths) == 1 else 0


def _family_of_width(path: Path, width: int) -> str:
    if width in CONTEXT_FOREIGN:
        raise _refused(path, CONTEXT_FOREIGN[width])
    if width not in CONTEXT_FAMILY:
        raise _refused(path, f"a model whose cross-attention reads {width} wide text states")
    return CONTEXT_FAMILY[width]


def _refused(path: Path, kind: str) -> ModelFileError:
    return ModelFileError(f"{path} is {kind}, which cannot be trained here", SUPPORTED)


def _sample(header: Header) -> str:
    names: Mapping[str, Any] = header.shapes
    first = next(iter(names), None)
    return f"its first tensor is {first[:80]}" if first else "it holds no tensors"
