"""Commands on a study with one worker, under their supervisor: a trial whose process fails goes on, or fails with its
reason, and the next one follows.  Real processes, real signals."""

from __future__ import annotations

import os
import random
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit

import hpo.search.workbench
from evaluation.score.anchors import Anchors
from hpo.study.config import Inputs
from hpo.study.folder import StudyFolder, read_json
from hpo.study.storage import open_study
from tests import supervised
from tests.faults.zygote import finish
from tests.inbox import open_inbox
from tests.supervised import (
    MIB,
    Fault,
    always,
    begin,
    is_over,
    once,
    private_bytes,
    saves_every_step,
    tell_supervisor,
)
from tests.tiny_search import STUDY, check_study, draw_and_warm_up, tiny_bench
from trainer.errors import Interrupted
from trainer.files import read_records

pytestmark = pytest.mark.faults
HANG = ("--hang-minutes", "0.02")  # 1.2 s
MANY = 16  # trials, to see whether memory grows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and everything imported and run once before the first fork."""
    return draw_and_warm_up(tmp_path_factory.mktemp("begun"), "1_zkw figure")


class Study:
    """A folder with a study, and calls of commands on it."""

    def __init__(self, here: Path, data: Path) -> None:
        self.here, self.data, self.screen = here, data, here / "screen"
        self.marker = here / "marker"
        (here / "tiny.toml").write_text(tomlkit.dumps(STUDY))
        self.folder = StudyFolder(here / "runs" / "study")

    def _prepare(self) -> None:
        def load(inputs: Inputs, study: Any, folder: StudyFolder, say: Any) -> Any:
            return tiny_bench(folder.root, self.data, study)

        hpo.search.workbench.load = load
        Anchors.require_separable = lambda anchors: None  # type: ignore[method-assign]  # a random base follows no prompt
        saves_every_step()

    def begin(self, fault: Fault, *words: str) -> int:
        return begin(self.here, self.screen, [*words, *HANG], fault, self._prepare)

    def search(self, fault: Fault = lambda done, what: None, *more: str, trials: int = 3) -> int:
        named = ("search", "study", "--base", "tiny", "--data", str(self.data), "--class", "figure")
        words = (*named, "--definition", "tiny.toml", "--trials", str(trials), "--device", "cpu")
        return finish(self.begin(fault, *words, *more))

    @property
    def said(self) -> str:
        return self.screen.read_text()

    def deaths(self, folder: StudyFolder | None = None) -> list[str]:
        return [row["reason"] for row in read_records((folder or self.folder).root / "night.jsonl")]

    def starts(self) -> list[int]:
        return [
            sum(row["event"] == "start" for row in read_records(trial.starts))
            for trial in self.folder.trial_folders()
        ]

    def loras(self) -> list[bytes]:
        """The LoRA file of every trial."""
        return [trial.lora.read_bytes() for trial in self.folder.trial_folders() if trial.lora.is_file()]


