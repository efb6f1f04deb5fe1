"""The figures of this machine: RAM, swap and CPU from psutil, the disk, and one GPU.

In a container, RAM is what its limit leaves: the kernel ends a process at that limit, however much the machine has.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hpo.health.nvml import Nvml
from hpo.health.reading import Reading
from trainer.files import free_bytes

CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (  # limit, in use, statistics with the part of the file cache that can be dropped, and its name there
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


class MachineSensors:
    """Measures this machine.  ``folder``: on the disk that the run writes to.  ``device``: that of the run."""

    def __init__(self, folder: Path, device: str = "cpu", uuid: str = "", nvml: Nvml | None = None) -> None:
        self._folder = folder
        index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else None
        self._nvml = nvml or (Nvml(uuid, index) if index is not None else None)
        self._process: Any = None

    def read(self) -> Reading:
        """Never raises."""
        gpu, why = self._nvml.read() if self._nvml is not None else (None, "")
        used, available, swap = _memory()
        disk = None
        with contextlib.suppress(OSError):
            disk = free_bytes(self._folder)
        return Reading(used, available, swap, disk, gpu, why, self._busy())

    def _busy(self) -> float | None:
        """Percent of one core since the last call."""
        with contextlib.suppress(Exception):
            import psutil

            if self._process is None:
                self._process = psutil.Process()
                self._process.cpu_percent()
                return None
            return float(self._process.cpu_percent())
        return None


def _memory() -> tuple[float | None, int | None, int | None]:
    """Percent of RAM in use, bytes that are available, bytes of swap in use."""
    try:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    except Exception:  # /proc may be hidden
        return None, None, None
    total, available = int(memory.total), int(memory.available)
    limit = container_limit()
    if limit is not None and limit[0] < total:
        total, available = limit[0], min(available, limit[0] - limit[1])
    return 100 * (1 - available / total), available, int(swap.used)


def container_limit(root: Path = CGROUPS) -> tuple[int, int] | None:
    """Bytes of RAM that this container may use, and that it uses; None without a limit."""
    for limit, used, statistics, droppable in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            most = int((root / limit).read_text())  # "max": no number
            now = int((root / used).read_text())
            rows = dict(line.split()[:2] for line in (root / statistics).read_text().splitlines())
            return most, max(0, now - int(rows.get(droppable, 0)))
    return None
