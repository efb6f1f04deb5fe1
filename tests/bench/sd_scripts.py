"""sd-scripts' own step for the GPU bench: its command, a process of its own that is watched, what came of it.

The peak is what the driver shows beyond what was there before; a step's seconds are the time between two numbers
of its progress bar – its own average has the first step in it.  Options are those of every release since 0.8.0.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer.bases.families import KNOWN_BASES, is_miniature
from trainer.config import TrainConfig

SCRIPT = "sdxl_train_network.py"
BASES = "sdxl (from the hub), a hub id org/name, a diffusers folder or a .safetensors file"
PROGRESS = re.compile(r"steps:[^\r\n]*?(\d+)/\d+ \[")
LOOK_EVERY_SECONDS = 0.02
TAIL_CHARACTERS = 4000


def model_of(base: str) -> str | None:
    """What sd-scripts takes for a base of ours, or None."""
    if Path(base).expanduser().exists():
        return str(Path(base).expanduser().resolve())
    if base in KNOWN_BASES and not is_miniature(base):
        return KNOWN_BASES[base].hub
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None


def arguments(config: TrainConfig, model: str, steps: int, images: Path, output: Path) -> list[str]:
    """The words after the script's name."""
    words: Mapping[str, Any] = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": images,
        "output_dir": output,
        "resolution": f"{config.resolution},{config.resolution}",
        "caption_extension": ".txt",
        "train_batch_size": config.train_batch_size,
        "max_train_steps": steps,
        "network_module": "networks.lora",
        "network_dim": config.network_dim,
        "optimizer_type": config.optimizer_type,
        "learning_rate": 1e-4,
        "mixed_precision": "bf16",
    }
    flags = ["network_train_unet_only", "cache_latents", "cache_text_encoder_outputs", "sdpa"]
    flags += [name for name in ("gradient_checkpointing", "full_bf16", "fp8_base") if getattr(config, name)]
    found = [*(f"--{flag}" for flag in flags), *(f"--{name}={value}" for name, value in words.items())]
    return found + (["--network_args", f"conv_dim={config.conv_dim}"] if config.conv_dim else [])


def measure(config: TrainConfig, base: str, steps: int, scripts: Path) -> dict[str, Any]:
    """Peak and seconds a step of sd-scripts' run with these settings."""
    model = model_of(base)
    if model is None:
        return {"skipped": f"sd-scripts does not read {base}"}
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images" / f"{config.train_batch_size * steps}_zkw figure"
        images.mkdir(parents=True)
        Image.new("RGB", (config.resolution, config.resolution), "grey").save(images / "one.png")
        (images / "one.txt").write_text("a photo of zkw figure")
        words = arguments(config, model, steps, images.parent, Path(place))
        command = [sys.executable, str(scripts.resolve() / SCRIPT), *words]
        before = torch.cuda.mem_get_info()[0]
        seen = watch(
            command, scripts.resolve(), Path(place) / "output.txt", lambda: torch.cuda.mem_get_info()[0]
        )
    return outcome(seen, before)


@dataclass(frozen=True)
class Seen:
    """A process that has ended.  ``marks``: steps done, and when."""

    exit_code: int
    lowest_free_bytes: int
    marks: tuple[tuple[int, float], ...]
    last_words: str


def watch(command: Sequence[str], folder: Path, output: Path, free: Callable[[], int]) -> Seen:
    """Run a command and look at the card and at its progress bar until it ends.  What it says goes to a file:
    a pipe that nobody empties would stop it."""
    lowest, marks, read = free(), [(0, time.perf_counter())], ""
    with output.open("wb") as words, output.open("rb") as reader:
        process = subprocess.Popen(command, cwd=folder, stdout=words, stderr=subprocess.STDOUT)
        try:
            has_ended = False
            while not has_ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY_SECONDS)
                    has_ended = True
                lowest = min(lowest, free())
                read = (read + reader.read().decode(errors="replace"))[-TAIL_CHARACTERS:]
                done = max((int(found[1]) for found in PROGRESS.finditer(read)), default=0)
                if done > marks[-1][0]:
                    marks.append((done, time.perf_counter()))
        finally:
            process.kill()
            process.wait()
    return Seen(process.returncode, lowest, tuple(marks), read)


def step_seconds(marks: Sequence[tuple[int, float]]) -> float | None:
    """The middle one of the steps after the first, which also warms up."""
    later = [mark for mark in marks if mark[0] >= 1]
    each = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(later)]
    return round(statistics.median(each), 4) if each else None


def outcome(seen: Seen, free_before: int) -> dict[str, Any]:
    """A cell: figures, out of memory, or ``failed``, which the next call tries again."""
    if seen.exit_code:
        if "out of memory" in seen.last_words.lower():
            return {"skipped": "out of memory"}
        last = next((line for line in reversed(seen.last_words.splitlines()) if line.strip()), "")
        return {"failed": f"it ended with {seen.exit_code}: {last.strip()[-160:]}"}
    found: dict[str, Any] = {
        "peak_bytes": free_before - seen.lowest_free_bytes,
        "steps": seen.marks[-1][0],
    }
    seconds = step_seconds(seen.marks)
    return found if seconds is None else {**found, "step_seconds": seconds}
