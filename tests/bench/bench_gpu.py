"""Peak memory and seconds a step of the 20 LoRA and LoCon cells of the users' table, on this GPU: ours,
diffusers' way, and sd-scripts' own step where a copy is given.

    python -m tests.bench.bench_gpu --base sdxl --out bench/gpu [--sd-scripts DIR] [--only "dim 32"] [--steps 5]
    python -m tests.bench.bench_gpu --smoke --out bench/smoke      # tiny random base, CPU: no memory figures

* **ours**: ``trainer.loop.loop.train`` at 1024 × 1024 px with cached latents and text states.
* **diffusers**: a plain loop as in diffusers' ``train_dreambooth_lora_sdxl.py``: PEFT's LoraConfig on the
  attention projections, fp32 LoRA under bf16 autocast, 8-bit Adam, its own gradient checkpointing.  It has no
  fp8 base, no full bf16 and no LoCon: those cells are empty.
* **sd-scripts**: ``sdxl_train_network.py`` as a process of its own (``tests.bench.sd_scripts``).

Finished cells are kept in ``--out``/cells.json and not repeated, those that ran out of memory among them; one
that crashed is.  Every cell runs in a process of its own, so its peak is its own: from the first step on,
without what loading took.  Prints a Markdown table with the figures of users of sd-scripts 0.8.3 for
comparison (https://2ch-ai.gitgud.site/wiki/tech/sdxl, in Russian, 2024-02-09; GB are 10⁹ bytes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench import sd_scripts
from tests.fullsize import random_base
from tests.tiny import in_type, tiny_base, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases.base import Base, Sizes
from trainer.bases.load import load_base
from trainer.compute import fp8
from trainer.config import TrainConfig
from trainer.data.buckets import Bucket
from trainer.data.cache import Prepared
from trainer.errors import OutOfMemory
from trainer.events import Rehearsed, Step
from trainer.files import write_atomic
from trainer.loop.loop import Conduct, train
from trainer.oom import forget_peak, is_out_of_memory, peak_bytes, release

NAMES = ("ours", "diffusers", "sd-scripts")
DIFFUSERS_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Cell:
    """One cell of the users' table: which settings, how many images at once, their figure in GB."""

    row: str
    batch: int
    users_gb: float
    dim: int
    conv_dim: int | None = None
    checkpointing: bool = False
    full_bf16: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}, batch {self.batch}"

    def config(self, smoke: bool) -> TrainConfig:
        """U-Net only, 8-bit Adam, fp32 adapter unless full bf16."""
        return TrainConfig(
            resolution=64 if smoke else 1024,
            enable_bucket=False,
            train_batch_size=self.batch,
            network_type="LoCon" if self.conv_dim else "LoRA",
            network_dim=min(self.dim, 4) if smoke else self.dim,
            conv_dim=self.conv_dim and (2 if smoke else self.conv_dim),
            network_train_unet_only=True,
            optimizer_type="AdamW" if smoke else "AdamW8bit",
            mixed_precision="bf16",
            full_bf16=self.full_bf16,
            fp8_base=self.fp8,
            gradient_checkpointing=self.checkpointing,
        )


