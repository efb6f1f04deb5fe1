"""A worker whose figures are decided by the test: it stops before the disk is full, and the next one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.health.guard import Lookout
from hpo.health.log import health_rows
from hpo.search.sampled import SearchLimits
from hpo.search.worker import Worker
from hpo.study.config import build_study
from hpo.study.storage import open_study
from hpo.study.thresholds import Thresholds
from tests.healthfigures import Told
from tests.tiny_search import STUDY, Recorder, draw_images, make_search, table, tiny_bench
from trainer.adapters import count_weights
from trainer.errors import ConfigError, MachineError, ToolError
from trainer.events import Step


def watched(worker: Worker, sensors: Told, view: Recorder) -> Worker:
    lookout = Lookout(Thresholds(), sensors, 0.005)
    return Worker(worker.study, worker.bench, worker.source, view, lookout)


def test_a_disk_that_is_nearly_full_stops_the_search_and_nothing_is_lost(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "luca", draw_images(tmp_path / "data"))
    sensors, view = Told(), Recorder()
    worker = watched(make_search(bench, SearchLimits(3)), sensors, view)

    def fill(event: Any) -> None:
        if isinstance(event, Step) and view.started[-1][0] == 1:
            sensors.machine(disk_free_bytes=1000)
            while not worker.guard.should_stop:  # the thread looks soon
                assert worker.guard._thread.is_alive()

    view.event_hook = fill
    with pytest.raises(MachineError, match="stopped in time"):
        worker.run()
    states = [trial.state.name for trial in open_study(bench.folder).get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "RUNNING"]
    rows = health_rows(bench.folder.root)
    assert [row["figure"] for row in rows if row["event"] == "alert"] == ["disk"]
    assert any(row.get("trial") == 1 for row in rows)
    make_search(bench, SearchLimits(3)).run()
    assert len(table(bench.folder)) == 3


def test_the_study_file_has_the_thresholds(tmp_path: Path) -> None:
    config = build_study("x", {**STUDY, "health": {"swap_used": [1, 3]}}, sets=["health.acts=false"])
    assert config.health.swap_used == (1, 3) and not config.health.acts
    assert config.frozen() == build_study("x", STUDY).frozen(), "thresholds may change while a study runs"
    with pytest.raises(ConfigError, match="swap_usd"):
        build_study("x", {**STUDY, "health": {"swap_usd": [1, 3]}})


def test_settings_without_an_adapter_do_not_end_the_search_before_their_trial_fails(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "luca", draw_images(tmp_path / "data"))
    worker = make_search(bench, SearchLimits(1))
    good = bench.config(bench.study.baseline, 0)
    worker._measure_needs(good)
    assert worker._needs is not None
    bad = good.with_values({"network_weights": str(tmp_path / "gone.safetensors"), "dim_from_weights": True})
    with pytest.raises(ToolError):
        count_weights(bench.base, bad)
    worker._measure_needs(bad)
    assert worker._needs is None, "not those of the trial before"
