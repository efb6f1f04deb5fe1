"""``hpo watch`` reads files only: of a command that runs, one killed in the middle of a line, one that ended."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from hpo.cli.main import main
from hpo.health.health import Health
from hpo.health.log import HealthLog
from hpo.health.watched import watched
from hpo.search.sampled import SearchLimits
from hpo.study.thresholds import Thresholds
from hpo.study.work import INVOCATION, Invocation, recorded
from hpo.terminal.watch import watch_screen
from tests.healthfigures import Told
from tests.tiny_search import draw_images, make_search, tiny_bench
from trainer.events import Step

ESCAPE = "\x1b]0;owned\x07[red]\u202e"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/luca with two finished trials."""
    place = tmp_path_factory.mktemp("watched")
    make_search(tiny_bench(place / "runs" / "luca", draw_images(place / "data")), SearchLimits(2)).run()
    return place / "runs" / "luca"


@pytest.fixture
def study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs" / "luca"
    shutil.copytree(finished, root)
    monkeypatch.chdir(tmp_path)
    (root / "health.jsonl").unlink(missing_ok=True)
    return root


def night(root: Path, *, trial: int | None = 2, done: int = 40) -> Health:
    """A process in trial 2 whose figures were written now."""
    sensors = Told()
    sensors.machine(ram_used=72.0)
    health = Health(Thresholds(), sensors, 0.0, HealthLog(root))
    health.begins(**({} if trial is None else {"trial": trial}))
    for number in range(done):
        health.on_event(Step(number + 1, 800, 1, 1, 0.1, 1e-4, 0.0, 1.0, 0.5))
    health.look(5.0, left_of_all=4200.0)
    return health


def started(root: Path, state: str = "", **more: Any) -> None:
    """A command in work.jsonl; with ``state`` it has ended."""
    when = datetime.now(UTC) - timedelta(hours=3)
    row = {"id": "a", "event": "started", "step": "search", "words": ["search", "luca"], "cwd": "/", **more}
    rows = [{**row, "time_utc": when.isoformat()}]
    if state:
        rows.append({"id": "a", "event": state, "time_utc": datetime.now(UTC).isoformat()})
    (root / "work.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(*words: str) -> str:
    result = CliRunner().invoke(main, ["watch", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_running_night_is_one_screen_of_80_columns(study: Path) -> None:
    started(study)
    night(study)
    text = shown("luca")
    lines = text.splitlines()
    assert lines[0].startswith("luca  search, running for 3:00:0")
    assert "2/2 done" in text and "best: trial" in text
    assert "trial 2, step 40/800" in text and "about 1:" in text
    assert "GPU 62 °C, 97 % busy, 11.0 of 16.9 GB" in text and "RAM 72 % (!)" in text
    assert "RAM 72 % used (warning above 70 %)" in text
    assert "Ctrl-C ends this view; the run goes on" in text and max(map(len, lines)) <= 80
    assert shown() == text or shown().splitlines()[0].startswith("luca  search"), "without a name: what runs"


def test_the_object_has_everything(study: Path) -> None:
    started(study)
    night(study)
    found = json.loads(shown("luca", "--json"))
    assert found["running"] and found["stage"] == "search" and found["next"] is None
    assert found["trials"] == {"complete": 2, "total": 2} and found["best"]["trial"] in (0, 1)
    (process,) = found["processes"]
    assert (process["trial"], process["done"], process["total"]) == (2, 40, 800)
    assert process["health"]["ram_used"] == 72.0 and process["health"]["levels"] == {"ram_used": "warn"}
    assert [alert["figure"] for alert in found["alerts"]] == ["ram_used"]


def test_the_step_log_is_newer_than_the_figures(study: Path) -> None:
    started(study)
    night(study)
    folder = study / "trial_0002"
    folder.mkdir()
    rows = [
        {"event": "step", "step": n, "total_steps": 800, "loss": 0.25, "seconds": 0.5} for n in range(60, 96)
    ]
    torn = '{"event": "step", "step": 9'
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    with (study / "health.jsonl").open("a") as file:
        file.write('{"event": "alert", "te')
    text = shown("luca")
    assert "trial 2, step 95/800, 2.0 steps/s, loss 0.2500" in text


def test_a_killed_command_says_its_last_state_and_how_to_go_on(study: Path) -> None:
    started(study)
    night(study)
    old = (study / "health.jsonl").read_text()
    then = (datetime.now(UTC) - timedelta(minutes=10)).isoformat(timespec="seconds")
    rows = [{**json.loads(line), "time_utc": then} for line in old.splitlines()]
    (study / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown("luca")
    assert "luca  search, killed, " in text and "next: hpo resume luca" in text and "step 40/800" in text
    assert "Ctrl-C" not in text and not json.loads(shown("luca", "--json"))["running"]


def test_a_finished_command_has_nothing_next(study: Path) -> None:
    started(study, "finished")
    text = shown("runs/luca")
    assert "luca  search, finished" in text and "next" not in text
    started(study, "failed")
    assert "search, failed" in shown("luca") and "next: hpo resume luca" in shown("luca")


def test_a_training_outside_a_study_is_found_by_its_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "output" / "zed.run"
    root.mkdir(parents=True)
    token = INVOCATION.set(Invocation(("train", "zed.toml"), str(tmp_path)))
    try:
        with recorded(root, "train zed"):
            night(root, trial=None)
            text = shown("output")
            assert "zed.run  train zed, running" in text and "step 40/800" in text
    finally:
        INVOCATION.reset(token)
    assert "train zed, finished" in shown("output") == shown()


def test_nothing_from_a_file_reaches_the_terminal_as_it_is(study: Path) -> None:
    started(study, step=f"search {ESCAPE}")
    night(study).saved(study / f"x{ESCAPE}.safetensors", 10**6)
    rows = (study / "health.jsonl").read_text().splitlines()
    bad = {"event": "alert", "time_utc": ESCAPE, "level": "danger", "text": ESCAPE * 50}
    worse = {
        **json.loads(rows[0]),
        "paused": ESCAPE,
        "no_gpu": ESCAPE,
        "phase": ESCAPE,
        "rate": "x",
        "trial": [1],
    }
    (study / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (bad, worse)))
    text = shown("luca")
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 80 and "[red]" in text
    json.loads(shown("luca", "--json"))


def test_reading_changes_nothing(study: Path) -> None:
    started(study)
    night(study)

    def times() -> dict[Path, int]:  # SQLite's readers note themselves in the -shm file
        return {path: path.stat().st_mtime_ns for path in study.rglob("*") if not path.name.endswith("-shm")}

    before = times()
    shown("luca")
    assert times() == before


def test_a_missing_folder_is_a_mistake_of_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for words in ((), ("nobody",), ("other",)):  # "other" is a folder in which no command worked
        result = CliRunner().invoke(main, ["watch", *words])
        assert result.exit_code == 2 and len(result.output.splitlines()) == 2, result.output


def test_a_narrow_terminal_and_a_wide_one(study: Path) -> None:
    started(study)
    night(study)
    for width in (40, 80, 120):
        screen = Console(file=StringIO(), width=width)
        screen.print(watch_screen(watched(study, "hpo resume luca"), width))
        assert max(map(len, screen.file.getvalue().splitlines())) <= width  # type: ignore[attr-defined]
