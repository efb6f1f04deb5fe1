"""The time worked under a budget: work counts once, a pause does not count, a killed process loses its last seconds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from hpo.study.hours import Round
from hpo.study.pace import Pace
from hpo.study.storage import create_study, open_study
from hpo.study.worked import Stored, Worked, forget_hours, stored_hours, used_seconds
from tests.faults.zygote import attempt


class Clock:
    """The time of day and a steady clock, which tests move."""

    def __init__(self, day: float = 1e9) -> None:
        self.day, self.steady = day, 50.0

    def passes(self, seconds: float) -> None:
        self.day += seconds
        self.steady += seconds

    def worked(self, folder: StudyFolder, hours: float = 0.1) -> Worked:
        return Worked(folder, hours, now=lambda: self.day, tick=lambda: self.steady)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "study")


def test_a_pause_does_not_count(folder: StudyFolder) -> None:
    clock = Clock()
    with clock.worked(folder).noted():
        clock.passes(100)
    clock.passes(5000)
    second = clock.worked(folder)
    with second.noted():
        clock.passes(20)
        assert second.own == 20 and second.used == 120 and second.left == 240
    assert used_seconds(folder) == 120


def test_two_processes_at_once_count_once(folder: StudyFolder) -> None:
    clock = Clock()
    one = clock.worked(folder)
    with one.noted():
        clock.passes(30)
        two = clock.worked(folder)
        with two.noted():
            clock.passes(60)
            one.note()
            two.note()
            assert one.used == two.used == 90
        clock.passes(10)
    assert used_seconds(folder) == 100


def test_a_clock_that_is_set_meanwhile_changes_nothing(folder: StudyFolder) -> None:
    clock = Clock()
    one = clock.worked(folder)
    clock.passes(30)
    clock.day -= 7200
    assert one.used == 30 and one.left == 330


def killed(folder: StudyFolder, clock: Clock) -> None:
    with clock.worked(folder).noted():
        clock.passes(40)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_searches_no_more_and_its_notes_stay(folder: StudyFolder) -> None:
    clock = Clock()
    folder.hours.mkdir(parents=True)
    (folder.hours / "a.jsonl").write_text(
        json.dumps({"begun": clock.day - 50, "seconds": 40.0}) + "\n" + '{"begun": 1e9, "sec'
    )
    left = clock.worked(folder)
    with left.noted():
        assert attempt(killed, folder, clock) == -signal.SIGKILL
        assert left.searching == 1 and left.leave()
        assert left.used == 40  # the killed one was noted at its start only
    assert len(list(folder.locks.glob("hours-*.lock"))) == 1
    with clock.worked(folder).noted():
        assert len(list(folder.locks.glob("hours-*.lock"))) == 1
    assert not list(folder.locks.glob("hours-*.lock"))


def asks(folder: StudyFolder, expected: int, last: bool) -> None:
    own = Clock().worked(folder)
    with own.noted():
        assert own.searching == expected
        assert own.leave() is last


def test_the_last_of_several_processes_is_told_so(folder: StudyFolder) -> None:
    first = Clock().worked(folder)
    with first.noted():
        assert attempt(asks, folder, 2, False) == 0
        assert first.searching == 1 and first.leave()
        assert attempt(asks, folder, 1, True) == 0


def test_the_budget_is_stored_with_the_study(folder: StudyFolder) -> None:
    folder.locks.mkdir(parents=True)
    study = create_study(folder, {"seed": "7"})
    assert stored_hours(study) is None
    kept = Stored(0.1, Round(2, 1), Pace(0.1, 0.2, 0.3, 40.0), 3.5)
    kept.write(study)
    assert stored_hours(open_study(folder)) == kept
    Stored(0.2).write(study)
    assert stored_hours(open_study(folder)) == Stored(0.2)
    forget_hours(study)
    assert stored_hours(open_study(folder)) is None
