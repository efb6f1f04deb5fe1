"""The first hour on a GPU, by one command: everything about a real card that a CPU cannot show.

    python -m tests.bench.first_hour --out bench/first_hour [--only cells] [--minutes 60] [--again failed]
    python -m tests.bench.first_hour --cpu --out bench/cpu       # the same parts, tiny, without a GPU

* **machine**: the card, its driver, versions.
* **tests**: the tests that need a GPU (``pytest -m gpu``).
* **steps**: seconds of a training step of SD1.5 and SDXL at full size (random weights), plain, compiled and in fp8, and
  what a profile of ten steps shows.
* **memory**: an allocation that fails in each of its forms during a real step, and whether it is recognised and the
  next step works.
* **sampling**: images a second and memory by the number of images drawn at once.
* **search**: a study of three trials of full-size SD1.5, beside a script for each trial (``tests.bench.throughput``).
* **cells**: peak memory of the 20 cells of the users' table (``tests.bench.bench_gpu``), predicted and measured.

Each part, and each cell, is a process of its own with its own time limit; one that fails is reported and does not end
the rest.  Finished ones are kept in ``--out``/first_hour.json, so the same command goes on where it was broken off: a
part that the end of the hour cut off runs again. One that failed, or needed more than its own limit, runs again with
``--again failed``. The page is ``--out``/first_hour.md.  No weights are downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.places import ROOT
from trainer.files import write_atomic

MINUTES = 60.0
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "open-clip-torch")
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the hour: what it measures, its limit, and how its result is shown."""

    name: str
    minutes: float
    measure: Callable[[bool, Path], Row]
    show: Callable[[Row], list[str]]
    so_far: Callable[[Path], Row] | None = None  # what it kept before it was ended: it goes on from there


# machine


def machine(cpu: bool, place: Path) -> Row:
    import torch

    found: Row = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "cores": os.cpu_count(),
    }
    if cpu:
        return {**found, "card": "none (--cpu)"}
    card = torch.cuda.get_device_properties(0)
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        **found,
        "card": card.name,
        "memory_gb": card.total_memory / 1e9,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "kernels": torch.cuda.get_arch_list(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else "unknown",
    }


def show_machine(found: Row) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rows = {key: value for key, value in found.items() if key not in ("versions", "part", "seconds")}
    return [*(f"* {key}: {value}" for key, value in rows.items()), f"* versions: {versions}"]


# tests


def gpu_tests(cpu: bool, place: Path) -> Row:
    where = ["tests/e2e/test_gpu_memory.py"] if cpu else ["tests"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip()]
    words = ("FAILED", "ERROR", "SKIPPED")
    return {
        "code": done.returncode,
        "line": lines[-1] if lines else "",
        "said": [line[:200] for line in lines if line.startswith(words)],
    }


def show_tests(found: Row) -> list[str]:
    return [f"pytest ended with {found['code']}: {found['line']}", *(f"* {line}" for line in found["said"])]


# bases


def random_on(family: str, cpu: bool) -> Any:
    """A full-size base with random weights on the GPU in bf16; a tiny one for --cpu."""
    import torch

    from tests.fullsize import random_base
    from tests.tiny import in_type, tiny_base

    if cpu:
        return tiny_base(family)
    base = random_base(family)
    in_type(base, torch.bfloat16)
    base.to("cuda")
    return base


def prepared_for(base: Any, config: Any) -> Any:
    """As many images of random latents as a batch has, in the settings' resolution."""
    from tests.bench.bench_gpu import random_images

    return random_images(base, config)


# steps


