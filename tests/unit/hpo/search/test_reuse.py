"""What trials share is made once: in a study of twelve the base is loaded once and every image encoded once."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import hpo.search.workbench
from hpo.search.session import SearchRequest, search
from hpo.study.config import Inputs
from hpo.study.storage import open_study
from hpo.study.which import find_folder
from tests.tiny_search import draw_images
from trainer.bases.base import Base

STUDY = """
[study]
seed = 7
[train]
resolution = 64
min_bucket_reso = 32
bucket_reso_steps = 32
train_batch_size = 2
optimizer_type = "AdamW"
max_train_steps = 2
[space]
learning_rate = { low = 1e-4, high = 1e-2, log = true }
network_dim_log2 = { low = 1, high = 3 }
[baseline]
learning_rate = 1e-3
network_dim = 2
[sampling]
steps = 6
cfg = 5.0
"""
TRIALS = 12
PROMPTS = (
    "a zkw figure on grass, at the top",
    "a zkw figure on water, on the left",
    "a zkw figure on brick, at the bottom",
    "a zkw figure on sand, on the right",
)


def test_in_a_study_of_twelve_trials_the_base_is_loaded_once_and_each_image_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_images(tmp_path / "5_zkw figure", count=10, size_px=64)
    (tmp_path / "small.toml").write_text(STUDY)
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    loads: Counter[str] = Counter()
    encoded: Counter[bytes] = Counter()
    load_base, encode = hpo.search.workbench.load_base, Base.encode_images

    def counted_load(spec: str, **facts: Any) -> Base:
        loads[spec] += 1
        return load_base(spec, **facts)

    def counted_encode(self: Base, pixels_BCHW: Any, generators: Any) -> Any:
        encoded.update(row.numpy().tobytes() for row in pixels_BCHW.cpu())
        return encode(self, pixels_BCHW, generators)

    monkeypatch.setattr(hpo.search.workbench, "load_base", counted_load)
    monkeypatch.setattr(Base, "encode_images", counted_encode)
    inputs = Inputs("mini-sd15", data, prompts=tmp_path / "prompts.txt", device="cpu")
    request = SearchRequest(
        inputs, TRIALS, study=str(tmp_path / "small.toml"), name="reuse", runs=tmp_path / "runs"
    )
    search(request, Console(file=io.StringIO()))
    trials = open_study(find_folder("reuse", tmp_path / "runs")).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * TRIALS
    assert len({trial.params["learning_rate"] for trial in trials}) == TRIALS
    assert loads == {"mini-sd15": 1}
    assert set(encoded.values()) == {1} and len(encoded) == 8  # ten images, two of them references
