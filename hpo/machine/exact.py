"""Deterministic mode: the same bits from the same command on the same GPU, at the price of speed.

Without it, CUDA's kernels add in an order that differs from run to run (atomic additions in backward passes), and
cuDNN may choose another algorithm.  docs/devices.md says what is promised with and without it.
"""

from __future__ import annotations

import os

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one workspace per stream, NVIDIA's documentation of cuBLAS
VARIABLE = "HPO_DETERMINISTIC"  # environment variable: 1 for all commands


def wants_deterministic() -> bool:
    """Whether the user asked for it."""
    return os.environ.get(VARIABLE, "") not in ("", "0", "no", "false")


def deterministic() -> bool:
    """Switch deterministic mode on if the user asked for it; before the first CUDA call.  Returns whether it is on.

    An operation without a deterministic kernel is computed by the usual one, and PyTorch warns about it.
    """
    if not wants_deterministic():
        return False
    import torch

    os.environ.setdefault(*CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return True