def _step_settings(cpu: bool) -> dict[str, tuple[str, Row]]:
    sd15: Row = {"resolution": 512, "train_batch_size": 4, "network_dim": 16, "network_alpha": 8}
    sdxl: Row = {
        "resolution": 1024,
        "train_batch_size": 1,
        "network_dim": 32,
        "network_train_unet_only": True,
    }
    sdxl |= {"gradient_checkpointing": True}
    if cpu:
        sd15 |= {"resolution": 64, "network_dim": 2, "network_alpha": 1}
        sdxl |= {"resolution": 128, "network_dim": 2}
    table = {
        "SD1.5, text encoder trained": ("sd15", sd15),
        "SD1.5, text encoder trained, compiled": ("sd15", {**sd15, "torch_compile": True}),
        "SDXL, U-Net only, checkpointing": ("sdxl", sdxl),
        "SDXL, U-Net only, checkpointing, compiled": ("sdxl", {**sdxl, "torch_compile": True}),
        "SDXL, U-Net only, checkpointing, AdamW8bit": ("sdxl", {**sdxl, "optimizer_type": "AdamW8bit"}),
        "SDXL, U-Net only, checkpointing, fp8 base": ("sdxl", {**sdxl, "fp8_base": True}),
    }
    return {name: value for name, value in table.items() if not (cpu and "compiled" in name)}


def steps(cpu: bool, place: Path) -> Row:
    """Median seconds of a step, from the fourth on, and a profile of the first entry."""
    found: Row = {}
    base, family_of = None, ""
    for name, (family, values) in _step_settings(cpu).items():
        if family != family_of or base is None or values.get("fp8_base"):
            if base is not None:
                base.free()
            base, family_of = random_on(family, cpu), family
        found[name] = _step_seconds(base, values, cpu)
        if len(found) == 1:
            found[name]["profile"] = _profile(base, values, cpu)
    return {"steps": found}


def _config(values: Row, count: int) -> Any:
    from trainer.config import TrainConfig

    usual = {"enable_bucket": False, "optimizer_type": "AdamW", "mixed_precision": "bf16"}
    return TrainConfig(**{**usual, **values, "max_train_steps": count, "max_train_epochs": None})


def _trained(base: Any, values: Row, count: int) -> Iterator[Any]:
    """The events of a run of so many steps."""
    from trainer.adapters.adapter import inject
    from trainer.compute import fp8
    from trainer.loop.loop import train

    config = _config(values, count)
    if config.fp8_base and not fp8.holds_fp8(base.unet):
        fp8.convert(base.unet)
    adapter = inject(base, config)
    try:
        yield from train(config, base, adapter, prepared_for(base, config))
    finally:
        adapter.remove()


def _step_seconds(base: Any, values: Row, cpu: bool) -> Row:
    from trainer.events import Step
    from trainer.oom import forget_peak, peak_bytes, release

    count = 4 if cpu else 13
    release(base.device)
    forget_peak(base.device)
    seconds = [event.seconds for event in _trained(base, values, count) if isinstance(event, Step)]
    return {
        "seconds": statistics.median(seconds[3:]),
        "first": sum(seconds[:3]),
        "peak_bytes": peak_bytes(base.device),
    }


def _profile(base: Any, values: Row, cpu: bool) -> Row:
    """Kernels, copies and waits of a step, and what takes longest, from ten steps after three others."""
    import torch
    from torch.profiler import ProfilerActivity

    from trainer.events import Step

    count = 2 if cpu else 10
    activities = [ProfilerActivity.CPU, *([] if cpu else [ProfilerActivity.CUDA])]
    done = 0
    with contextlib.ExitStack() as stack:
        profile: Any = None
        for event in _trained(base, values, 3 + count):
            done += isinstance(event, Step)
            if done == 3 and profile is None:
                profile = stack.enter_context(torch.profiler.profile(activities=activities))
    averages = profile.key_averages()
    named = {row.key: row.count for row in averages}
    on = "self_cpu_time_total" if cpu else "self_device_time_total"
    longest = sorted(averages, key=lambda row: -float(getattr(row, on)))[:12]
    return {
        "launches": sum(n for name, n in named.items() if "LaunchKernel" in name) / count,
        "copies": sum(n for name, n in named.items() if name == "cudaMemcpyAsync") / count,
        "waits": sum(n for name, n in named.items() if "Synchronize" in name) / count,
        "longest": [[row.key[:70], getattr(row, on) / 1e3 / count, row.count / count] for row in longest],
    }


