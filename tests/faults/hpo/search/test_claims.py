"""A hundred cheap trials, several processes, kills and pauses: each trial once, in a file and on a server."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from hpo.search.claim import Claim
from hpo.study import leases
from hpo.study.folder import StudyFolder
from hpo.study.optunaparts import state_of
from hpo.study.ownership import ClaimLost, ownership_of
from hpo.study.place import VARIABLE, place_of
from hpo.study.server import server_of
from hpo.study.storage import open_study
from tests.cheap_claims import WORKER, claims_of, enqueue, on_its_own_machine, tell, work
from tests.faults.zygote import attempt, finish, start
from tests.postgres import Postgres
from trainer.errors import MachineError
from trainer.files import read_records

pytestmark = pytest.mark.faults
TRIALS, WORKERS = 100, 4
LEASE_SECONDS = 1.0


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything imported once before the first fork."""
    importlib.import_module("psycopg")
    folder = StudyFolder(tmp_path_factory.mktemp("warm") / "study")
    enqueue(folder, 1)
    work(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StudyFolder]:
    """An empty study folder, whose study will be in a file or on a server."""
    folder = StudyFolder(tmp_path / "study")
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv(VARIABLE, server.place(folder))
    yield folder


@pytest.fixture
def on_server(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    folder = StudyFolder(tmp_path / "study")
    monkeypatch.setenv(VARIABLE, postgres.place(folder))
    return folder


def begin(folder: StudyFolder, trials: int) -> None:
    """In a process of its own: this one then has no connection that its forks would share."""
    assert attempt(enqueue, folder, trials) == 0


def worker(folder: StudyFolder, machine: str, change: Callable[[Claim], None] = lambda claim: None) -> None:
    on_its_own_machine(machine, LEASE_SECONDS)
    work(folder, change)


def dying_worker(folder: StudyFolder, machine: str, at: int) -> None:
    """Kills itself with its ``at``-th claim."""
    claimed = []

    def kill(claim: Claim) -> None:
        claimed.append(claim)
        if len(claimed) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    worker(folder, machine, kill)


def rescue(folder: StudyFolder) -> None:
    """A worker that comes back until nothing is left of the dead."""
    on_its_own_machine("rescuer", LEASE_SECONDS)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        work(folder)
        if not open_study(folder).get_trials(states=(TrialState.RUNNING, TrialState.WAITING)):
            return
        time.sleep(0.1)
    raise AssertionError("a trial is left over")


def check_each_once(folder: StudyFolder, trials: int) -> None:
    """In a process of its own, for the same reason as ``begin``."""

    def check() -> None:
        found = open_study(folder).get_trials(deepcopy=False)
        assert [t.number for t in found] == list(range(trials))
        assert {t.state for t in found} == {TrialState.COMPLETE}
        assert [t.value for t in found] == [number / trials for number in range(trials)]

    assert attempt(check) == 0


def starts(folder: StudyFolder, number: int) -> list[dict[str, object]]:
    return read_records(folder.trial(number).starts)


def test_100_queued_trials_and_4_processes_with_a_kill_run_each_once(folder: StudyFolder) -> None:
    """W1 · weight 3 · Four workers take trials of one study at once, and one is killed → Each trial runs once."""
    begin(folder, TRIALS)
    workers = [start(worker, folder, f"m{n}") for n in range(WORKERS - 1)]
    victim = start(dying_worker, folder, "victim", 8)
    assert finish(victim) == -signal.SIGKILL
    assert [finish(pid) for pid in workers] == [0] * (WORKERS - 1)
    assert attempt(rescue, folder) == 0
    check_each_once(folder, TRIALS)
    counts = [len(starts(folder, number)) for number in range(TRIALS)]
    assert sorted(counts) == [1] * (TRIALS - 1) + [2]  # only the victim's last trial was claimed again
    again = starts(folder, counts.index(2))
    assert again[0]["pid"] == victim and [row["adopted"] for row in again] == [False, True]
    assert len({row["pid"] for number in range(TRIALS) for row in starts(folder, number)}) >= WORKERS


def take_over(folder: StudyFolder, number: int) -> Claim:
    """Claim until it is this trial, whose worker is silent; others are told."""
    claims = claims_of(folder)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        claim = claims.take()
        if claim is None:
            time.sleep(0.05)
        elif claim.trial.number == number:
            assert claim.adopted
            return claim
        else:
            tell(claim)
            claim.lock.release()
    raise AssertionError("it was not taken over")


def test_a_worker_paused_beyond_its_lease_cannot_tell_and_takes_the_next_trial(
    on_server: StudyFolder,
) -> None:
    folder = on_server
    begin(folder, 2)

    def pause(claim: Claim) -> None:
        if claim.trial.number == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    sleeper = start(worker, folder, "sleeper", pause)
    os.waitpid(sleeper, os.WUNTRACED)

    def other() -> None:
        on_its_own_machine("other", LEASE_SECONDS)
        claim = take_over(folder, 0)
        claims = claims_of(folder)
        claims.study.enqueue_trial({"x": 0.5})  # for the sleeper, when it has lost trial 0
        os.kill(sleeper, signal.SIGCONT)
        until = time.monotonic() + 20
        while not folder.trial(2).starts.is_file():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert state_of(claim.trial, claims.study) == TrialState.RUNNING  # the sleeper has told nothing
        tell(claim)

    assert attempt(other) == 0
    assert finish(sleeper) == 0
    assert [row["pid"] == sleeper for row in starts(folder, 0)] == [True]
    assert "trial 0 is no longer this worker's" in folder.trial(0).log.read_text()
    assert [row["pid"] == sleeper for row in starts(folder, 2)] == [True]

    def check() -> None:
        found = open_study(folder).get_trials(deepcopy=False)
        assert [t.state for t in found] == [TrialState.COMPLETE] * 3
        assert [t.user_attrs[WORKER] == sleeper for t in found] == [False, False, True]

    assert attempt(check) == 0


def test_a_worker_that_lives_keeps_its_trial_for_longer_than_a_lease(on_server: StudyFolder) -> None:
    begin(on_server, 1)

    def hold() -> None:
        on_its_own_machine("holder", 0.4)
        claims = claims_of(on_server)
        claim = claims.take()
        assert claim is not None
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert attempt(take_nothing) == 0
        claim.lock.check(certain=True)
        tell(claim)

    def take_nothing() -> None:
        on_its_own_machine("other", 0.4)
        claims = claims_of(on_server)
        assert claims.take() is None

    assert attempt(hold) == 0
    check_each_once(on_server, 1)


def test_a_dead_worker_of_this_machine_is_replaced_at_once(folder: StudyFolder) -> None:
    """Without waiting for its lease of two minutes."""
    begin(folder, 1)
    assert attempt(work, folder, lambda claim: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
    assert attempt(work, folder) == 0
    check_each_once(folder, 1)


def test_a_claim_taken_over_can_be_neither_checked_nor_told_nor_renewed(on_server: StudyFolder) -> None:
    begin(on_server, 1)

    def lose() -> None:
        on_its_own_machine("loser", 1000.0)
        claims = claims_of(on_server)
        claim = claims.take()
        assert claim is not None
        with open_leases(on_server) as connection:
            connection.execute(sqlalchemy.update(leases.TABLE).values(expires=1.0))
        assert attempt(other) == 0
        claim.lock.check()  # by its own clock it still has it
        with pytest.raises(ClaimLost, match="trial 0 is no longer this worker's"):
            tell(claim)
        with pytest.raises(ClaimLost):
            claim.lock.check()
        assert state_of(claim.trial, claims.study) == TrialState.RUNNING
        assert WORKER not in open_study(on_server).get_trials()[0].user_attrs

    def other() -> None:
        on_its_own_machine("other", 0.01)  # the server was started longer ago
        assert take_over(on_server, 0)
        os._exit(0)  # without giving it back

    assert attempt(lose) == 0


def test_after_a_restart_of_the_server_leases_last_for_their_full_time_again(
    postgres: Postgres, on_server: StudyFolder
) -> None:
    """A server may be away for longer than a lease.  Its workers could not renew, and they live."""
    begin(on_server, 1)

    def hold() -> None:
        on_its_own_machine("holder", 1000.0)
        claims = claims_of(on_server)
        assert claims.take()
        with open_leases(on_server) as connection:
            connection.execute(
                sqlalchemy.update(leases.TABLE).where(leases.TABLE.c.expires > 0).values(expires=1.0)
            )
        postgres.restart()
        os._exit(0)

    def other() -> None:
        on_its_own_machine("other", 1000.0)
        claims = claims_of(on_server)
        assert claims.take() is None

    assert attempt(hold) == 0
    assert attempt(other) == 0


@contextlib.contextmanager
def open_leases(folder: StudyFolder) -> Iterator[sqlalchemy.Connection]:
    place = place_of(folder)
    assert place is not None
    with server_of(place).engine.begin() as connection:
        yield connection


def test_the_study_lock_is_held_by_one_process_and_given_up_after_its_time(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder, 0)
    monkeypatch.setattr(leases, "STUDY_WAIT_SECONDS", 1)
    inside, done = folder.root / "inside", folder.root / "done"

    def hold() -> None:
        with ownership_of(folder).study():
            inside.touch()
            while not done.exists():
                time.sleep(0.02)

    def wait() -> None:
        lock = folder.study_lock().held(1.0) if folder.database.is_file() else ownership_of(folder).study()
        with pytest.raises(MachineError), lock:
            pass

    holder = start(hold)
    while not inside.exists():
        time.sleep(0.02)
    assert attempt(wait) == 0
    done.touch()
    assert finish(holder) == 0


def test_a_worker_that_stops_under_the_study_lock_does_not_keep_it(on_server: StudyFolder) -> None:
    """The server ends its transaction, and the lease of what it claimed ends by itself."""
    begin(on_server, 2)

    def stop() -> None:
        on_its_own_machine("sleeper", LEASE_SECONDS)
        claims = claims_of(on_server)
        with contextlib.suppress(StorageInternalError), claims.ownership.study():
            assert claims.ownership.trial(0).try_acquire()
            os.kill(os.getpid(), signal.SIGSTOP)
            claims.ownership.trial(1).try_acquire()
            os._exit(1)  # it would go on without the lock
        os._exit(0)

    sleeper = start(stop)
    os.waitpid(sleeper, os.WUNTRACED)
    until = time.monotonic() + 60
    while not all(t.state.is_finished() for t in open_study(on_server).get_trials(deepcopy=False)):
        assert (
            time.monotonic() < until
        )  # a worker ends while the lease lasts, of a trial that was never asked for
        attempt(worker, on_server, "other")
    os.kill(sleeper, signal.SIGCONT)
    assert finish(sleeper) == 0
    check_each_once(on_server, 2)
