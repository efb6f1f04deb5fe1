"""A search on a real-sized SD1.5 (random weights, as a diffusers folder and as one original-layout file),
scored by a real-sized ViT-B-32 from a file: on a CPU, within 12 GB, without network.

What it proves: loading in both layouts, training, sampling, scoring by the loaded scorer, saving and the
study's records at full size, and the memory they take.  It proves nothing about scores.  Three guards judge
just what random weights are, so they are off here and tested elsewhere: the scorer's known answers
(tests/unit/evaluation/encoders/test_embed.py), anchors that cannot be told apart
(tests/faults/hpo/search/test_session.py), and the limit on copies, to which a random image tower says yes or
no by chance (tests/unit/hpo/search/test_limits.py).  All other checks stay on: the file's own, logit_scale,
the LoRA's effect on the images, invalid images, the other limits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from tests.fullsize import louder, random_base, random_clip
from tests.places import ROOT
from tests.singlefile import save_single_file
from tests.tiny import save_folder
from tests.tiny_search import check_study, draw_images
from trainer.adapters.lorafile import read

pytestmark = pytest.mark.slow
LIMIT_BYTES = 12 * 10**9
# Runs the command and prints its peak memory as the last line.  What random networks cannot pass is left out: the
# scorer's known answers, and anchors that can be told apart.
MEASURED = """
import resource, sys
from hpo.cli.main import main
from hpo.cli.start import calm_libraries
calm_libraries()
from evaluation.score.anchors import Anchors
from hpo.study import scoring
scoring.self_test = lambda scorer, say: None
Anchors.require_separable = lambda self: None
try:
    main(sys.argv[1:])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def search(place: Path, base: Path) -> tuple[str, int]:
    """One trial at 64 px, two steps, two prompts × one seed: what the command said, and its peak memory."""
    draw_images(place / "images" / "1_zkw figure", size_px=64)
    draw_images(place / "references", count=2, size_px=64, seed=2)
    clip = random_clip(place / "clip.safetensors")
    (place / "prompts.toml").write_text(
        'seeds = [0]\n[[prompts]]\ntext = "a photo of zkw figure"\n[[prompts]]\ntext = "zkw figure on a beach"\n'
    )
    words = ["search", "--base", str(base), "--data", "images", "--trials", "1", "full"]
    words += [
        "--clip",
        f"ViT-B-32:{clip}",
        "--prompts",
        "prompts.toml",
        "--references",
        "references",
    ]
    for setting in ("resolution=64", "min_bucket_reso=64", "max_train_steps=2", "train_batch_size=1"):
        words += ["--set", setting]
    words += ["--set", "learning_rate=0.05", "--set", "sampling.steps=2", "--set", "optimizer_type=AdamW"]
    words += ["--set", "limits.copy_rate=1.0", "--set", "limits.shown=-100", "--set", "study.likeness=clip"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], cwd=place, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said, _, peak = done.stdout.rpartition("peak ")
    return said, int(peak)


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_search_on_a_full_size_base_runs_on_a_cpu_within_12_gb(layout: str, tmp_path: Path) -> None:
    base = random_base("sd15")
    louder(base)
    if layout == "file":
        saved = save_single_file(base, tmp_path / "original.safetensors")
    else:
        saved = save_folder(base, tmp_path / "folder")
    base.free()
    said, peak_bytes = search(tmp_path, saved)
    print(f"{layout}: peak {peak_bytes / 1e9:.1f} GB")
    assert "study=full complete=1/1 infeasible=0 failed=0 best=0" in said
    folder = StudyFolder(tmp_path / "runs" / "full")
    check_study(folder, 1)
    assert len(read(folder.trial(0).lora).tensors) == 3 * 264
    assert peak_bytes < LIMIT_BYTES, f"{peak_bytes / 1e9:.1f} GB"