def show_steps(found: Row) -> list[str]:
    lines = ["| step | ms | as a ratio | first three, s | peak GB |", "|---|---|---|---|---|"]
    firsts: dict[str, float] = {}
    for name, row in found["steps"].items():
        first = firsts.setdefault(name.split(",")[0], row["seconds"])
        ratio, peak = f"{row['seconds'] / first:.2f}", _gb(row["peak_bytes"])
        lines.append(f"| {name} | {row['seconds'] * 1e3:.1f} | {ratio} | {row['first']:.1f} | {peak} |")
    for name, row in found["steps"].items():
        plain = found["steps"].get(name.removesuffix(", compiled"))
        if name.endswith(", compiled") and plain:
            saved = plain["seconds"] - row["seconds"]
            more = row["first"] - plain["first"]
            words = f"pays from {more / saved:.0f} steps on" if saved > 0 else "never pays"
            lines += ["", f"{name}: compiling takes {more:.0f} s once and {words}."]
    for name, row in found["steps"].items():
        if profile := row.get("profile"):
            lines += [
                "",
                f"A step of {name}: {profile['launches']:.0f} kernel launches, {profile['copies']:.0f} copies, "
                f"{profile['waits']:.0f} waits.",
                "",
                "| operation | ms a step | calls a step |",
                "|---|---|---|",
            ]
            lines += [f"| `{key}` | {ms:.2f} | {calls:.1f} |" for key, ms, calls in profile["longest"]]
    return lines


# memory that runs out


def memory(cpu: bool, place: Path) -> Row:
    """Each form of a failed allocation, in a process of its own."""
    forms = ["allocation"] if cpu else ["allocation", "cublas", "cudnn", "kernel"]
    found: Row = {}
    for form in forms:
        words = ["--failure", form, *(["--cpu"] if cpu else [])]
        found[form] = _child(words, place / f"failure_{form}.log", 120.0, nested=True)
    return {"forms": found}


def failure(form: str, cpu: bool) -> Row:
    """Let an allocation fail, then train: what was raised, whether it is recognised, whether training works."""
    import torch

    from trainer.errors import OutOfMemory
    from trainer.events import Step
    from trainer.oom import is_out_of_memory, release

    values: Row = (
        {"resolution": 64, "network_dim": 2, "train_batch_size": 1}
        if cpu
        else {
            "resolution": 512,
            "network_dim": 16,
            "train_batch_size": 1,
        }
    )
    raised: BaseException | None = None
    base = random_on("sd15", cpu) if cpu or form == "allocation" else None
    try:
        _fail(form, base, values, cpu)
    except (RuntimeError, OutOfMemory) as error:
        raised = error.with_traceback(None)
    if raised is None:
        return {"raised": "nothing", "recognised": False, "goes_on": False}
    kind, text = type(raised).__name__, str(raised).splitlines()[0][:160]
    recognised = isinstance(raised, OutOfMemory) or is_out_of_memory(raised)
    release(torch.device("cpu" if cpu else "cuda"))
    try:
        base = base or random_on("sd15", cpu)
        goes_on = any(isinstance(event, Step) for event in _trained(base, values, 1))
    except (RuntimeError, OutOfMemory) as error:
        goes_on, text = False, f"{text}; then {str(error).splitlines()[0][:120]}"
    return {"raised": f"{kind}: {text}", "recognised": recognised, "goes_on": goes_on}


def _fail(form: str, base: Any, values: Row, cpu: bool) -> None:
    """Raise what a full card raises.  Everything that fills it is local: it is free again afterwards."""
    import torch

    if cpu:
        torch.empty(1 << 60)
        return
    few = torch.ones(1 << 12, device="cuda")  # the context exists; no library does
    left = 64 << 20 if form == "allocation" else 0
    ballast = _fill(left)
    try:
        if form == "allocation":
            list(_trained(base, values, 1))
        elif form == "cublas":
            few.view(64, 64) @ few.view(64, 64)
        elif form == "cudnn":
            torch.nn.functional.conv2d(few.view(1, 1, 64, 64), few[:9].view(1, 1, 3, 3))
        else:  # a kernel that was not loaded yet
            torch.linalg.svd(few.view(64, 64))
        torch.cuda.synchronize()
    finally:
        ballast.clear()


