"""The family of a training file before its base is loaded, from ``detect`` and the metadata of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.bases import detect
from trainer.errors import ConfigError
from trainer.kohya.trainfile import TrainFile
from trainer.text import clean_text


def known_family(file: TrainFile) -> str | None:
    """Like ``family_of``, but None if the family is unknown."""
    try:
        return family_of(file)
    except ConfigError:
        return None


def family_of(file: TrainFile) -> str:
    """The family of the base of a training file, from its name or its files. Raises ConfigError if unknown."""
    spec = file.config.pretrained_model_name_or_path
    found = detect.family_of_spec(spec, _metadata(file.path))
    if found is None:
        raise ConfigError(
            f"whether {clean_text(spec)} is SD1.5 or SDXL is unknown",
            "give a base that is on this machine with --base",
        )
    return found


def _metadata(path: Path) -> Mapping[str, str]:
    """The metadata of a LoRA file; empty for a settings file."""
    if path.suffix != ".safetensors":
        return {}
    from trainer.tensorfile import read_header  # loads torch

    return read_header(path).metadata
