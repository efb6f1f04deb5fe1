"""Which family a training file is for, before its base is loaded."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import ConfigError
from trainer.kohya.trainfile import TrainFile
from trainer.text import clean_text

FAMILIES = {"mini-sd15": "sd15", "mini-sdxl": "sdxl", "sd15": "sd15", "sdxl": "sdxl"}


def known_family(file: TrainFile) -> str | None:
    """``family_of``, or None where neither name nor files tell."""
    try:
        return family_of(file)
    except ConfigError:
        return None


def family_of(file: TrainFile) -> str:
    """sd15 or sdxl: from the base's name or its files.  ConfigError where neither tells."""
    spec = file.config.pretrained_model_name_or_path
    if spec in FAMILIES:
        return FAMILIES[spec]
    path = Path(spec).expanduser()
    if path.exists():
        from trainer.bases import detect
        from trainer.tensorfile import read_header

        if path.is_dir():
            return detect.family_of_folder(path)
        return detect.family_of_file(path, read_header(path))
    if file.path.suffix == ".safetensors":
        from trainer.tensorfile import read_header

        version = read_header(file.path).metadata.get("ss_base_model_version", "")
        if version.startswith(("sdxl", "sd_v1")):
            return "sdxl" if version.startswith("sdxl") else "sd15"
    name = spec.lower()
    if "xl" in name:
        return "sdxl"
    if any(mark in name for mark in ("v1-5", "v1.5", "sd15", "sd1.5", "stable-diffusion-v1", "1.5")):
        return "sd15"
    raise ConfigError(
        f"whether {clean_text(spec)} is SD1.5 or SDXL cannot be told", "name a base that is here with --base"
    )
