"""One GPU as NVIDIA's management library shows it, through NVIDIA's own binding (nvidia-ml-py, module ``pynvml``).

The library is asked in the process that trains on the GPU anyway, in a thread beside the training: a driver that hangs
holds up that thread and nothing else.  ``hpo doctor`` asks in a process of its own (``hpo.machine.nvidia``).

    memory           nvmlDeviceGetMemoryInfo: of the whole card, with other programs
    utilisation      nvmlDeviceGetUtilizationRates: percent of the last period in which a kernel ran
    temperature      nvmlDeviceGetTemperature, NVML_TEMPERATURE_GPU
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from hpo.health.reading import Gpu
from trainer.text import clean_text


class Nvml:
    """The figures of one GPU.  ``uuid``: as PyTorch has it; otherwise the GPU at ``index`` of those that this process
    sees.  ``library``: the module, or what behaves like it.  Opened at the first use."""

    def __init__(self, uuid: str = "", index: int = 0, library: Any = None) -> None:
        self._uuid, self._index, self._library = uuid, index, library
        self._handle: Any = None

    def read(self) -> tuple[Gpu | None, str]:
        """The figures, or None and why there are none.  Never raises."""
        try:
            if self._handle is None:
                self._handle = self._opened()
        except (
            Exception
        ) as error:  # the binding raises NVMLError, and other things where it does not fit the driver
            return None, _why(error)
        asked, nvml = self._asked, self._library
        memory = asked(lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle))
        rates = asked(lambda: nvml.nvmlDeviceGetUtilizationRates(self._handle))
        celsius = asked(lambda: nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU))
        if memory is None and rates is None and celsius is None:
            why = self._last
            self.close()  # the driver may have been updated, or the card may be back later
            return None, why
        return (
            Gpu(
                celsius=None if celsius is None else float(celsius),
                busy=None if rates is None else float(rates.gpu),
                used_bytes=None if memory is None else int(memory.used),
                total_bytes=None if memory is None else int(memory.total),
            ),
            "",
        )

    _last = ""

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer, or None: under WSL and on some cards the driver does not tell everything."""
        try:
            return question()
        except Exception as error:
            self._last = _why(error)
            return None

    def _opened(self) -> Any:
        if self._library is None:
            import pynvml

            self._library = pynvml
        nvml = self._library
        nvml.nvmlInit()
        name = f"GPU-{self._uuid.removeprefix('GPU-')}" if self._uuid else visible(self._index)
        if isinstance(name, int):
            return nvml.nvmlDeviceGetHandleByIndex(name)
        return nvml.nvmlDeviceGetHandleByUUID(name)

    def close(self) -> None:
        if self._handle is not None:
            self._handle = None
            with contextlib.suppress(Exception):
                self._library.nvmlShutdown()


def visible(index: int, environment: Mapping[str, str] = os.environ) -> int | str:
    """The driver's number, or the UUID, of the GPU that is ``cuda:index`` in this process."""
    listed = [word.strip() for word in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    if index >= len(listed):
        return index
    return int(listed[index]) if listed[index].isdecimal() else listed[index]


def _why(error: Exception) -> str:
    return clean_text(str(error).strip() or type(error).__name__)[:120]
