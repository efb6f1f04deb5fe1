"""Trials per hour of ``hpo search``, beside a script for each trial (``tests.bench.subprocess_way``).

    python -m tests.bench.bench_search throughput --out bench/throughput [--full-size] [--rounds 2]

Same base (a diffusers folder), images, number of steps, batch size, rank, drawn images, sampling steps and scorer.
Both ways compute in fp32 on a CPU and in half precision on a GPU.  A round is a whole study from its start to its end,
with loading, anchors and the cost estimate, then a few trials of the other way; rounds alternate in one run.  The
study trains all layers of its usual LoRA, the script only the attention projections.  With ``--full-size``: SD1.5 and
ViT-B-32 with random weights, at a small resolution.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.clocked_search import outside
from tests.bench.subprocess_way import Job
from tests.places import ROOT

MINUTE = 60.0


@dataclass(frozen=True)
class Setting:
    """What a round is: ``trials`` of a study, ``others`` of the other way."""

    job: Job
    trials: int
    others: int
    words: tuple[str, ...] = ()
    random: bool = False


def definition(job: Job) -> str:
    """A study file that searches the rate only, so all trials are equally long."""
    return "\n".join(
        [
            "[study]",
            'title = "throughput"',
            "seed = 1",
            "[train]",
            f"resolution = {job.side_px}",
            f"min_bucket_reso = {job.side_px}",
            "enable_bucket = false",
            f"train_batch_size = {job.batch}",
            f"network_dim = {job.rank}",
            f"network_alpha = {job.rank}",
            f"max_train_steps = {job.steps}",
            'optimizer_type = "AdamW"',
            "network_train_unet_only = true",
            'caption_extension = ".txt"',
            "[space]",
            f"learning_rate = {{ low = {job.rate / 2}, high = {job.rate * 2}, log = true }}",
            "[baseline]",
            f"learning_rate = {job.rate}",
            "[sampling]",
            f"steps = {job.sampling_steps}",
            f"cfg = {job.cfg}",
            f"width_px = {job.side_px}",
            f"height_px = {job.side_px}",
        ]
    )


def miniature(place: Path, device: str = "cpu") -> Setting:
    """The miniature SD1.5 with its demo character at 64 px."""
    import torch

    from tests.tiny import save_folder
    from trainer.bases import MINIATURE_SCORER, load_base, write_subject

    if not (place / "images").is_dir():
        write_subject("character", place / "images")
    if not (place / "base" / "model_index.json").is_file():
        base = load_base("mini-sd15", device="cpu", dtype=torch.float32)
        save_folder(base, place / "base")
    prompts = tuple(f"a photo of {{subject}} {where}" for where in _places())
    return Setting(
        Job(
            base=str(place / "base"),
            images=str(place / "images"),
            out="",
            clip=MINIATURE_SCORER,
            prompts=prompts,
            side_px=64,
            steps=40,
            batch=4,
            rank=8,
            rate=2e-3,
            sampling_steps=20,
            cfg=5.0,
            device=device,
        ),
        trials=8,
        others=2,
        words=("--set", "limits.copy_rate=1.0", "--set", "limits.shown=-100"),
        random=True,  # the folder is not known as the miniature, whose checks know its prompts
    )


def full_size(place: Path, device: str = "cpu", side_px: int = 64, steps: int = 4) -> Setting:
    """SD1.5 and ViT-B-32 with random weights: in fp32 on a CPU, on a GPU in the half precision that is usual there."""
    from tests.fullsize import louder, random_base, random_clip
    from tests.tiny import save_folder
    from tests.tiny_search import draw_images

    if not (place / "images").is_dir():
        draw_images(place / "images" / "1_zkw figure", count=8, size_px=side_px)
    if not (place / "references").is_dir():
        draw_images(place / "references", count=2, size_px=side_px, seed=2)
    clip = place / "clip.safetensors"
    if not clip.is_file():
        random_clip(clip)
    if not (place / "base" / "model_index.json").is_file():
        base = random_base("sd15")
        louder(base)
        save_folder(base, place / "base")
        base.free()
    return Setting(
        Job(
            base=str(place / "base"),
            images=str(place / "images"),
            out="",
            clip=f"ViT-B-32:{clip}",
            prompts=tuple(f"a photo of {{subject}} {where}" for where in _places()[:4]),
            side_px=side_px,
            steps=steps,
            batch=1,
            rank=8,
            rate=0.02,
            sampling_steps=4,
            cfg=5.0,
            device=device,
        ),
        trials=3,
        others=1,
        words=(
            *("--references", str(place / "references"), "--set", "study.likeness=clip"),
            *(() if device.startswith("cuda") else ("--set", "mixed_precision=no")),
            *("--set", "limits.copy_rate=1.0", "--set", "limits.shown=-100"),
        ),
        random=True,
    )


def _places() -> list[str]:
    return ["on grass", "on sand", "at night", "in snow", "by the sea", "in a room", "on a road", "in a wood"]


def subject_of(setting: Setting) -> tuple[str, str]:
    """Trigger and class word of the images' folder."""
    from trainer.config import TrainConfig
    from trainer.data import read_dataset

    data = read_dataset(Path(setting.job.images), TrainConfig(caption_extension=".txt"))
    return data.trigger or "zkw", data.class_word or "figure"


