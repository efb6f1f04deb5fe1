"""A whole study in seconds: a tiny random base, drawn images, and a scorer that is arithmetic.

``tiny_bench`` is what ``hpo.search.workbench.load`` returns, without files of models.  ``run_search`` is one worker.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.encoders.references import embed_references
from evaluation.images.sampling import default_config
from evaluation.prompts.prompts import PromptSet, make_prompt
from evaluation.score.evaluator import Evaluator
from hpo.search.sampled import SearchLimits, SearchProposals
from hpo.search.workbench import Workbench
from hpo.search.worker import Worker
from hpo.study.config import Inputs, StudyConfig, build_study
from hpo.study.folder import TOTAL, StudyFolder, read_json
from hpo.study.ownership import ownership_of
from hpo.study.storage import create_study, open_study
from tests.tiny import tiny_base
from trainer.data import cache
from trainer.data.dataset import read_dataset, split_references
from trainer.events import Event
from trainer.files import sha256_file

STUDY: dict[str, Any] = {
    "study": {"seed": 7},
    "train": {"resolution": 32, "min_bucket_reso": 32, "bucket_reso_steps": 32, "optimizer_type": "AdamW"},
    "space": {
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "network_dim_log2": {"low": 0, "high": 2},
        "network_alpha_ratio": {"low": 0.5, "high": 2.0},
        "max_train_epochs": {"low": 1, "high": 3},
    },
    "baseline": {"learning_rate": 1e-3, "network_dim": 2, "network_alpha": 2, "max_train_epochs": 2},
    "sampling": {"steps": 2, "cfg": 1.0},
    "score": {"below_zero": "signed"},  # as in a study file; a stored definition without the key is clipped
}


class ArithmeticScorer:
    """Pictures and texts → unit vectors, without a network: small greys and hashes."""

    name = "arithmetic"
    sha = "0" * 64

    def image_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        rows = []
        for image in images:
            small = Image.fromarray(image).resize((4, 4), Image.Resampling.BOX)
            rows.append(np.asarray(small, dtype=np.float32).ravel() / 255 + 0.1)
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=-1)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [np.frombuffer(hashlib.sha512(t.encode()).digest()[:48], np.uint8) for t in texts]
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)), dim=-1)


def draw_images(folder: Path, count: int = 6, size_px: int = 32, seed: int = 1) -> Path:
    """A plain dataset of coloured squares with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = np.full((size_px, size_px, 3), rng.integers(0, 255, 3), np.uint8)
        pixels[8:24, 8:24] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zkw figure {number}")
    return folder


def draw_and_warm_up(folder: Path, name: str = "images") -> Path:
    """Images, with everything imported and run once: call it before the first fork."""
    torch.set_num_threads(1)
    images = draw_images(folder / "data" / name)
    make_search(tiny_bench(folder / "warm" / "study", images), SearchLimits(1)).run()
    return images


def tiny_study(changes: Mapping[str, Mapping[str, Any]] | None = None) -> StudyConfig:
    names = [*STUDY, *(name for name in changes or {} if name not in STUDY)]
    table = {name: {**STUDY.get(name, {}), **(changes or {}).get(name, {})} for name in names}
    return build_study("tiny", table)


def tiny_bench(root: Path, data: Path, study: StudyConfig | None = None) -> Workbench:
    """Everything a trial needs, built in well under a second."""
    study = study or tiny_study()
    folder = StudyFolder(root)
    base, scorer = tiny_base("sd15"), ArithmeticScorer()
    with torch.no_grad():  # a random base draws almost one grey: louder, so that an adapter can be seen
        base.unet.conv_out.weight.mul_(20)
        base.vae.decoder.conv_out.weight.mul_(10)
    images, held_out = split_references(
        read_dataset(data, study.train, trigger="zkw", class_word="figure"), 2
    )
    prompts, confirmation = (
        PromptSet(
            tuple(make_prompt(f"{{trigger}} {{class}} {word}", "altered", "zkw", "figure") for word in words),
            (seed,),
            "zkw",
            "figure",
        )
        for words, seed in (("ab", 0), ("cde", 1000))
    )
    return Workbench(
        study=study,
        folder=folder,
        evaluator=Evaluator(
            base=base,
            prompts=prompts,
            sampling=default_config(base, **study.sample_values(), batch_size=1),
            references=embed_references([item.path for item in held_out.items], scorer),
            scorer=scorer,
            likeness=scorer,
            formula=study.score,
        ),
        data=images,
        reference_items=tuple(str(item.path) for item in held_out.items),
        confirmation=confirmation,
        data_folder=data,
        base_spec="tiny",
        store=cache.Store(folder.cache),
        inputs=Inputs("tiny", data),
    )


