"""A stand-in for nvidia-ml-py, for processes whose PYTHONPATH begins with this folder: one GPU.

Its figures are in the JSON file that FAKE_NVML names.  ``"lost": true`` makes every question fail, as for a card that
fell off the bus."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_TEMPERATURE_GPU = 0


class NVMLError(Exception):
    """As the binding's."""


def _figures() -> dict[str, Any]:
    values = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    if values.get("lost"):
        raise NVMLError("GPU is lost")
    return dict(values)


def nvmlInit() -> None:
    _figures()


def nvmlShutdown() -> None: ...


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    return uuid


def nvmlDeviceGetMemoryInfo(handle: Any) -> Any:
    values = _figures()
    return SimpleNamespace(used=values["used"], total=values["total"])


def nvmlDeviceGetUtilizationRates(handle: Any) -> Any:
    return SimpleNamespace(gpu=_figures()["busy"])


def nvmlDeviceGetTemperature(handle: Any, sensor: int) -> int:
    return int(_figures()["celsius"])
