"""The CPU's threads, shared by the processes of this user that work at the same time.

PyTorch starts as many threads as there are cores, in every process.  With several processes each parallel loop then
waits for threads that do not run, in a busy loop.  So each process takes its part: cores divided by living
processes, at least one, when it starts and before every trial.

A sum computed by several threads is added in another order than by one, so on a CPU the last bits of a training
depend on the number of threads (measured: docs/devices.md).  A training that was begun therefore goes on with the
number it began with.  On a GPU the number does not matter to the result.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path

from hpo.machine import registry

LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # set by the user: nothing is changed then
_CGROUPS = ("sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
# Workers of one command, of which this process is one: some may not have started yet, or start again.
WORKERS: ContextVar[int] = ContextVar("WORKERS", default=1)
_set: list[int] = []  # what this module set last
_alone: list[int] = []  # the number for a process that is alone


def share_threads(begun_with: int | None = None) -> int:
    """Register this process, and set the number of PyTorch's threads to its part.  Returns the number.

    ``begun_with``: what the work was begun with, which is kept for the sake of the same bits.
    """
    import torch

    living = max(registry.enter(), WORKERS.get())
    now = torch.get_num_threads()
    if any(os.environ.get(name) for name in LIMITS):
        return now
    if _set != [now]:  # somebody else has set it: the program that uses this package as a library
        _alone[:] = [min(now, allowed_cores())]
    wanted = begun_with or part(_alone[0], living)
    if wanted != now:
        torch.set_num_threads(wanted)
    _set[:] = [wanted]
    return wanted


def part(cores: int, living: int) -> int:
    """The threads of one of ``living`` processes."""
    return max(1, cores // max(1, living))


def allowed_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity, and the limit of its container (``docker --cpus``)."""
    cores = len(os.sched_getaffinity(0))
    for name in _CGROUPS:
        try:
            words = (root / name).read_text().split()
            quota = float(words[0])
            period = words[1] if len(words) > 1 else (root / name).with_name("cpu.cfs_period_us").read_text()
            limit = quota / float(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # no limit ("max"), or no such file
            continue
        if limit > 0:
            cores = min(cores, max(1, int(limit)))
    return max(1, cores)
