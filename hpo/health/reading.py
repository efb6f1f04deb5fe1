"""What is measured at one moment, and the interface of what measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Gpu:
    """Figures of the GPU that a process uses.  None: the driver does not tell.

    ``busy``: percent of the last moment in which a kernel ran.  Memory is that of all programs.
    """

    celsius: float | None = None
    busy: float | None = None
    used_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True)
class Reading:
    """Figures of the machine.  None: not known.

    ``ram_used``: percent.  ``disk_free_bytes``: on the disk of the run.  ``gpu``: None if the process uses none, or if
    it cannot be asked; then ``no_gpu`` says why.  ``process_busy``: percent of one CPU core that this process uses.
    """

    ram_used: float | None = None
    ram_available_bytes: int | None = None
    swap_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpu: Gpu | None = None
    no_gpu: str = ""
    process_busy: float | None = None


class Sensors(Protocol):
    """Measures.  ``read`` never raises; it may take long, if a driver hangs."""

    def read(self) -> Reading: ...
