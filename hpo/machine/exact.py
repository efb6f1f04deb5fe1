"""Deterministic mode: the same bits from the same command on the same GPU, at the price of speed.

Without it, CUDA's kernels add in an order that differs from run to run (atomic additions in backward passes), and
cuDNN may choose another algorithm.  docs/devices.md says what is promised with and without it.
"""

from __future__ import annotations

import os

from trainer.errors import ConfigError

CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one workspace per stream, NVIDIA's documentation of cuBLAS
VARIABLE = "HPO_DETERMINISTIC"  # environment variable: 1 for all commands


ON, OFF = ("1", "yes", "true", "on"), ("", "0", "no", "false", "off")


def wants_deterministic() -> bool:
    """Whether the user asked for it, in any of the usual words.  Raises ConfigError for others."""
    said = os.environ.get(VARIABLE, "")
    word = said.strip().lower()
    if word not in (*ON, *OFF):
        raise ConfigError(
            f"{VARIABLE}={said} is neither on nor off",
            f"give {', '.join(ON)}, or {', '.join(OFF[1:])}; without it, it is off",
        )
    return word in ON


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
