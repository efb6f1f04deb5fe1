"""How good the miniature is: `python tests/bench/bench_miniature.py` prints a table and writes JSON.

* bases: pictures for prompts of the world (20 steps, guidance 5), read by the ground-truth checker;
* mini-clip: the right caption among 64 that all contradict one another;
* mini-likeness: unseen creatures told apart, near twins (one part in another colour) included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

from trainer.bases.miniature import captions, checker, subjects, wild, world

WEIGHTS = Path(world.__file__).parent / "weights"
STEPS = 20
GUIDANCE = 5.0
SINGLE, OTHER = 200, 60  # prompts naming one object; prompts for pairs and figures each
FIRST_SEED = 60_000_000  # scenes that no training pool contains


def scenes_of(kind: str, count: int) -> list[world.Scene]:
    return [world.sample_scene(FIRST_SEED + i, kind) for i in range(count)]


def load_pipeline(folder: Path) -> object:
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: object, prompts: list[str], batch: int = 25) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        images += pipeline(  # type: ignore[operator]
            chunk, negative_prompt=[""] * len(chunk), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=generators,
        ).images  # fmt: skip
    return images


def bench_base(folder: Path, sheet: Path | None, share: float = 1.0) -> dict[str, object]:
    pipeline = load_pipeline(folder)
    result: dict[str, object] = {}
    shown: list[Image.Image] = []
    for kind, count in (("single", SINGLE), ("pair", OTHER), ("figure", OTHER)):
        scenes = scenes_of(kind, max(1, int(count * share)))
        began = time.monotonic()
        images = draw(pipeline, [captions.caption(s) for s in scenes])
        seconds = (time.monotonic() - began) / len(images)
        right, asked = Counter[str](), Counter[str]()
        for image, scene in zip(images, scenes, strict=True):
            verdict = checker.check(image, scene)
            verdict["all"] = all(verdict.values())
            asked.update(verdict.keys())
            right.update(name for name, ok in verdict.items() if ok)
        result[kind] = {name: round(right[name] / asked[name], 3) for name in asked} | {
            "prompts": len(scenes),
            "seconds_per_image": round(seconds, 3),
        }
        shown += images[:24]
    if sheet is not None:
        contact_sheet(shown, sheet)
    return result


def contact_sheet(images: list[Image.Image], path: Path, columns: int = 12) -> None:
    size = 128
    sheet = Image.new("RGB", (columns * size, -(-len(images) // columns) * size))
    for i, image in enumerate(images):
        sheet.paste(
            image.resize((size, size), Image.Resampling.NEAREST), (i % columns * size, i // columns * size)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def contradict(a: world.Scene, b: world.Scene) -> bool:
    """Do the two full captions say different things of the same attribute? (Silence contradicts nothing.)"""
    if a.kind != b.kind:
        return True
    one, two = checker.expected(a), checker.expected(b)
    silent = {"plain", "none"}
    return any(one[k] != two[k] and not silent & {one[k], two[k]} for k in one.keys() & two.keys())


def rivals(scene: world.Scene, rng: np.random.Generator, count: int = 64) -> list[world.Scene]:
    """The scene and others, half of them one attribute away, each pair in contradiction."""
    chosen = [scene]
    for attempt in range(5000):
        if len(chosen) == count:
            break
        near = attempt % 2 == 0
        other = (
            world.neighbours(scene, rng)
            if near
            else world.sample_scene(int(rng.integers(1 << 40)), scene.kind)
        )
        if all(contradict(other, c) for c in chosen):
            chosen.append(other)
    assert len(chosen) == count, len(chosen)
    return chosen


def bench_clip(folder: Path, count: int = 300) -> dict[str, float]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    right: dict[str, list[bool]] = {"single": [], "pair": [], "figure": []}
    with torch.no_grad():
        for i in range(count):
            scene = world.sample_scene(FIRST_SEED + i)
            texts = [captions.caption(s) for s in rivals(scene, np.random.default_rng((i, 91)))]
            image = preprocess(Image.fromarray(world.render(scene)))[None]
            scores = (
                model.encode_image(image, normalize=True)
                @ model.encode_text(tokenizer(texts), normalize=True).T
            )
            right[scene.kind].append(int(scores.argmax()) == 0)
    every = [ok for oks in right.values() for ok in oks]
    return {kind: round(float(np.mean(oks)), 3) for kind, oks in right.items()} | {
        "right_of_64": round(float(np.mean(every)), 3),
        "images": len(every),
    }


def auc(same: np.ndarray, different: np.ndarray) -> float:
    both = np.concatenate([same, different])
    rank = both.argsort().argsort()[: len(same)] + 1
    return float((rank.sum() - len(same) * (len(same) + 1) / 2) / (len(same) * len(different)))


def bench_likeness(folder: Path, count: int = 200) -> dict[str, float]:
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def embed(images: list[np.ndarray]) -> np.ndarray:
        pixels = processor([Image.fromarray(i) for i in images], return_tensors="pt").pixel_values
        with torch.no_grad():
            cls = model(pixels).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(cls, dim=-1).numpy()

    one, again, twins = [], [], []
    for i in range(count):
        rng = np.random.default_rng((i, 92))
        creature = wild.sample_creature(rng)
        one.append(wild.render_creature(creature, rng)[0])
        again.append(wild.render_creature(creature, rng)[0])
        twins.append(wild.render_creature(wild.twin(creature, rng), rng)[0])
    a, b, c = embed(one), embed(again), embed(twins)
    across = a @ b.T
    same, different = np.diag(across), across[~np.eye(count, dtype=bool)]
    luca = embed([subjects.picture("character", i, 0, 64)[0] for i in range(32)])
    figures = embed([world.render(s) for s in scenes_of("figure", 100)])
    luca_same = (luca[:24] @ luca[24:].T).ravel()
    return {
        "top1_of_200": round(float((across.argmax(1) == np.arange(count)).mean()), 3),
        "auc_same_vs_different": round(auc(same, different), 4),
        "same_beats_near_twin": round(float((same > (a * c).sum(1)).mean()), 3),
        "auc_character_vs_world_figures": round(auc(luca_same, (luca[24:] @ figures.T).ravel()), 4),
        "cosine_same": round(float(same.mean()), 3),
        "cosine_different": round(float(different.mean()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--only", choices=("mini-sd15", "mini-sdxl", "mini-clip", "mini-likeness"), action="append"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/miniature.json"))
    parser.add_argument("--share", type=float, default=1.0, help="share of the prompts, for a quick look")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    result: dict[str, object] = {}
    for name in args.only or ("mini-sd15", "mini-sdxl", "mini-clip", "mini-likeness"):
        folder = args.weights / name
        if name == "mini-clip":
            result[name] = bench_clip(folder)
        elif name == "mini-likeness":
            result[name] = bench_likeness(folder)
        else:
            result[name] = bench_base(folder, args.out.with_name(f"{name}.png"), args.share)
        print(f"{name}\n{table(result[name])}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {args.out}")


def table(values: object) -> str:
    assert isinstance(values, dict)
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"  {key:8}" + "  ".join(f"{k} {v}" for k, v in value.items()))
        else:
            lines.append(f"  {key:32} {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
