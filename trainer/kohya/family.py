"""Which family a training file is for, before its base is loaded: ``detect`` tells, a file's own metadata helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.bases import detect
from trainer.errors import ConfigError
from trainer.kohya.trainfile import TrainFile
from trainer.text import clean_text


def known_family(file: TrainFile) -> str | None:
    """``family_of``, or None where neither name nor files tell."""
    try:
        return family_of(file)
    except ConfigError:
        return None


def family_of(file: TrainFile) -> str:
    """The family of the file's base, by its name or its files.  ConfigError where neither tells."""
    spec = file.config.pretrained_model_name_or_path
    found = detect.family_of_spec(spec, _metadata(file.path))
    if found is None:
        raise ConfigError(
            f"whether {clean_text(spec)} is SD1.5 or SDXL cannot be told",
            "name a base that is here with --base",
        )
    return found


def _metadata(path: Path) -> Mapping[str, str]:
    """What a LoRA file says of itself; a file of settings says nothing."""
    if path.suffix != ".safetensors":
        return {}
    from trainer.tensorfile import read_header  # loads torch

    return read_header(path).metadata