def _cells() -> Iterator[Cell]:
    rows: tuple[tuple[str, dict[str, Any], dict[int, float]], ...] = (
        ("LoRA dim 32", {"dim": 32}, {1: 17.4, 4: 47.7}),
        ("LoRA dim 32, full bf16", {"dim": 32, "full_bf16": True}, {1: 16.7}),
        ("LoRA dim 32, checkpointing", {"dim": 32, "checkpointing": True}, {1: 9.4, 2: 13.1}),
        (
            "LoRA dim 32, full bf16, checkpointing",
            {"dim": 32, "full_bf16": True, "checkpointing": True},
            {1: 9.1},
        ),
        ("LoRA dim 32, fp8 base, checkpointing", {"dim": 32, "fp8": True, "checkpointing": True}, {1: 6.4}),
        ("LoRA dim 128", {"dim": 128}, {1: 20.5, 3: 41.7}),
        ("LoRA dim 128, full bf16", {"dim": 128, "full_bf16": True}, {1: 18.3, 4: 47.8}),
        ("LoRA dim 128, checkpointing", {"dim": 128, "checkpointing": True}, {1: 12.0}),
        (
            "LoRA dim 128, full bf16, checkpointing",
            {"dim": 128, "full_bf16": True, "checkpointing": True},
            {1: 10.3, 4: 15.0},
        ),
        ("LoRA dim 128, fp8 base, checkpointing", {"dim": 128, "fp8": True, "checkpointing": True}, {1: 9.9}),
        ("LoCon dim 64 + conv 32", {"dim": 64, "conv_dim": 32}, {1: 18.6, 2: 30.4}),
        ("LoCon 64+32, checkpointing", {"dim": 64, "conv_dim": 32, "checkpointing": True}, {1: 10.6}),
        (
            "LoCon 64+32, full bf16, checkpointing",
            {"dim": 64, "conv_dim": 32, "full_bf16": True, "checkpointing": True},
            {1: 9.7},
        ),
        (
            "LoCon 64+32, fp8 base, checkpointing",
            {"dim": 64, "conv_dim": 32, "fp8": True, "checkpointing": True},
            {1: 7.2},
        ),
    )
    for row, values, figures in rows:
        for batch, users_gb in figures.items():
            yield Cell(row, batch, users_gb, **values)


CELLS = tuple(_cells())