@pytest.fixture
def study(tmp_path: Path, data: Path) -> Study:
    return Study(tmp_path, data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[bytes]:
    """The LoRA files of a search that nothing happened to."""
    study = Study(tmp_path_factory.mktemp("undisturbed"), data)
    assert study.search() == 0, study.said
    return study.loras()


@pytest.mark.parametrize(
    ("what", "reason"), [(supervised.stand_still, "hang"), (supervised.crash, "crash:SIGSEGV")]
)
def test_a_trial_whose_process_fails_goes_on_in_a_new_one(
    study: Study, undisturbed: list[bytes], what: Callable[[], None], reason: str
) -> None:
    assert study.search(once(study.marker, 1, what, "trial_0001")) == 0, study.said
    check_study(study.folder, 3)
    assert study.deaths() == [reason] and study.starts() == [1, 2, 1]
    assert study.loras() == undisturbed
    assert "resuming trial 1: " in study.said


def test_memory_does_not_grow_from_trial_to_trial(study: Study) -> None:
    """B7 · weight 3 · Memory that grows from trial to trial → The memory of the process that runs the trials, and that
    of its supervisor, stay as they are after the first trials.
    """
    rows = study.here / "memory"

    def note(done: int, what: str) -> None:
        if done == 1 and what.endswith("train.jsonl"):
            with rows.open("a") as file:
                file.write(f"{private_bytes(os.getpid())} {private_bytes(os.getppid())}\n")

    assert study.search(note, trials=MANY) == 0, study.said
    worker, supervisor = zip(*(map(int, row.split()) for row in rows.read_text().splitlines()), strict=True)
    assert len(worker) == MANY
    for sizes, most in ((worker, 4 * MIB), (supervisor, MIB)):
        growth = statistics.median(sizes[-5:]) - statistics.median(sizes[3:8])
        assert growth < most, [size // MIB for size in sizes]


def test_a_trial_that_always_hangs_fails_with_that_reason_and_the_next_one_follows(study: Study) -> None:
    with open_inbox() as inbox:
        more = ("--notify", inbox.url, "--notify-on", "failed,finished")
        assert study.search(always(0, supervised.stand_still, "trial_0001"), *more) == 0, study.said
        inbox.wait(2)
    assert inbox.titles == ["study: search finished", "study: trial 1 failed"]
    trials = open_study(study.folder).get_trials(deepcopy=False)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    result = read_json(study.folder.trial(1).result)
    assert result is not None and (result["state"], result["reason"]) == ("failed", "hang")
    assert "it hung: no progress for" in result["message"]
    assert study.deaths() == ["hang"] * 4, "three restarts without new progress"


def test_memory_that_a_process_has_used_up_is_not_the_trials_fault(
    study: Study, undisturbed: list[bytes]
) -> None:
    """Trial 2: by then its process has done enough steps and images to hold all that settings need."""
    assert study.search(once(study.marker, 1, supervised.use_up_memory, "trial_0002")) == 0, study.said
    check_study(study.folder, 3)
    assert study.deaths() == ["host_memory"] and study.loras() == undisturbed


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, Interrupted.exit_code), (signal.SIGUSR1, Interrupted.TERMINATED)]
)
def test_a_signal_saves_and_ends_a_search_and_resume_goes_on(
    study: Study, undisturbed: list[bytes], number: int, code: int
) -> None:
    assert study.search(once(study.marker, 1, tell_supervisor(number), "trial_0001")) == code
    assert "next: hpo resume study" in study.said and study.deaths() == []
    assert is_over(int(study.marker.read_text()))
    study.marker.unlink()
    fault = once(study.marker, 1, supervised.die, "trial_0002")  # resume has a supervisor as well
    assert finish(begin(study.here, study.screen, ["resume", "study"], fault, study._prepare)) == 0, (
        study.said
    )
    check_study(study.folder, 3)
    assert study.deaths() == ["process_died"] and study.loras() == undisturbed
    assert study.said.count("resuming: hpo search") == 1, "its next worker goes on as what it resumed"


def test_a_confirmation_that_was_agreed_to_is_not_asked_about_again(study: Study) -> None:
    assert study.search() == 0, study.said
    reading, writing = os.pipe()
    os.write(writing, b"y\n")
    os.close(writing)

    def prepare() -> None:
        os.dup2(reading, 0)
        study._prepare()

    fault = once(study.marker, 1, supervised.die, "trial_0001")
    words = ["confirm", "study", "--top", "1", "--seeds", "1", "--device", "cpu", "--anyway", *HANG]
    assert finish(begin(study.here, study.screen, words, fault, prepare)) == 0, study.said
    assert study.said.count("start? [y/N]") == 1
    nights = list(study.here.rglob("night.jsonl"))
    assert [read_records(path)[0]["reason"] for path in nights] == ["process_died"]


def test_a_search_survives_kills_at_random_moments(study: Study, undisturbed: list[bytes]) -> None:
    """The small form of tests/bench/soak_search.py."""
    draw = random.Random(15)
    kills = [(draw.randrange(3), draw.choice((0, 1, 2))) for _ in range(4)]  # 0: before the images

    def fault(done: int, what: str) -> None:
        for number, (trial, step) in enumerate(kills):
            marker = study.here / f"kill-{number}"
            if f"trial_{trial:04}" in what and done == step and not marker.exists():
                marker.touch()
                supervised.die()

    assert study.search(fault) == 0, study.said
    check_study(study.folder, 3)
    assert study.loras() == undisturbed and study.deaths() == ["process_died"] * 4