def _fill(left: int) -> list[Any]:
    """Tensors that leave about so many bytes of the card."""
    import torch

    ballast: list[Any] = []
    size = 1 << 30
    while size >= 1 << 20:
        free, _total = torch.cuda.mem_get_info()
        if free - left < size:
            size >>= 1
            continue
        try:
            ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size >>= 1
    return ballast


def show_memory(found: Row) -> list[str]:
    lines = ["| form | raised | recognised | the next step works |", "|---|---|---|---|"]
    for form, row in found["forms"].items():
        if why := row.get("failed"):
            lines.append(f"| {form} | the process ended: {_cell(why)} | | |")
            continue
        shown = ["yes" if row[key] else "**no**" for key in ("recognised", "goes_on")]
        lines.append(f"| {form} | {_cell(row['raised'])} | {' | '.join(shown)} |")
    return lines


# sampling


def sampling(cpu: bool, place: Path) -> Row:
    """Images a second by how many are drawn at once."""
    import torch

    from evaluation.images import default_config, sample
    from evaluation.prompts.prompts import PromptSet, make_prompt
    from trainer.oom import forget_peak, is_out_of_memory, peak_bytes, release

    found: Row = {}
    for family, sizes in (("sd15", (1, 2, 4, 8, 16, 32)), ("sdxl", (1, 2, 4, 8))):
        base = random_on(family, cpu)
        for size in sizes[: 2 if cpu else None]:
            prompts = tuple(
                make_prompt(f"{{trigger}} {{class}} {word}", "altered", "zkw", "figure")
                for word in ("at night", "in snow")
            )
            jobs = PromptSet(prompts, tuple(range(max(1, size // 2))), "zkw", "figure")
            config = default_config(base, steps=2 if cpu else 10, cfg=5.0, batch_size=size)
            release(base.device)
            forget_peak(base.device)
            row: Row = {}
            try:
                for _ in range(2):  # the first one also loads kernels
                    started = time.perf_counter()
                    sample(base, jobs, config, only_first_chunk=True)
                    if not cpu:
                        torch.cuda.synchronize()
                    row = {"seconds": (time.perf_counter() - started) / size}
                row["peak_bytes"] = peak_bytes(base.device)
            except Exception as error:
                if type(error).__name__ != "OutOfMemory" and not is_out_of_memory(error):
                    raise
                row = {"failed": "out of memory"}
            found[f"{family}, {size} at once"] = row
        base.free()
    return {"sizes": found}


def show_sampling(found: Row) -> list[str]:
    lines = ["| images | ms each (ten steps) | against one at once | peak GB |", "|---|---|---|---|"]
    firsts: dict[str, float] = {}
    for name, row in found["sizes"].items():
        if why := row.get("failed"):
            lines.append(f"| {name} | {why} | | |")
            continue
        first = firsts.setdefault(name.split(",")[0], row["seconds"])
        peak = _gb(row["peak_bytes"])
        lines.append(f"| {name} | {row['seconds'] * 1e3:.0f} | {row['seconds'] / first:.2f} | {peak} |")
    return lines


# search


def search(cpu: bool, place: Path) -> Row:
    from tests.bench import throughput

    place = place / "search"
    place.mkdir(parents=True, exist_ok=True)
    if cpu:
        small = throughput.miniature(place)
        job = replace(small.job, steps=3, sampling_steps=2, prompts=small.job.prompts[:2])
        setting = replace(small, job=job, trials=3, others=1)
    else:
        large = throughput.full_size(place, "cuda", side_px=512, steps=60)
        setting = replace(large, job=replace(large.job, batch=4, sampling_steps=20), trials=3, others=2)
    throughput.clear(place)
    return throughput.measure(setting, place, 1)


def show_search(found: Row) -> list[str]:
    from tests.bench import throughput

    return throughput.table(found).splitlines()


# the users' cells

CELLS_FILE = "cells.json"


def cells(cpu: bool, place: Path) -> Row:
    """Every cell in a process of its own; finished ones are kept."""
    from tests.bench.bench_gpu import CELLS
    from trainer.memory import base_facts, predict

    path = place / CELLS_FILE
    found: Row = cells_so_far(place)["cells"]
    facts = base_facts("sdxl")
    for cell in CELLS[: 2 if cpu else None]:
        if "failed" not in found.get(cell.name, {"failed": "not yet"}):
            continue
        predicted = None if cpu else predict(cell.config(False), facts).peak_bytes
        words = ["--cell", cell.name, *(["--cpu"] if cpu else [])]
        row = _child(words, place / "cell.log", 120.0, nested=True)
        found[cell.name] = {**row, "predicted": predicted, "users_gb": cell.users_gb}
        write_atomic(path, json.dumps(found, indent=1))
    return {"cells": found}


def cells_so_far(place: Path) -> Row:
    """The cells that are measured already."""
    path = place / CELLS_FILE
    return {"cells": json.loads(path.read_text()) if path.is_file() else {}}


def one_cell(name: str, cpu: bool) -> Row:
    from tests.bench import bench_gpu

    (cell,) = (cell for cell in bench_gpu.CELLS if cell.name == name)
    return bench_gpu.measure("ours", cell, "random sdxl", 4, None, cpu)


def show_cells(found: Row) -> list[str]:
    lines = ["| cell | users' GB | predicted | measured | predicted / measured | ms a step |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in found["cells"].items():
        known = [_gb(row.get("predicted")), _gb(row.get("peak_bytes"))]
        ratio = ""
        if row.get("peak_bytes") and row.get("predicted"):
            ratio = f"{row['predicted'] / row['peak_bytes']:.2f}"
        why = row.get("skipped") or row.get("failed")
        last = _cell(why) if why else f"{row['step_seconds'] * 1e3:.0f}"
        lines.append(f"| {name} | {row['users_gb']} | {' | '.join(known)} | {ratio} | {last} |")
    return lines


PARTS = (
    Part("machine", 1, machine, show_machine),
    Part("tests", 10, gpu_tests, show_tests),
    Part("steps", 9, steps, show_steps),
    Part("memory", 5, memory, show_memory),
    Part("sampling", 6, sampling, show_sampling),
    Part("search", 12, search, show_search),
    Part("cells", 17, cells, show_cells, cells_so_far),
)


def _gb(size_bytes: float | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 1e9:.1f}"


def _cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "/")


# Running parts


def _child(words: Sequence[str], log: Path, seconds: float, *, nested: bool = False) -> Row:
    """What a process of this module prints as its last line; {"failed": why} if it fails or takes too long
    (then with "timed_out").

    A part has a process group of its own, and the whole group ends with it.  ``nested``: a process that a part
    starts.  It stays in the part's group, so that it ends with the part and does not keep memory of the card.
    """
    command = [sys.executable, "-m", "tests.bench.first_hour", "--out", str(log.parent), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(log, "w+", encoding="utf-8") as errors:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=not nested,
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                child.kill() if nested else os.killpg(child.pid, signal.SIGKILL)

        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            end()
            child.communicate()
            return {"failed": f"it was ended after {seconds:.0f} s", "timed_out": True}
        except BaseException:
            end()
            raise
        errors.seek(0)
        text = errors.read().strip()
    lines = said.strip().splitlines()
    if child.returncode or not lines:
        return {"failed": f"it ended with {child.returncode}: {text[-300:]}"}
    found: Row = json.loads(lines[-1])
    return found


def run(
    parts: Sequence[Part], given: argparse.Namespace, measured: Callable[[Part, float], Row]
) -> dict[str, Row]:
    """Run what is not finished, as long as there is time, and write the page after each part."""
    path: Path = given.out / "first_hour.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("cpu", given.cpu) != given.cpu:
        raise SystemExit(f"{path} was begun {'with' if kept['cpu'] else 'without'} --cpu: give another --out")
    found: dict[str, Row] = kept.get("parts", {})
    started = time.monotonic()
    for part in parts:
        row = found.get(part.name)
        repeats = given.again == "all" or (given.again == "failed" and "failed" in (row or {}))
        if row is not None and "unfinished" not in row and not repeats:
            continue
        left = given.minutes * 60 - (time.monotonic() - started)
        if left < 5:
            print(f"{part.name}: no time left; the same command goes on here", flush=True)
            continue
        print(f"{part.name} (at most {min(part.minutes * 60, left) / 60:.0f} minutes) …", flush=True)
        begun = time.monotonic()
        limit = min(part.minutes * 60, left)
        row = _kept(part, measured(part, limit), limit, given.out)
        found[part.name] = {**row, "seconds": round(time.monotonic() - begun, 1)}
        write_atomic(path, json.dumps({"cpu": given.cpu, "parts": found}, indent=1))
        write_atomic(given.out / "first_hour.md", page(found, given))
        if why := row.get("failed") or row.get("unfinished"):
            print(f"{part.name}: {why}; {_again(row)}", flush=True)
    write_atomic(given.out / "first_hour.md", page(found, given))
    return found


def _kept(part: Part, row: Row, limit_s: float, place: Path) -> Row:
    """What is kept of a part: its result, why it failed, or that it is not finished, with what it has so far.

    A part that is ended before its own limit is not finished; nor is one that goes on from what it kept.
    """
    if "failed" not in row:
        return row
    row = dict(row)
    timed_out = row.pop("timed_out", False)
    so_far = part.so_far(place) if part.so_far else {}
    if timed_out and (limit_s < part.minutes * 60 or part.so_far):
        row["unfinished"] = row.pop("failed")
    return {**so_far, **row}


def _again(row: Row) -> str:
    if "unfinished" in row:
        return "it is not finished: the same command goes on with it"
    return "--again failed runs it again"


def page(found: Mapping[str, Row], given: argparse.Namespace) -> str:
    """The Markdown page of what is known so far."""
    where = "without a GPU: these figures say nothing about a card" if given.cpu else "on a GPU"
    words = ["--out", str(given.out), *(["--cpu"] if given.cpu else [])]
    lines = [f"# First hour {where}", "", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "]
    lines[-1] += f"`python -m tests.bench.first_hour {shlex.join(words)}`"
    for part in PARTS:
        row = found.get(part.name)
        lines += ["", f"## {part.name}", ""]
        if row is None:
            lines.append("Not run yet.")
        elif why := row.get("failed") or row.get("unfinished"):
            word = "Failed" if "failed" in row else "Not finished"
            lines.append(f"{word} after {row['seconds']} s: {_cell(why)}; {_again(row)}.")
            if part.so_far and any(row.get(key) for key in part.so_far(given.out)):
                lines += ["", "So far:", "", *part.show(row)]
        else:
            lines += [*part.show(row), "", f"({row['seconds']} s)"]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="the same parts, tiny, without a GPU")
    parser.add_argument("--only", choices=names, action="append", help="only this part (repeatable)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for this call")
    parser.add_argument("--again", choices=["failed", "all"], help="repeat parts that have a result")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--failure", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    given.out = given.out.resolve()
    if given.cell:
        print(json.dumps(one_cell(given.cell, given.cpu)))
        return
    if given.failure:
        print(json.dumps(failure(given.failure, given.cpu)))
        return
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out} cannot be made: {error.strerror}; give another folder")
    by_name = {part.name: part for part in PARTS}
    if given.part:
        print(json.dumps(by_name[given.part].measure(given.cpu, given.out)))
        return
    if not given.cpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU: hpo doctor says why; --cpu tries this command without one")

    def measured(part: Part, seconds: float) -> Row:
        words = ["--part", part.name, *(["--cpu"] if given.cpu else [])]
        return _child(words, given.out / f"{part.name}.log", seconds)

    try:
        run([part for part in PARTS if not given.only or part.name in given.only], given, measured)
    except KeyboardInterrupt:
        print("stopped: finished parts are kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print((given.out / "first_hour.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
