"""A best trial on an edge of the space, and how to widen it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpo.study.config import build_study
from hpo.study.edges import edge_lines, edges
from hpo.study.folder import StudyFolder
from hpo.study.standing import Standing
from tests.tiny_search import tiny_study
from trainer.overrides import read_override

INSIDE = {"learning_rate": 3e-3, "network_dim_log2": 1, "network_alpha_ratio": 1.0, "max_train_epochs": 2}
NOW = Standing(12, 12, 0, 0, 0, (3, 0.5, 0.1), None)


def changes(**best: Any) -> dict[str, Mapping[str, Any]]:
    config = tiny_study()
    found: dict[str, Mapping[str, Any]] = {}
    for edge in edges(config, {**INSIDE, **best}):
        name, value = read_override(edge.change)
        assert name == edge.name
        build_study("wide", config.sections, sets=[edge.change])  # what is advised can be searched
        found[name] = dict(value)
    return found


def test_inside_there_is_nothing_to_say() -> None:
    assert changes() == {} and edge_lines(StudyFolder(Path("runs/tiny")), tiny_study(), INSIDE, NOW) == []


def test_a_range_is_widened_on_its_own_scale_beyond_the_end_that_the_best_is_at() -> None:
    found = changes(learning_rate=9e-2, network_alpha_ratio=0.52)
    assert found["learning_rate"] == {"low": 1e-4, "high": 3.2, "log": True}  # half of three decades more
    assert (
        found["network_alpha_ratio"] == {"low": 0, "high": 2.0} or found["network_alpha_ratio"]["low"] == 0.12
    )
    assert changes(learning_rate=1.1e-4)["learning_rate"] == {"low": 3.2e-6, "high": 0.1, "log": True}


def test_whole_numbers_stay_whole_and_are_not_widened_to_what_cannot_be_trained() -> None:
    assert changes(network_dim_log2=2) == {"network_dim_log2": {"low": 0, "high": 3}}
    assert changes(network_dim_log2=0, max_train_epochs=1) == {}  # rank 1 and one epoch are the least
    assert changes(max_train_epochs=3) == {"max_train_epochs": {"low": 1, "high": 4}}


def test_the_lines_name_the_edge_and_a_command_with_fork_and_range(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "runs" / "tiny")
    folder.root.mkdir(parents=True)
    best = {**INSIDE, "max_train_epochs": 3}
    says, _, command = edge_lines(folder, tiny_study(), best, NOW)
    assert says.endswith("max_train_epochs = 3 (searched up to 3)")
    assert "hpo search NAME … --set 'max_train_epochs={low=1, high=4}' --fork-from tiny" in command
    words = [
        "search",
        "tiny",
        "--base",
        "mini-sd15",
        "--trials",
        "12",
        "--fork-from",
        "older",
        "--enqueue",
        "x.toml",
    ]
    row = {
        "id": "1",
        "event": "started",
        "step": "search",
        "words": words,
        "cwd": str(Path.cwd()),
        "time_utc": "",
    }
    (folder.root / "work.jsonl").write_text(json.dumps(row) + "\n")
    assert shlex.split(edge_lines(folder, tiny_study(), best, NOW)[2]) == [
        *(
            "hpo",
            "search",
            "tiny-2",
            "--runs",
            str(folder.root.parent),
            "--base",
            "mini-sd15",
            "--trials",
            "18",
        ),
        *("--fork-from", "tiny", "--set", "max_train_epochs={low=1, high=4}"),
    ]


def test_a_search_with_only_its_baseline_says_nothing() -> None:
    only = Standing(12, 1, 0, 0, 0, (0, 0.5, 0.1), (0, 0.5, 0.1), only_baseline=True)
    best = {**INSIDE, "max_train_epochs": 3}
    assert edge_lines(StudyFolder(Path("runs/tiny")), tiny_study(), best, only) == []
