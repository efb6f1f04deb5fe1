"""Which study a command works on, and the record of the commands that worked on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from hpo.study.which import SeveralStudies, find_folder, parent_of, study_at, worked_on
from hpo.study.work import INVOCATION, WORK, Invocation, open_steps, recorded, steps
from tests.places import ROOT
from trainer.errors import ConfigError, Interrupted, MachineError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def invocation(here: Path) -> Iterator[None]:
    words = ("search", "a", "--notify", "tgram://secret/1", "--trials", "4", "--notify=json://other")
    token = INVOCATION.set(Invocation(words, str(here)))
    yield
    INVOCATION.reset(token)


def made(name: str, hours_ago: float | None, command: str = "search", **facts: str) -> StudyFolder:
    """A study folder whose last command ended so long ago (None: no commands were recorded)."""
    folder = StudyFolder(Path("runs") / name)
    folder.root.mkdir(parents=True)
    folder.database.touch()
    folder.facts.write_text(json.dumps({"facts": facts}))
    if hours_ago is not None:
        when = (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat()
        rows = (
            {"id": "1", "event": "started", "step": command, "words": [command, name], "time_utc": when},
            {"id": "1", "event": "finished", "time_utc": when},
        )
        (folder.root / WORK).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_study_last_worked_on_is_meant_whatever_was_written_last(here: Path) -> None:
    made("a", 1, "confirm")
    made("b", 30)
    StudyFolder(Path("runs/b")).database.write_text("touched by a reader")
    assert find_folder(None).name == "a"
    assert [one.says.split(",")[0] for one in worked_on()] == ["confirm", "search"]


def test_two_studies_within_a_day_are_refused_with_both_commands(here: Path) -> None:
    made("a", 3, "confirm")
    made("b", 20)
    made("c", 28)
    token = INVOCATION.set(Invocation(("transfer", "--to", "mini-sdxl"), str(here)))
    with pytest.raises(SeveralStudies) as caught:
        find_folder(None)
    INVOCATION.reset(token)
    assert [one.folder.name for one in caught.value.worked] == ["a", "b"]
    assert caught.value.commands == ("hpo transfer a --to mini-sdxl", "hpo transfer b --to mini-sdxl")


@pytest.mark.parametrize("name", ["luca", "runs/luca", "runs/luca/", "runs/luca/trial_0001", "./runs/luca"])
def test_a_study_is_named_by_its_name_or_a_path_in_it(here: Path, name: str) -> None:
    folder = made("luca", None)
    (folder.root / "trial_0001").mkdir()
    found = find_folder(name)
    assert (found.root, found.words) == (Path("runs/luca"), "luca")
    elsewhere = find_folder(str(here / "runs" / "luca"), Path("other"))
    assert elsewhere.words == "luca"


def test_a_study_in_another_folder_keeps_its_runs_folder(here: Path) -> None:
    made("luca", None).root.parent.rename("other runs")
    found = find_folder("other runs/luca")
    assert found.words == "luca --runs 'other runs'"
    assert study_at(Path("other runs")) is None


def test_an_unknown_study_is_refused_with_the_known_ones(here: Path) -> None:
    made("luca", None)
    for name in ("luka", "runs/luka"):
        with pytest.raises(ConfigError, match="no study") as caught:
            find_folder(name)
        assert "luca" in caught.value.hint
    with pytest.raises(ConfigError, match="no study in nowhere"):
        find_folder(None, Path("nowhere"))


def test_confirmations_and_target_trials_belong_to_their_study(here: Path) -> None:
    made("a", 5)
    for name, fact in (("a__confirm", "confirms"), ("a__sdxl", "source_study")):
        assert parent_of(made(name, 1, **{fact: "a"})) == "a"
    assert find_folder(None).name == "a" and find_folder("a__confirm").name == "a__confirm"


def test_a_step_is_recorded_without_the_urls_of_notify(here: Path, invocation: None) -> None:
    root = made("a", None).root
    with recorded(root, "search"):
        (running,) = steps(root)
        assert running.state == "running"
    (step,) = steps(root)
    assert step.state == "finished" and step.words == ("search", "a", "--trials", "4")
    assert (
        step.notified
        and "secret" not in (root / WORK).read_text()
        and "other" not in (root / WORK).read_text()
    )
    assert not list((root / ".locks").glob("work-*"))


def test_how_a_step_ended(here: Path, invocation: None) -> None:
    root = made("a", None).root
    with pytest.raises(Interrupted) as caught, recorded(root, "search"):
        raise Interrupted("stopped", "run the same command again")
    assert caught.value.hint == "hpo resume a"
    with pytest.raises(MachineError), recorded(root, "confirm"):
        raise MachineError("disk full")
    with pytest.raises(ConfigError), recorded(root, "transfer sdxl", begun=False):
        raise ConfigError("refused before anything was changed")
    assert [(step.step, step.state) for step in open_steps(root)] == [
        ("search", "interrupted"),
        ("confirm", "failed"),
    ]
    with recorded(root, "search"):
        pass
    assert [step.step for step in open_steps(root)] == ["confirm"]


def test_a_killed_step_is_interrupted(here: Path, invocation: None) -> None:
    root = made("a", None).root
    code = f"""
import os, signal
from pathlib import Path
from hpo.study.work import INVOCATION, Invocation, recorded
INVOCATION.set(Invocation(("confirm", "a"), "/"))
with recorded(Path({str(root.resolve())!r}), "confirm"):
    print("begun", flush=True)
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    assert [step.state for step in steps(root)] == ["running"] and not open_steps(root)
    process.kill()
    process.wait()
    (step,) = open_steps(root)
    assert (step.state, step.words) == ("interrupted", ("confirm", "a"))
    with recorded(root, "search"):
        assert len(list((root / ".locks").glob("work-*"))) == 1  # the killed one's lock file is gone


def test_nothing_is_recorded_for_a_library(here: Path) -> None:
    root = made("a", None).root
    with recorded(root, "search"):
        pass
    assert not (root / WORK).exists()