class Recorder:
    """A view that keeps what it is shown; ``on_event`` may be replaced to interfere."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.started: list[tuple[int, bool]] = []
        self.results: list[Any] = []
        self.event_hook: Callable[[Event], None] = lambda event: None
        self.image_hook: Callable[[int, int], None] = lambda done, total: None
        self.stop = False

    def say(self, text: str) -> None:
        self.lines.append(text)

    def should_stop(self) -> bool:
        return self.stop

    def check(self, *, certain: bool = False) -> None:
        """As ``hpo.search.trial.Watched`` has it, for tests of a part of a trial."""

    def on_trial(self, number: int, suggested: Mapping[str, Any], adopted: bool, standing: Any) -> None:
        self.started.append((number, adopted))

    def on_event(self, event: Event) -> None:
        self.event_hook(event)

    def on_image(self, done: int, total: int) -> None:
        self.image_hook(done, total)

    def on_result(self, result: Any, standing: Any) -> None:
        self.results.append(result)


def make_search(bench: Workbench, limits: SearchLimits, view: Recorder | None = None) -> Worker:
    """A worker on the bench's study, created if need be, anchors measured."""
    folder = bench.folder
    folder.locks.mkdir(parents=True, exist_ok=True)
    with ownership_of(folder).study():
        study = create_study(folder, bench.facts(), bench.study.objectives)
        study.set_user_attr(TOTAL, limits.trials)
    bench.measure_anchors(lambda text: None)
    view = view or Recorder()
    return Worker(study, bench, SearchProposals(study, bench, limits, view.say), view)


def table(folder: StudyFolder) -> dict[int, tuple[dict[str, Any], float | None]]:
    """number → (proposal, value) of every finished trial."""
    return {t.number: (t.params, t.value) for t in open_study(folder).get_trials(deepcopy=False)}


def finished_runs(place: Path, trials: int) -> Path:
    """A runs folder in ``place`` with one finished study of so many trials, named tiny."""
    draw_images(place / "images" / "1_zkw figure", 10)
    make_search(tiny_bench(place / "runs" / "tiny", place / "images"), SearchLimits(trials)).run()
    return place / "runs"


def check_study(folder: StudyFolder, trials: int) -> None:
    """What must hold of a finished study, whatever happened to the processes that made it."""
    if folder.database.is_file():  # otherwise it is on a server
        connection = sqlite3.connect(folder.database)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
    found = open_study(folder).get_trials(deepcopy=False)
    assert [t.number for t in found] == list(range(len(found)))
    assert not [t.number for t in found if not t.state.is_finished()]
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert len(complete) == trials
    assert len({json.dumps(t.params, sort_keys=True) for t in complete}) == trials
    assert sum(t.user_attrs.get("role") == "baseline" for t in complete) == 1
    for t in complete:
        files = folder.trial(t.number)
        params, result = read_json(files.params), read_json(files.result)
        assert params is not None and result is not None
        assert params["suggested"] == t.params
        assert result["objective"] == t.value and result["number"] == t.number
        assert sha256_file(files.lora) == result["lora_sha256"]
        artifacts = [k for k in t.system_attrs if k.startswith("artifacts:")]
        assert len(artifacts) == 1
        assert (folder.artifacts / artifacts[0].removeprefix("artifacts:")).is_file()
        assert not files.checkpoints.exists()
    assert not list(folder.root.rglob(".tmp-*"))