def ours(setting: Setting, place: Path, name: str) -> dict[str, Any]:
    """A study: its trials, wall seconds, and the clock's rows."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "study.toml").write_text(definition(setting.job))
    trigger, class_word = subject_of(setting)
    rows = [
        f"[[prompts]]\ntext = {json.dumps(p.format(subject=f'{trigger} {class_word}'))}"
        for p in setting.job.prompts
    ]
    (place / "prompts.toml").write_text("seeds = [0]\n" + "\n".join(rows) + "\n")
    words = ["search", name, "--base", setting.job.base, "--data", setting.job.images]
    words += ["--definition", str(place / "study.toml"), "--prompts", str(place / "prompts.toml")]
    words += ["--trigger", trigger, "--class", class_word, "--clip", setting.job.clip]
    words += ["--trials", str(setting.trials), "--runs", str(place / "runs"), "--device", setting.job.device]
    clock = place / f"{name}.clock.json"
    front = [str(clock), *(["--random"] if setting.random else [])]
    seconds = _run(["tests.bench.clocked_search", *front, *words, *setting.words], place / f"{name}.log")
    trials = json.loads(clock.read_text())
    states = [
        json.loads(path.read_text())["state"]
        for path in sorted(place.glob(f"runs/{name}/trial_*/result.json"))
    ]
    if len(trials) != setting.trials or states.count("FAILED") or len(states) != setting.trials:
        raise RuntimeError(f"{name}: {len(trials)} trials ended as {states}; see {place / name}.log")
    return {"trials": setting.trials, "seconds": seconds, "states": states, "clock": trials}


def theirs(setting: Setting, place: Path, name: str) -> dict[str, Any]:
    """A few trials the other way: their number and wall seconds."""
    trigger, class_word = subject_of(setting)
    seconds = {"train": 0.0, "score": 0.0}
    for number in range(setting.others):
        out = place / f"{name}_{number}"
        out.mkdir(parents=True, exist_ok=True)
        prompts = tuple(p.format(subject=f"{trigger} {class_word}") for p in setting.job.prompts)
        job = replace(setting.job, out=str(out), prompts=prompts).write(out / "job.json")
        for half in seconds:
            seconds[half] += _run(["tests.bench.subprocess_way", half, str(job)], out / f"{half}.log")
    return {"trials": setting.others, "seconds": sum(seconds.values()), "parts": seconds}


def _run(module: Sequence[str], log: Path) -> float:
    """Wall seconds of a module in a process of its own.  Raises RuntimeError with the end of what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=log.parent,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(module[:2])} ended with {done.returncode}: {log.read_text()[-800:]}")
    return time.perf_counter() - started


def clear(place: Path) -> None:
    """Remove what rounds that were broken off have left, so that ``measure`` begins anew."""
    shutil.rmtree(place / "runs", ignore_errors=True)
    for path in (*place.glob("study*.clock.json"), place / "throughput.json"):
        path.unlink(missing_ok=True)


def measure(setting: Setting, place: Path, rounds: int) -> dict[str, Any]:
    """All rounds, and what they show.  Finished rounds are kept in ``place`` and not repeated."""
    path = place / "throughput.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rounds"] if path.is_file() else []
    for number in range(len(found), rounds):
        for parts in (f"study{number}.clock.json", f"runs/study{number}"):
            if (place / parts).exists():
                raise RuntimeError(f"{place / parts} is left from a round that was broken off: delete it")
        round_ = {
            "ours": ours(setting, place, f"study{number}"),
            "theirs": theirs(setting, place, f"script{number}"),
        }
        found.append(round_)
        path.write_text(json.dumps({"rounds": found}, indent=1))
    report = {"rounds": found, **summary(found)}
    path.write_text(json.dumps(report, indent=1))
    return report


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trials per hour both ways, their ratio in each round, and the share outside model compute."""
    hourly = {
        way: [3600 * r[way]["trials"] / r[way]["seconds"] for r in rounds] for way in ("ours", "theirs")
    }
    rows = [row for r in rounds for row in r["ours"]["clock"]]
    each = [sum(row["seconds"] for row in r["ours"]["clock"]) / r["ours"]["trials"] for r in rounds]
    return {
        "trials_per_hour": hourly,
        "ratios": [a / b for a, b in zip(hourly["ours"], hourly["theirs"], strict=True)],
        "ratios_without_start": [
            r["theirs"]["seconds"] / r["theirs"]["trials"] / one for r, one in zip(rounds, each, strict=True)
        ],
        "trial_seconds": sorted(row["seconds"] for row in rows),
        "outside": sum(row["seconds"] * outside(row) for row in rows) / sum(row["seconds"] for row in rows),
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: one row for each round."""
    lines = [
        "| round | ours, trials an hour | a script for each trial | ratio | ratio without the study's start |",
        "|---|---|---|---|---|",
    ]
    hourly = report["trials_per_hour"]
    for number, (mine, other, ratio, each) in enumerate(
        zip(hourly["ours"], hourly["theirs"], report["ratios"], report["ratios_without_start"], strict=True)
    ):
        lines.append(f"| {number + 1} | {mine:.1f} | {other:.1f} | {ratio:.1f} | {each:.1f} |")
    seconds = report["trial_seconds"]
    lines.append("")
    lines.append(
        f"Outside model compute: {report['outside']:.1%} of a trial's wall time "
        f"(trials of {seconds[0]:.1f} to {seconds[-1]:.1f} s)."
    )
    return "\n".join(lines)
