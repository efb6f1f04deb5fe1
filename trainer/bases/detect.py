"""Detect the family of a model from names, shapes, metadata and configurations, before anything is loaded.

The only place that detects families of models (for LoRAs: ``architecture``); their distinguishing properties are in
``families``. The error for an unsupported model names its kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainer.bases.families import (
    FAMILIES,
    KNOWN_BASES,
    BaseFamily,
    is_miniature,
    known_base,
    published_name,
    short_names,
)
from trainer.checks import suggestion
from trainer.errors import MissingModel, ModelFileError
from trainer.reading import read_small

if TYPE_CHECKING:
    from trainer.tensorfile import Header

UNET = "model.diffusion_model."
SUPPORTED = "SD1.5 and SDXL bases and their fine-tunes are supported"
MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_JSON_BYTES = 1_000_000  # the largest configuration file of a published pipeline is a few KB

# Text in any key → what the file is instead of a base. The first match wins.
FOREIGN_KEYS = (
    (".lora_", "a LoRA"),
    ("lora_unet_", "a LoRA"),
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    ("control_model.", "a ControlNet"),
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "an SD3 model"),
)
# Marker key of a complete checkpoint → its kind.
MARKER_KEYS = {
    "edm_mean": "an EDM model (Playground)",
    "edm_vpred.sigma_max": "an EDM v-prediction model",
}
INPUT_CHANNELS = {9: "an inpainting model", 8: "an image-editing model (InstructPix2Pix)", 5: "a depth model"}
# Width of the text states in cross-attention → the unsupported kind.
CONTEXT_FOREIGN = {1024: "an SD2.x model", 1280: "the SDXL refiner"}
PIPELINE_FOREIGN = {
    "StableDiffusionXLImg2ImgPipeline": "the SDXL refiner",
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionXLInpaintPipeline": "an inpainting model",
    "StableDiffusion3Pipeline": "an SD3 model",
    "FluxPipeline": "a Flux model",
}


@dataclass(frozen=True)
class BaseConfigs:
    """The configurations of the networks of a base, without its weights."""

    name: str
    family: str
    folder: Path


def configs_of(spec: str) -> BaseConfigs | None:
    """The configurations of a short name or its hub id, a diffusers folder or a single file;
    None for anything else."""
    if base := known_base(spec):
        return BaseConfigs(spec, base.family, base.configs)
    from trainer.tensorfile import refuse_pickle  # loads torch

    path = Path(spec).expanduser()
    if not path.exists():
        return None
    if path.is_file():
        refuse_pickle(path)
    family = family_of_path(path)
    return BaseConfigs(path.name, family, path if path.is_dir() else FAMILIES[family].configs)


def locate(spec: str) -> Path | None:
    """The folder or file of a spec on this machine; None for a model of the hub. Raises ModelFileError for what is
    neither. Nothing is read or downloaded."""
    if is_miniature(spec):
        if not KNOWN_BASES[spec].folder.is_dir():
            raise ModelFileError(f"the weights of {spec} are not installed", "reinstall lora-hpo")
        return KNOWN_BASES[spec].folder
    path = Path(spec).expanduser()
    if path.exists():
        from trainer.tensorfile import refuse_pickle  # loads torch

        refuse_pickle(path)
        if path.is_file() and path.suffix.lower() != ".safetensors":
            raise ModelFileError(
                f"{path.name} is not a model file", "give a .safetensors file, a diffusers folder or a name"
            )
        return path
    looks_like_path = (
        path.suffix.lower() in MODEL_ENDINGS or spec.startswith((".", "/", "~")) or spec.count("/") > 1
    )
    if looks_like_path:
        raise MissingModel(f"there is no file or folder {spec}", "check the path")
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", published_name(spec)):
        raise MissingModel(
            f"there is no base {spec!r}",
            suggestion(spec, short_names())
            or f"give {', '.join(short_names())}, a hub id org/name, a folder or a file",
        )
    return None


def short_name(spec: str) -> str:
    """The name of a base without its path."""
    return Path(spec).name if Path(spec).expanduser().exists() else spec


def prediction_of(spec: str) -> str | None:
    """What a base says that it predicts, ``epsilon`` or ``v_prediction``, before it is loaded; None for a model of the
    hub without a short name."""
    known = known_base(spec)
    if known is not None and "prediction_type" in known.schedule:
        return str(known.schedule["prediction_type"])
    path = locate(spec)
    if path is None:
        return None if known is None else "epsilon"
    if path.is_dir():
        schedule = read_json(path / "scheduler" / "scheduler_config.json")
    else:
        from trainer.tensorfile import read_header

        schedule = schedule_of_file(read_header(path))
    return str(schedule.get("prediction_type", "epsilon"))


def family_of_spec(spec: str, metadata: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """The family of a base that may not be on this machine: from its short name, else its files, else the
    metadata of a LoRA trained on it, else a guess from its name. None if unknown."""
    if spec in KNOWN_BASES:
        return KNOWN_BASES[spec].family
    path = Path(spec).expanduser()
    if path.exists():
        return family_of_path(path)
    if (told := _family_of_metadata(metadata)) is not None:
        return told
    if base := known_base(spec):
        return base.family
    return _last(family for family in FAMILIES.values() if any(m in spec.lower() for m in family.model_marks))


def family_of_path(path: Path) -> str:
    """The family of a diffusers folder or a single file."""
    from trainer.tensorfile import read_header  # loads torch

    return family_of_folder(path) if path.is_dir() else family_of_file(path, read_header(path))


def family_of_file(path: Path, header: Header) -> str:
    """The family of a single file in the original layout. Raises ModelFileError that names what the file is."""
    for text, kind in FOREIGN_KEYS:
        if any(text in name for name in header.shapes):
            raise _refused(path, kind)
    for key, kind in MARKER_KEYS.items():
        if key in header.shapes:
            raise _refused(path, kind)
    first = header.shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise ModelFileError(
            f"{path} has no U-Net in the original layout ({_sample(header)})",
            "give a full checkpoint, or the diffusers folder that this file belongs to",
        )
    if len(first) == 4 and first[1] in INPUT_CHANNELS:
        raise _refused(path, INPUT_CHANNELS[first[1]])
    family = _family_of_width(path, _context_width(header))
    for beginning, what in FAMILIES[family].file_parts.items():
        if not any(name.startswith(beginning) for name in header.shapes):
            raise ModelFileError(
                f"{path} has no {what}: it contains only part of a model", "give a full checkpoint"
            )
    return family


def family_of_folder(folder: Path) -> str:
    """The family of a diffusers folder. Raises ModelFileError that names what the folder is."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelFileError(
            f"{folder} is not a diffusers folder: it has no model_index.json",
            "give the folder with unet/, vae/ and text_encoder/, or a single .safetensors file",
        )
    pipeline = str(read_json(index).get("_class_name"))
    if pipeline in PIPELINE_FOREIGN:
        raise _refused(folder, PIPELINE_FOREIGN[pipeline])
    family = _last(family for family in FAMILIES.values() if pipeline in family.pipelines)
    if family is None:
        raise _refused(folder, f"a {pipeline[:80]}")
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
    """The noise schedule settings in a single file, under diffusers' names: from the marker keys ``v_pred``
    and ``ztsnr`` (as ComfyUI does), or from modelspec's prediction type."""
    says_v = header.metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
    schedule: dict[str, Any] = {}
    if "v_pred" in header.shapes or says_v:
        schedule["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        schedule["rescale_betas_zero_snr"] = True
    return schedule


def whole(path: Path, config: Mapping[str, Any], key: str, default: Any = None) -> int:
    """The value of a configuration key that must be a whole number above 0. Raises ModelFileError
    with key and value."""
    value = config.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ModelFileError(
            f"{path}: {key} = {str(value)[:80]} is not a whole number above 0",
            "the configuration is damaged, or this kind of model is not supported",
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON configuration file as a dict, with a size limit."""
    try:
        content = json.loads(read_small(path, MAX_JSON_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} is missing", "the model folder is incomplete; download it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} cannot be read: {type(error).__name__}", "download the model again"
        ) from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} does not contain a JSON object", "download the model again")
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
    family = _last(family for family in FAMILIES.values() if family.context_width == width)
    if family is None:
        raise _refused(path, f"a model with text states of width {width} in cross-attention")
    return family


def _family_of_metadata(metadata: Mapping[str, str]) -> str | None:
    version = metadata.get("ss_base_model_version", "")
    return _last(f for f in FAMILIES.values() if version.startswith(f.kohya_version_start))


def _last(families: Iterable[BaseFamily]) -> str | None:
    return next((family.name for family in reversed(list(families))), None)


def _refused(path: Path, kind: str) -> ModelFileError:
    return ModelFileError(f"{path} is {kind}, which is not supported", SUPPORTED)


def _sample(header: Header) -> str:
    names: Mapping[str, Any] = header.shapes
    first = next(iter(names), None)
    return f"its first tensor is {first[:80]}" if first else "it holds no tensors"
