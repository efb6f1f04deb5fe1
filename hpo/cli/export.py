"""``hpo export kohya``: a file, a LoRA or a run as sd-scripts' config.toml and dataset.toml.

Owns which family and which model name sd-scripts is told; the files are ``trainer.kohya.export``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.files import clean_text
from trainer.kohya import export as kohyaexport
from trainer.kohya.trainfile import TrainFile, read_train_file

FAMILIES = {"mini-sd15": "sd15", "mini-sdxl": "sdxl", "sd15": "sd15", "sdxl": "sdxl"}


def export_kohya(source: Path, folder: Path, places: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the files and say what differs and how to start."""
    file = read_train_file(source, places=places).require_all()
    spec = file.config.pretrained_model_name_or_path
    family, base = family_of(file), spec
    if spec in ("sd15", "sdxl"):
        from trainer.bases.load import HUB_NAMES

        base = HUB_NAMES[spec]
    elif spec in FAMILIES:
        say(
            f"note: {spec} comes with this tool and sd-scripts cannot load it; set pretrained_model_name_or_path"
        )
    if family == "sdxl" and file.config.clip_skip is not None:
        say("note: sd-scripts ignores clip_skip on SDXL, as this tool does")
    found = kohyaexport.export(file.config, family, base, folder, file.output_dir or "output")
    kohyaexport.write(found, folder)
    for note in found.notes:
        say(f"note: {note}")
    names = (kohyaexport.CONFIG, kohyaexport.DATASET, kohyaexport.COMMAND)
    say(f"written: {', '.join(str(folder / name) for name in names)}")
    say(found.command)


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
