"""Noise schedules: rescaling for zero terminal SNR.

Shapes: T training timesteps.  ᾱ is ``alphas_cumprod`` (T,).
"""

from __future__ import annotations

from torch import Tensor


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ with √ᾱ shifted and scaled so that the last value is 0 and the first is unchanged
    (arXiv 2305.08891 alg. 1)."""
    root_T = alphas_cumprod.sqrt()
    return ((root_T - root_T[-1]) * (root_T[0] / (root_T[0] - root_T[-1]))) ** 2
