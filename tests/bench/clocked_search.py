"""A command of ``hpo`` whose trials are clocked: how much of each trial's wall time its models compute.

    python -m tests.bench.clocked_search CLOCK.json [--random] search --base …

Writes one row for each trial: its number, seconds from its start until its result is stored and reported, and those
inside model compute: forward passes of U-Net, text encoders, VAE and scorers, backward passes, and steps of the
optimizer.  On a GPU, each is waited for, which makes the trial a little slower.  ``--random`` is for bases and
scorers with random weights: it leaves out the checks that judge what they show (see test_full_size_search).
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Seconds by part; of nested parts, only the outermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._depth = 0
        self._started = 0.0

    def enter(self) -> None:
        if self._depth == 0:
            self._started = self._now()
        self._depth += 1

    def leave(self, part: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds[part] += self._now() - self._started

    def around(self, owner: Any, name: str, part: str) -> None:
        """Clock every call of a method from now on."""
        method: Callable[..., Any] = getattr(owner, name)

        def clocked(*given: Any, **named: Any) -> Any:
            self.enter()
            try:
                return method(*given, **named)
            finally:
                self.leave(part)

        setattr(owner, name, clocked)

    @staticmethod
    def _now() -> float:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def clock_models(clock: Clock) -> None:
    """Clock everything that computes with a model."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import VisionTransformer
    from torch.optim import optimizer
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, Dinov2Model

    clock.around(UNet2DConditionModel, "forward", "unet")
    for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
        clock.around(encoder, "forward", "text encoder")
    for half in ("encode", "decode"):
        clock.around(AutoencoderKL, half, "vae")
    for scorer in (CLIP, CustomTextCLIP):
        for half in ("encode_image", "encode_text"):
            clock.around(scorer, half, "scorer")
    clock.around(VisionTransformer, "forward_intermediates", "scorer")
    clock.around(Dinov2Model, "forward", "scorer")
    clock.around(torch.Tensor, "backward", "backward")
    optimizer.register_optimizer_step_pre_hook(lambda *_: clock.enter())
    optimizer.register_optimizer_step_post_hook(lambda *_: clock.leave("optimizer"))


def clock_trials(clock: Clock, path: Path) -> None:
    """Write a row after each trial."""
    from hpo.search.worker import Worker

    rows: list[dict[str, Any]] = []
    work = Worker._do

    def clocked(self: Any, claim: Any) -> None:
        clock.seconds.clear()
        started = time.perf_counter()
        work(self, claim)
        wall = time.perf_counter() - started
        parts = {part: round(seconds, 4) for part, seconds in sorted(clock.seconds.items())}
        rows.append({"number": claim.trial.number, "seconds": round(wall, 4), "parts": parts})
        path.write_text(json.dumps(rows, indent=1))

    Worker._do = clocked  # type: ignore[method-assign]


def outside(row: dict[str, Any]) -> float:
    """The share of a trial's wall time outside model compute."""
    return float(1 - sum(row["parts"].values()) / row["seconds"])


def without_judgement() -> None:
    """Leave out the checks that random weights cannot pass."""
    from evaluation.score.anchors import Anchors
    from hpo.study import scoring

    scoring.self_test = lambda scorer, say: None  # type: ignore[assignment]
    Anchors.require_separable = lambda self: None  # type: ignore[method-assign]


def main(words: list[str]) -> None:
    path, *command = words
    from hpo.cli.main import main as hpo
    from hpo.cli.start import calm_libraries

    calm_libraries()
    if command[0] == "--random":
        command.pop(0)
        without_judgement()
    clock = Clock()
    clock_models(clock)
    clock_trials(clock, Path(path))
    hpo(command)


if __name__ == "__main__":
    main(sys.argv[1:])
