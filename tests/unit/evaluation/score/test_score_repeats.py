"""The same LoRA file gives the same score: repeated, and with other batch sizes, on mini-sd15 with its real scorers.

The LoRA has 20 steps on the demo character: it has likeness and still follows prompts, so that nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.score.formula import Formula
from evaluation.score.limits import SafeguardLimits
from evaluation.score.score import Score, evaluate_adapter
from hpo.search.workbench import Workbench, load
from hpo.study.config import Inputs, find_study, read_study
from hpo.study.folder import StudyFolder
from trainer.adapters import adapter as adapters
from trainer.adapters import lorafile
from trainer.adapters.metadata import dataset_metadata
from trainer.bases.miniature import subjects
from trainer.loop import loop

SETS = (
    "prompts.counts={ train-like = 1, altered = 2, class-only = 1 }",
    "sampling.steps=8",
    "limits.copy_rate=0.125",
    "score.likeness=2.0",
)
STEPS, RATE = 20, 1e-2


@dataclass(frozen=True)
class Trained:
    bench: Workbench
    file: Path
    first: Score
    folder: Path

    def score(self, name: str, batch_size: int) -> Score:
        """Score the file as ``hpo confirm --rescore-only`` does."""
        bench = self.bench
        lora = lorafile.attach(bench.base, lorafile.read(self.file))
        try:
            sampling = replace(bench.evaluator.sampling, batch_size=batch_size)
            return evaluate_adapter(replace(bench.evaluator, sampling=sampling), self.folder / name)
        finally:
            lora.remove()

    def pixels(self, name: str) -> np.ndarray:
        return np.stack(
            [np.asarray(Image.open(p)) for p in sorted((self.folder / name).rglob("samples/*.png"))]
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("repeats")
    subjects.write_subject("character", folder / "data", 64)
    study = read_study(find_study(None, "mini-sd15"), sets=SETS)
    bench = load(
        Inputs("mini-sd15", folder / "data"), study, StudyFolder(folder / "study"), lambda text: None
    )
    bench.measure_anchors(lambda text: None)
    settings = {"learning_rate": RATE, "text_encoder_lr_ratio": 0.3, "lr_scheduler": "constant"}
    config = bench.config({**study.baseline, **settings}, 0)
    lora = adapters.inject(bench.base, config)
    for _ in islice(loop.train(config, bench.base, lora, bench.prepared(config)), STEPS):
        pass
    lora.round_to(config.save_precision)
    file = folder / "lora.safetensors"
    lorafile.write(file, lora, config, dataset_metadata(config, bench.data))
    lora.remove()
    unscored = Trained(bench, file, None, folder)  # type: ignore[arg-type]
    yield replace(unscored, first=unscored.score("first", 4))


def test_the_score_of_this_file_is_one_that_could_move(trained: Trained) -> None:
    first = trained.first
    assert first.scorer == "mini-clip" and first.likeness_encoder == "mini-likeness"
    for part in (first.prompt_following, first.likeness, first.value):
        assert 0.2 < part < 1.0
    assert first.clip_t > 0 and first.clip_i > 0 and first.se > 0 and first.safety is not None


def test_what_is_loaded_has_the_studys_formula_limits_and_training_images(trained: Trained) -> None:
    bench = trained.bench
    assert bench.evaluator.formula == trained.first.formula == Formula(likeness=2.0, below_zero="signed")
    t, i = trained.first.prompt_following, trained.first.likeness
    assert trained.first.value == pytest.approx((t * i**2) ** (1 / 3))
    guards = bench.evaluator.safeguards
    assert guards is not None and guards.limits == SafeguardLimits(0.125, bench.study.limits.diversity, 1.0)
    assert len(guards.copies.features_TD) == len(bench.data.items) == subjects.TRAINING_IMAGES
    assert trained.first.safety is not None
    assert trained.first.safety.amounts["copied"] == trained.first.safety.copy_rate - 0.125


def test_scoring_a_file_again_is_bitwise_the_same(trained: Trained) -> None:
    assert trained.score("again", 4) == trained.first
    first, again = ((trained.folder / name / "metrics.json").read_bytes() for name in ("first", "again"))
    assert first == again
    assert (trained.pixels("first") == trained.pixels("again")).all()


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_batch_size_moves_no_score_by_more_than_a_ten_thousandth(
    trained: Trained, batch_size: int
) -> None:
    other = trained.score(str(batch_size), batch_size)
    for name in ("value", "prompt_following", "likeness", "clip_t", "clip_i", "se"):
        assert getattr(other, name) == pytest.approx(getattr(trained.first, name), abs=1e-4), name
    apart = trained.pixels(str(batch_size)).astype(int) - trained.pixels("first")
    assert np.abs(apart).max() <= 1
    assert len(apart) == trained.first.n_images > 4, "one batch of 4 does not hold them"
