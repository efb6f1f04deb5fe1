"""What a study costs, said before the first trial and corrected after it."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.search import cost as costs
from hpo.search.sampled import SearchLimits
from hpo.search.workbench import Workbench
from hpo.study.config import build_study
from hpo.study.pace import Pace
from hpo.study.storage import open_study
from tests.tiny_search import draw_images, make_search, tiny_bench, tiny_study
from trainer.data import total_steps
from trainer.files import folder_bytes


def bench_of(tmp_path: Path, changes: dict[str, Any] | None = None, images: int = 8) -> Workbench:
    torch.set_num_threads(1)
    return tiny_bench(tmp_path / "study", draw_images(tmp_path / "images", count=images), tiny_study(changes))


def test_the_ends_are_those_of_every_setting_that_decides_the_length(tmp_path: Path) -> None:
    space = {
        "max_train_epochs": {"low": 1, "high": 4}, "gradient_accumulation_steps": {"low": 1, "high": 3},
        "train_batch_size": {"choices": [1, 2]},
    }  # fmt: skip
    start = {"gradient_accumulation_steps": 1, "train_batch_size": 1}
    bench = bench_of(tmp_path, {"space": space, "baseline": start})  # six images are trained on, two held out
    found = costs.ends(bench)
    assert found.updates == (1, 24), "one epoch of 3 batches, accumulated; four epochs of 6"
    assert found.seen == (6, 24)
    for value in (1, 2):
        config = bench.study.config({**bench.study.baseline, "train_batch_size": value})
        assert found.updates[0] <= total_steps(config, bench.data) <= found.updates[1]


def test_steps_are_counted_as_images_seen(tmp_path: Path) -> None:
    changes = {"space": {"max_train_steps": {"low": 3, "high": 30}}, "baseline": {"max_train_steps": 10}}
    found = costs.ends(bench_of(tmp_path, {**changes, "train": {"train_batch_size": 2}}))
    assert found.updates == (3, 30) and found.seen == (6, 60)


@pytest.fixture
def cost(tmp_path: Path) -> tuple[Workbench, costs.Cost]:
    bench = bench_of(tmp_path)
    worker = make_search(bench, SearchLimits(trials=3))
    return bench, costs.estimate(bench, worker.study, probe=True)


def test_a_space_in_which_nothing_can_be_learned_is_warned_about(cost: tuple[Workbench, costs.Cost]) -> None:
    bench, found = cost
    (line,) = costs.warnings(bench, found, 3, None)
    assert (
        "even the longest trial sees 18 images" in line and "subjects usually need 1,000+ images seen" in line
    )
    words = line.partition("longer trials: ")[2]
    assert words == "--set 'max_train_epochs={low=167, high=334}' --set baseline.max_train_epochs=167"
    sections = bench.study.sections
    longer = replace(bench, study=build_study("tiny", sections, sets=["max_train_epochs={low=2, high=200}"]))
    (line,) = costs.warnings(longer, replace(found, ends=costs.ends(longer)), 3, None)
    assert "the shortest trial sees 12 images" in line
    advised = ["max_train_epochs={low=167, high=334}", "baseline.max_train_epochs=167"]
    enough = build_study("tiny", sections, sets=advised)
    fine = replace(bench, study=enough)
    assert costs.warnings(fine, replace(found, ends=costs.ends(fine)), 3, None) == []


def test_a_trial_that_takes_more_than_its_share_of_a_night_is_warned_about(
    cost: tuple[Workbench, costs.Cost],
) -> None:
    bench, found = cost
    slow = replace(found, pace=Pace(sample_seconds=600, image_seconds=1))
    *_, line = costs.warnings(bench, slow, 3, None)
    assert "its share of a night (10 h / 3 trials) is 3:20:00" in line
    assert costs.warnings(bench, slow, 3, 100.0)[1:] == [], "100 hours are enough"
    fewer = costs.warnings(bench, slow, 30, None)[-1]
    assert "--trials" in fewer and "all trials take about" in fewer


def test_after_the_first_trial_disk_and_time_are_those_of_its_files(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    worker = make_search(bench, SearchLimits(trials=3))
    cost = costs.estimate(bench, worker.study, probe=True)
    before = costs.final_bytes(bench.folder, worker.study, cost, 3, None)
    said: list[int] = []

    class Told(type(worker.source)):  # type: ignore[misc]
        def after(self, suggested: Any, result: Any) -> None:
            super().after(suggested, result)
            said.append(costs.final_bytes(bench.folder, open_study(bench.folder), cost, 3, None))
            if len(said) == 1:
                line = costs.after_first_line(bench, open_study(bench.folder), cost, 3, None)
                assert line.startswith("measured: about 0:0") and "for the 2 left" in line

    worker.source.__class__ = Told
    worker.run()
    with contextlib.closing(sqlite3.connect(bench.folder.database)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    true = folder_bytes(bench.folder.root)
    for guess in (before, *said):
        assert true / 1.5 < guess < true * 1.5, (before, said, true)


def test_a_worker_that_did_not_draw_the_base_knows_how_long_its_images_took(
    tmp_path: Path, data: Path
) -> None:
    first, second = (tiny_bench(tmp_path / "study", data) for _ in range(2))
    for bench in (first, second):
        bench.measure_anchors(lambda text: None)
    assert first.image_seconds and second.image_seconds == first.image_seconds
    pace = costs.probed_pace(second, second.config(second.study.baseline, 0))
    assert pace is not None and pace.image_seconds == first.image_seconds
    first.folder.base_seconds.unlink()  # of an earlier version: no images that take no time
    second.image_seconds = None
    second.measure_anchors(lambda text: None)
    assert costs.probed_pace(second, second.config(second.study.baseline, 0)) is None
