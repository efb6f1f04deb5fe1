"""What a base's files do not say and a run's settings do: v-prediction and zero terminal SNR.

A base that says what it predicts, by its keys, its metadata, its scheduler or its short name, is believed. One that
says nothing is taken for what the settings train it for, as in sd-scripts, which always believes the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.bases import detect
from trainer.bases.families import known_base
from trainer.config import TrainConfig


def said_prediction(spec: str) -> str | None:
    """What a base on this machine says that it predicts, ``epsilon`` or ``v_prediction``; None if it says nothing.

    Every published base with a short name says it. Raises ModelFileError for a file that cannot be read.
    """
    known = known_base(spec)
    path = None if known is not None and not known.is_miniature else detect.locate(spec)
    if path is None:
        return None if known is None else detect.prediction_of(spec)
    return said_at(path)


def said_at(path: Path) -> str | None:
    """The same for a folder or file."""
    if path.is_dir():
        found = detect.read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type")
        return None if found is None else str(found)
    from trainer.tensorfile import read_header  # loads torch

    header = read_header(path)
    if "prediction_type" in (schedule := detect.schedule_of_file(header)):
        return str(schedule["prediction_type"])
    is_noise = header.metadata.get("modelspec.prediction_type") in ("epsilon", "eps")
    return "epsilon" if is_noise else None


def assumed_schedule(said: str | None, config: TrainConfig | None) -> Mapping[str, Any]:
    """What the settings add to the noise schedule of a base that says ``said``, under diffusers' names."""
    if said is not None or config is None or not config.v_parameterization:
        return {}
    zero = {"rescale_betas_zero_snr": True} if config.zero_terminal_snr else {}
    return {"prediction_type": "v_prediction", **zero}


def assumption(name: str, said: str | None, config: TrainConfig) -> str:
    """One line about what is assumed; empty if nothing is."""
    if not assumed_schedule(said, config):
        return ""
    zero = "with" if config.zero_terminal_snr else "without"
    return (
        f"{name} does not say what it predicts: v-prediction {zero} zero terminal SNR is assumed, because "
        "v_parameterization is set"
    )
