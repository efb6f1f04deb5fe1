"""Full-size SD1.5 and open_clip ViT-B-32, both with random weights, in the main job: one trial on a CPU within
12 GB, without network, from a diffusers folder and from an original-layout file."""

import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.fullsize import random_base
from tests.singlefile import save_single_file
from tests.tiny import save_folder

pytestmark = pytest.mark.slow

LIMIT_BYTES = 12 * 10**9
SEARCH = """
import os, resource, sys
from hpo.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    print("peak_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SD1.5 in both layouts, and a scorer's weights that are not the initial ones."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("full")
    base = random_base("sd15")
    files = {
        "folder": save_folder(base, root / "sd15-folder"),
        "file": save_single_file(base, root / "sd15.safetensors"),
    }
    base.free()
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32")
    with torch.no_grad():
        clip.logit_scale.fill_(4.6)  # a trained CLIP's; the initial value is refused as untrained
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, root / "clip.safetensors")
    return {**files, "clip": root / "clip.safetensors"}


def dataset(folder, images=10):
    subject = folder / "1_zwx cat"
    subject.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(images):
        pixels = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128)).save(subject / f"{number}.png")
        (subject / f"{number}.txt").write_text(f"zwx cat, picture {number}")
    return folder


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_one_trial_of_a_full_size_search_runs_on_a_cpu_within_12_gb(models, layout, tmp_path):
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(
        'seeds = [0]\n[[prompts]]\ntext = "zwx cat on a table"\n[[prompts]]\ntext = "a red zwx cat"\n'
    )
    words = [
        "search",
        "--base",
        str(models[layout]),
        "--data",
        str(dataset(tmp_path / "data")),
        "--trials",
        "1",
    ]
    words += ["--prompts", str(prompts), "--clip", f"ViT-B-32:{models['clip']}", "--name", "full"]
    for value in ("resolution=128", "min_bucket_reso=128", "max_train_steps=1", "train_batch_size=1"):
        words += ["--set", value]
    words += ["--set", "sampling.steps=2", "--set", "optimizer_type=AdamW"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, *words, "--runs", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    print(done.stdout[-3000:], done.stderr[-2000:], f"{time.monotonic() - started:.0f} s")
    assert done.returncode == 0
    peak = int(done.stdout.split("peak_bytes ")[1])
    assert peak < LIMIT_BYTES
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < LIMIT_BYTES
    trial = tmp_path / "runs" / "full" / "trial_0000"
    result = json.loads((trial / "result.json").read_text())
    assert result["state"] in ("complete", "infeasible"), result
    assert (trial / "lora_trial_0.safetensors").is_file()
    assert len(list((trial / "samples").glob("*.png"))) == 2