def measure(
    kind: str, cell: Cell, base: str, steps: int, scripts: Path | None, smoke: bool
) -> dict[str, Any]:
    """Peak and step time of one cell, in this process."""
    if kind == "sd-scripts":
        if scripts is None or smoke:
            return {"skipped": "no sd-scripts"}
        return sd_scripts.measure(cell.config(False), base, steps, scripts)
    if kind == "diffusers" and (cell.fp8 or cell.full_bf16 or cell.conv_dim):
        return {"skipped": "diffusers' script has no such setting"}
    device = "cuda" if torch.cuda.is_available() and not smoke else "cpu"
    config = cell.config(smoke).with_values({"max_train_steps": steps, "max_train_epochs": None})
    try:
        loaded = tiny_base("sdxl") if smoke else _load(base, device)
        seconds = _measured(kind, loaded, config)
        peak = peak_bytes(loaded.device)
    except (RuntimeError, OutOfMemory) as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise
        return {"skipped": "out of memory"}
    middle = sorted(seconds[1:] or seconds)[len(seconds[1:] or seconds) // 2]
    return {"peak_bytes": peak, "step_seconds": round(middle, 4), "steps": len(seconds)}


def _load(base: str, device: str) -> Base:
    """A base in bf16; ``random sdxl`` is its full size with random weights."""
    if not base.startswith("random "):
        return load_base(base, device=device, dtype=torch.bfloat16)
    made = random_base(base.removeprefix("random "))
    in_type(made, torch.bfloat16)
    made.to(device)
    return made


def _measured(kind: str, base: Base, config: TrainConfig) -> list[float]:
    """Seconds of each step.  The peak is counted from here on: what loading, encoding and 8-bit conversion
    left in the allocator's cache is given back first."""
    prepared = random_images(base, config)
    for network in (base.vae, *base.text_encoders):
        torch.nn.Module.to(network, "cpu")
    if config.fp8_base:
        fp8.convert(base.unet)
    release(base.device)
    forget_peak(base.device)
    return (_ours if kind == "ours" else _diffusers)(base, config, prepared)


def random_images(base: Base, config: TrainConfig) -> Prepared:
    """As many images as a batch has, at the full resolution: what is measured does not depend on what they show."""
    prepared = tiny_prepared(base, config, images=config.train_batch_size)
    side = config.resolution // base.latent_factor_px
    for item in prepared.dataset.items:
        prepared.latents[item.sha256] = torch.randn(4, side, side)
        prepared.sizes[item.sha256] = Sizes(*[(config.resolution, config.resolution)] * 3)
        prepared.buckets[item.sha256] = Bucket(config.resolution, config.resolution)
    return prepared


def _ours(base: Base, config: TrainConfig, prepared: Prepared) -> list[float]:
    adapter = inject(base, config)
    events = train(config, base, adapter, prepared, Conduct(rehearse=True))
    seconds = []
    for event in events:
        assert not isinstance(event, Rehearsed) or event.bucket_px == (config.resolution,) * 2
        if isinstance(event, Step):
            seconds.append(event.seconds)
    return seconds


def _diffusers(base: Base, config: TrainConfig, prepared: Prepared) -> list[float]:
    """The step of train_dreambooth_lora_sdxl.py without its data loading and logging."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet, device = base.unet, base.device
    unet.to(torch.bfloat16)  # as loaded on a GPU
    unet.add_adapter(
        LoraConfig(r=config.network_dim, lora_alpha=config.network_dim, target_modules=DIFFUSERS_TARGETS)
    )
    cast_training_params([unet], dtype=torch.float32)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    if config.optimizer_type == "AdamW8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(weights, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(weights, lr=1e-4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    items = prepared.dataset.items
    latents = torch.stack([prepared.latents[item.sha256] for item in items]).to(device)
    states = prepared.text([item.caption for item in items])
    assert states is not None and states.pooled_BP is not None
    text, pooled = states.hidden_BLD.to(device), states.pooled_BP.to(device)
    side = float(config.resolution)
    ids = torch.tensor([[side, side, 0.0, 0.0, side, side]] * len(items), device=device)
    unet.train()
    seconds = []
    for _ in range(config.max_train_steps or 1):
        started = time.perf_counter()
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(items),), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(
                scheduler.add_noise(latents, noise, times),
                times,
                text,
                added_cond_kwargs={"time_ids": ids, "text_embeds": pooled},
            ).sample
        torch.nn.functional.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: peak in decimal GB and seconds a step, ours beside the others and the users' figure."""
    lines = ["| cell | users' GB | " + " | ".join(NAMES) + " |", "|---|---|" + "---|" * len(NAMES)]
    for cell in CELLS:
        found = [cells.get(f"{kind}: {cell.name}") for kind in NAMES]
        if any(found):
            shown = " | ".join(_shown(entry) for entry in found)
            lines.append(f"| {cell.name} | {cell.users_gb} | {shown} |")
    return "\n".join(lines)


def _shown(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    for why in ("skipped", "failed"):
        if why in entry:
            return str(entry[why])
    peak = entry.get("peak_bytes")
    memory = "not measured" if peak is None else f"{peak / 1e9:.1f} GB"
    return f"{memory}, {entry['step_seconds']:.2f} s" if "step_seconds" in entry else memory


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="sdxl", help=sd_scripts.BASES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--smoke", action="store_true", help="a tiny random base on the CPU")
    parser.add_argument("--cell", nargs=2, metavar=("KIND", "NAME"), help="one cell, as JSON on stdout")
    given = parser.parse_args(words)
    if given.sd_scripts and not (given.sd_scripts / sd_scripts.SCRIPT).is_file():
        parser.error(f"--sd-scripts {given.sd_scripts} has no {sd_scripts.SCRIPT}")
    if given.sd_scripts and sd_scripts.model_of(given.base) is None:
        parser.error(f"--base {given.base}: sd-scripts reads {sd_scripts.BASES}")
    by_name = {cell.name: cell for cell in CELLS}
    if given.cell:
        kind, name = given.cell
        found = measure(kind, by_name[name], given.base, given.steps, given.sd_scripts, given.smoke)
        print(json.dumps(found))
        return
    if not given.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device: use --smoke")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "cells.json"
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for cell in CELLS:
        for kind in NAMES:
            key = f"{kind}: {cell.name}"
            if given.only not in cell.name or (key in cells and "failed" not in cells[key]):
                continue
            if given.smoke:
                found = measure(kind, cell, given.base, given.steps, given.sd_scripts, True)
            else:
                found = _in_a_process(kind, cell, given)
            cells[key] = {**asdict(cell), **found}
            write_atomic(path, json.dumps(cells, indent=1))
    text = table(cells)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


def _in_a_process(kind: str, cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--base", given.base, "--out", str(given.out), "--steps", str(given.steps)]
    words += ["--sd-scripts", str(given.sd_scripts)] if given.sd_scripts else []
    result = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_gpu", *words, "--cell", kind, cell.name],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        return {"failed": f"it ended with {result.returncode}: {result.stderr.strip()[-160:]}"}
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
