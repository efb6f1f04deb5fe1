"""What is measured: NVML through its binding, the machine, and a container's limit."""

from __future__ import annotations

import time
import types
from pathlib import Path
from typing import Any

import pytest

from hpo.health.line import figure_words, fitted
from hpo.health.machine import MachineSensors, container_limit
from hpo.health.nvml import Nvml, visible


class Lost(Exception):
    pass


def library(**answers: Any) -> Any:
    """A module with the names of pynvml that are used.  An answer that is an exception is raised."""
    asked: list[Any] = []

    def answer(name: str) -> Any:
        def call(*words: Any) -> Any:
            asked.append((name, *words))
            value = answers.get(name)
            if isinstance(value, Exception):
                raise value
            return value

        return call

    names = (
        *("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"),
        *("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature"),
    )
    return types.SimpleNamespace(
        NVML_TEMPERATURE_GPU=0, asked=asked, **{name: answer(name) for name in names}
    )


MEMORY = types.SimpleNamespace(used=11, total=16)
RATES = types.SimpleNamespace(gpu=97)


def test_the_binding_has_the_names_that_are_used() -> None:
    import pynvml

    for name in vars(library()):
        assert name == "asked" or hasattr(pynvml, name), name
    gpu, why = Nvml("0" * 8).read()
    assert gpu is not None or why, "without a driver there is a reason"


def test_figures_come_from_the_gpu_of_this_process() -> None:
    nvml = library(
        nvmlDeviceGetMemoryInfo=MEMORY, nvmlDeviceGetUtilizationRates=RATES, nvmlDeviceGetTemperature=71
    )
    gpu, why = Nvml("8d3f-22", library=nvml).read()
    assert gpu is not None and not why
    assert (gpu.celsius, gpu.busy, gpu.used_bytes, gpu.total_bytes) == (71.0, 97.0, 11, 16)
    assert ("nvmlDeviceGetHandleByUUID", "GPU-8d3f-22") in nvml.asked


def test_what_the_driver_does_not_tell_is_left_out() -> None:
    nvml = library(
        nvmlDeviceGetMemoryInfo=MEMORY,
        nvmlDeviceGetUtilizationRates=Lost("Not Supported"),
        nvmlDeviceGetTemperature=Lost("Not Supported"),
    )
    gpu, _ = Nvml("x", library=nvml).read()
    assert gpu is not None and (gpu.celsius, gpu.busy, gpu.used_bytes) == (None, None, 11)


def test_a_gpu_that_is_lost_gives_a_reason_and_is_opened_again() -> None:
    lost = dict.fromkeys(
        ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature"),
        Lost("GPU is \x1b[2Jlost"),
    )
    nvml = library(**lost)
    watched = Nvml("x", library=nvml)
    assert watched.read() == (None, "GPU is [2Jlost") and watched.read()[0] is None
    assert [name for name, *_ in nvml.asked].count("nvmlInit") == 2
    assert Nvml("x", library=library(nvmlInit=Lost(""))).read() == (None, "Lost")


def test_the_number_of_a_gpu_follows_what_this_process_sees() -> None:
    assert visible(1, {}) == 1
    assert visible(1, {"CUDA_VISIBLE_DEVICES": "3, 5"}) == 5
    assert visible(0, {"CUDA_VISIBLE_DEVICES": "GPU-8d3f"}) == "GPU-8d3f"


def test_this_machine_has_plausible_figures(tmp_path: Path) -> None:
    sensors = MachineSensors(tmp_path / "not" / "there" / "yet")
    reading = sensors.read()
    assert reading.ram_used is not None and 0 < reading.ram_used < 100
    assert reading.ram_available_bytes and reading.disk_free_bytes and reading.swap_bytes is not None
    assert reading.gpu is None and not reading.no_gpu, "a run on the CPU asks no GPU"
    until = time.process_time() + 0.1  # the kernel counts in hundredths of a second
    while time.process_time() < until:
        pass
    assert (sensors.read().process_busy or 0) > 0


def test_a_containers_limit_is_its_ram(tmp_path: Path) -> None:
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 2\n")
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("10\n")
    assert container_limit(tmp_path) == (10, 3)


@pytest.mark.parametrize("everything", [False, True])
def test_the_line_shows_what_matters_and_fits(everything: bool) -> None:
    row = {
        "gpu_temperature": 88.0,
        "gpu_busy": 100.0,
        "vram_used": 15_900_000_000,
        "vram_total": 16_900_000_000,
        "ram_used": 71.0,
        "ram_available": 9_000_000_000,
        "swap": 0,
        "disk_free": 3_100_000_000,
        "levels": {"gpu_temperature": "danger", "ram_used": "warn", "disk": "warn"},
    }
    line = fitted(figure_words(row, everything=everything), 79)
    assert line.startswith("GPU 88 °C (!!), 100 % busy, 15.9 of 16.9 GB, RAM 71 % (!)") and len(line) <= 79
    assert figure_words({"ram_used": "x", "levels": 3, "no_gpu": "\x1b[2J"}) == ["GPU: [2J"]
