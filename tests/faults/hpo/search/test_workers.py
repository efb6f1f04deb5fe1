"""Several processes on one study: every trial is run once, dead ones are replaced, live ones are left alone."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from hpo.search.sampled import SearchLimits
from hpo.study.folder import StudyFolder
from hpo.study.locks import Lock, holder
from hpo.study.storage import create_study, open_study
from tests.faults.zygote import attempt, finish, start
from tests.tiny_search import Recorder, check_study, draw_and_warm_up, make_search, tiny_bench
from trainer.errors import ConfigError, MachineError
from trainer.files import read_records

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and everything imported and run once before the first fork."""
    return draw_and_warm_up(tmp_path_factory.mktemp("begun"))


def search(root: Path, data: Path, trials: int, delay_seconds: float = 0.0) -> None:
    view = Recorder()
    view.event_hook = lambda event: time.sleep(delay_seconds)
    make_search(tiny_bench(root, data), SearchLimits(trials), view).run()


def test_two_workers_run_each_trial_once(tmp_path: Path, data: Path) -> None:
    """W2 · weight 3 · The same search is started twice → The second one joins as a worker; each trial runs
    once, and their number is the study's total.
    """
    root = tmp_path / "study"
    workers = [start(search, root, data, 5, 0.1) for _ in range(2)]
    assert [finish(pid) for pid in workers] == [0, 0]
    check_study(StudyFolder(root), 5)
    starts = [len(read_records(folder.starts)) for folder in StudyFolder(root).trial_folders()]
    assert starts == [1] * 5


def test_random_kills_of_two_workers_lose_and_double_nothing(tmp_path: Path, data: Path) -> None:
    """A5 · weight 3 · Several workers are killed at random moments → Every trial is finished once, and the
    value in the database is that of its file.
    """
    root, draw = tmp_path / "study", random.Random(3)
    attempt(search, root, data, 1)
    workers = [start(search, root, data, 5, 0.05) for _ in range(2)]
    for _ in range(4):
        time.sleep(draw.uniform(0.3, 2.0))
        victim = draw.randrange(2)
        os.kill(workers[victim], signal.SIGKILL)
        finish(workers[victim])
        workers[victim] = start(search, root, data, 5, 0.05)
    assert [finish(pid) for pid in workers] == [0, 0]
    check_study(StudyFolder(root), 5)


def test_a_suspended_worker_keeps_its_trial_and_goes_on_with_it(tmp_path: Path, data: Path) -> None:
    """W10 · weight 3 · A worker is suspended (Ctrl-Z, a closed laptop) and woken → It keeps its trial and goes
    on with it; nobody else has taken it.
    """
    root = tmp_path / "study"
    folder = StudyFolder(root)
    sleeper = start(search, root, data, 2, 0.3)
    while not folder.trial(0).starts.exists():
        time.sleep(0.02)
    os.kill(sleeper, signal.SIGSTOP)
    assert holder(folder.trial_lock(0).path) == sleeper
    assert attempt(search, root, data, 2) == 0  # a second worker does the other trial and leaves this one
    states = {t.number: t.state.name for t in open_study(folder).get_trials(deepcopy=False)}
    assert states == {0: "RUNNING", 1: "COMPLETE"}
    os.kill(sleeper, signal.SIGCONT)
    assert finish(sleeper) == 0
    check_study(folder, 2)
    assert len(read_records(folder.trial(0).starts)) == 1


def test_an_orphaned_child_does_not_keep_a_dead_worker_alive(tmp_path: Path, data: Path) -> None:
    """W11 · weight 3 · A child of a dead worker lives on → The trial of the worker can be taken up at once."""
    path = tmp_path / "x.lock"

    def hold_and_die() -> None:
        assert Lock(path).try_acquire()
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert attempt(hold_and_die) == -signal.SIGKILL
    lock = Lock(path)
    assert lock.try_acquire()
    lock.release()


def hold_the_database(path: Path, seconds: float) -> None:
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    path.with_name("held").touch()
    time.sleep(seconds)
    blocker.execute("ROLLBACK")


def test_another_writer_on_the_database_is_waited_for(tmp_path: Path, data: Path) -> None:
    """W3 · weight 3 · Another program locks the database → It is waited for, longer than SQLite would."""
    root = tmp_path / "study"
    attempt(search, root, data, 1)
    blocker = start(hold_the_database, StudyFolder(root).database, 7.0)  # sqlite's usual patience is 5 s
    while not (root / "held").exists():
        time.sleep(0.02)
    assert attempt(search, root, data, 2) == 0
    assert finish(blocker) == 0
    check_study(StudyFolder(root), 2)


def test_a_lost_database_is_never_replaced_by_an_empty_one(tmp_path: Path, data: Path) -> None:
    """W4 · weight 5 · The database of a study with trials is gone → It is said. An empty study never takes its
    place.
    """
    root = tmp_path / "study"
    attempt(search, root, data, 1)
    folder = StudyFolder(root)
    for path in root.glob("study.db*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"study\.db is missing"):
        create_study(folder, {})
    assert not folder.database.exists()


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 200])
def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    folder = StudyFolder(tmp_path)
    folder.database.write_bytes(content)
    with pytest.raises(MachineError, match=r"cannot open .*study\.db"):
        open_study(folder)
    assert folder.database.read_bytes() == content


def test_no_clock_decides_who_lives(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W8 · weight 3 · A clock that jumps by an hour → Nobody loses a trial: whether a worker lives does not
    depend on a clock.
    """
    root = tmp_path / "study"
    sleeper = start(search, root, data, 2, 0.3)
    while not StudyFolder(root).trial(0).starts.exists():
        time.sleep(0.02)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)  # the second worker's clock is an hour ahead
    assert attempt(search, root, data, 2) == 0
    assert finish(sleeper) == 0
    check_study(StudyFolder(root), 2)
