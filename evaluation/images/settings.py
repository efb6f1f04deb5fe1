"""SampleConfig: how scored images are drawn.

Owns the values, their defaults and limits, and which samplers there are.  Does not own sampling
(``evaluation.images.sampling``), which is not imported here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass
from typing import Any

from trainer.checks import setting
from trainer.errors import ConfigError

# DPM-Solver++(2M) is an ODE sampler: "20 steps high quality, quite good even in 10" (diffusers docs).
# Timesteps are spaced as in A1111 and ComfyUI: from pure noise at 999 down.
SAMPLERS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "linspace"},
}


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled. Part of the identity of a score, except for ``batch_size``."""

    width_px: int = setting(MISSING, low=8, high=4096, multiple_of=8)
    height_px: int = setting(MISSING, low=8, high=4096, multiple_of=8)
    steps: int = setting(20, low=1, high=1000)
    cfg: float = setting(7.0, low=1, high=100)
    sampler: str = setting("dpmpp_2m")
    negative: str = setting("")
    clip_skip: int | None = None
    batch_size: int = setting(8, low=1, high=1024)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler {self.sampler!r} is not known", "use one of " + ", ".join(SAMPLERS))
        if self.steps < 1 or self.batch_size < 1 or self.cfg < 1:
            raise ConfigError(
                "steps, batch size and cfg must be at least 1", "use for example 20 steps and cfg 7"
            )
        if self.width_px < 8 or self.height_px < 8 or self.width_px % 8 or self.height_px % 8:
            raise ConfigError(
                f"image size {self.width_px}×{self.height_px} px cannot be sampled", "give multiples of 8"
            )

    @property
    def hash(self) -> str:
        """sha256 of everything that decides the images. The batch size does not (on a CPU up to 1/255; on CUDA
        up to what its kernels of another batch size differ by, docs/devices.md)."""
        values = {k: v for k, v in asdict(self).items() if k != "batch_size"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
