"""What docs/devices.md promises on CUDA: repeats up to rounding, and the same bits in deterministic mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.golden import record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RELATIVE = (
    1e-2  # of a loss after six steps, against the recorded ones of a CPU: TF32 and other orders of sums
)

RUN = """
import json, sys
from pathlib import Path
from hpo.machine import deterministic
deterministic()
from tests.golden import record
from trainer.bases.load import load_base
print(json.dumps(record.golden_losses(load_base("mini-sd15", device="cuda"), Path(sys.argv[1]))))
"""


def losses(images: Path, *, exact: bool) -> list[float]:
    """The golden training on the GPU, in a process of its own: cuBLAS reads its variable once."""
    words = [sys.executable, "-c", RUN, str(images)]
    own = {**os.environ, "HPO_DETERMINISTIC": "1" if exact else "0"}
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def test_deterministic_mode_repeats_bitwise(tmp_path: Path) -> None:
    images = record.draw(tmp_path / "images")
    first = losses(images, exact=True)
    assert losses(images, exact=True) == first
    assert first == pytest.approx(json.loads(record.FILE.read_text())["losses"], rel=RELATIVE)


def test_without_it_repeats_are_equal_up_to_rounding(tmp_path: Path) -> None:
    images = record.draw(tmp_path / "images")
    assert losses(images, exact=False) == pytest.approx(losses(images, exact=False), rel=RELATIVE)
