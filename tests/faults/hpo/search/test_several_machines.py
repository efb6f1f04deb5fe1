"""Real searches of workers that seem to be on different machines, with a PostgreSQL server between them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import hpo.search.dashboard
from hpo.cli.main import main
from hpo.search.sampled import SearchLimits
from hpo.study import leases
from hpo.study.folder import StudyFolder
from hpo.study.place import STORAGE, VARIABLE, Place, chosen_place, place_of, settle
from hpo.study.server import server_of
from hpo.study.storage import begun_study, open_place, open_study
from tests.cheap_claims import enqueue, on_its_own_machine
from tests.faults.zygote import attempt, finish, start
from tests.postgres import PASSWORD, Postgres
from tests.tiny_confirm import check_confirmation, run_confirm
from tests.tiny_search import (
    Recorder,
    check_study,
    draw_and_warm_up,
    make_search,
    table,
    tiny_bench,
)
from tests.tiny_session import run_session
from trainer.errors import ConfigError, DataError, MachineError
from trainer.files import make_folder, read_records

pytestmark = pytest.mark.faults
TRIALS = 8
LEASE_SECONDS = 1.5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and everything imported and run once before the first fork."""
    importlib.import_module("psycopg")
    return draw_and_warm_up(tmp_path_factory.mktemp("begun"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "runs" / "study"


def search(root: Path, data: Path, machine: str, trials: int = TRIALS, delay_seconds: float = 0.0) -> None:
    """A worker that leaves beside the study which trials it began, and what it said."""
    on_its_own_machine(machine, LEASE_SECONDS)
    view = Recorder()
    view.event_hook = lambda event: time.sleep(delay_seconds)
    begin = view.on_trial

    def on_trial(number: int, *rest: Any) -> None:
        begin(number, *rest)
        (root.parent / machine).write_text(str(number))

    view.on_trial = on_trial  # type: ignore[method-assign]
    try:
        make_search(tiny_bench(root, data), SearchLimits(trials), view).run()
    finally:
        (root.parent / f"{machine}.said").write_text("\n".join(view.lines))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_four_machines_a_kill_a_pause_and_a_restart_of_the_server_lose_and_double_nothing(
    postgres: Postgres, root: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder(root)
    monkeypatch.setenv(VARIABLE, postgres.place(folder))
    names = ("killed", "paused", "third", "fourth")
    workers = {name: start(search, root, data, name, TRIALS, 0.2) for name in names}
    wait_for(lambda: all((root.parent / name).is_file() for name in names))

    os.kill(workers["killed"], signal.SIGKILL)
    assert finish(workers["killed"]) == -signal.SIGKILL
    os.kill(workers["paused"], signal.SIGSTOP)
    os.waitpid(workers["paused"], os.WUNTRACED)
    lost = folder.trial(int((root.parent / "paused").read_text()))
    postgres.restart("immediate")  # as if it had crashed, with two workers in their trials

    def adopted() -> bool:
        if len(read_records(lost.starts)) > 1:
            return True
        attempt(search, root, data, "helper")
        return False

    wait_for(adopted)
    os.kill(workers["paused"], signal.SIGCONT)
    assert [finish(workers[name]) for name in names[1:]] == [0, 0, 0]

    def finished() -> bool:
        assert attempt(search, root, data, "helper") == 0
        return attempt(check_study, folder, TRIALS) == 0

    wait_for(finished)
    said = (root.parent / "paused.said").read_text()
    assert f"trial {lost.number} is no longer this worker's" in said and "takes the next trial" in said
    starts = [len(read_records(one.starts)) for one in folder.trial_folders()]
    assert (
        len(starts) == TRIALS and sum(starts) == TRIALS + 2
    )  # the killed one's and the paused one's, once more


def test_proposals_that_are_refused_do_not_count_and_the_number_of_trials_is_exact(
    postgres: Postgres, root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told under the study lock counts at once: here every second proposal repeats the first trial."""
    monkeypatch.setenv(VARIABLE, postgres.place(StudyFolder(root)))
    worker = make_search(tiny_bench(root, data), SearchLimits(3))
    worker.source.refusal = lambda suggested, number: "duplicate of trial 0" if number % 2 else ""
    assert worker.run() == "3 trials are done"
    states = [t.state.name for t in open_study(StudyFolder(root)).get_trials()]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]


def test_a_search_on_a_server_proposes_and_scores_what_one_in_a_file_does(
    postgres: Postgres, root: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file = StudyFolder(tmp_path / "file")
    make_search(tiny_bench(in_file.root, data), SearchLimits(2)).run()
    monkeypatch.setenv(VARIABLE, postgres.place(StudyFolder(root)))
    make_search(tiny_bench(root, data), SearchLimits(2)).run()
    assert table(StudyFolder(root)) == table(in_file)


def test_a_worker_that_has_lost_its_trial_writes_nothing_more_into_its_folder(
    postgres: Postgres, root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, view, kept = StudyFolder(root), Recorder(), {}
    monkeypatch.setenv(VARIABLE, postgres.place(folder))
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.4)

    def take_over(event: Any) -> None:
        view.event_hook = lambda event: None
        place = place_of(folder)
        assert place is not None
        other = {
            "worker": "other",
            "boot": "elsewhere",
            "host": "gpu2",
            "pid": 77,
            "fence": 9,
            "expires": 1e11,
        }
        with server_of(place).engine.begin() as connection:
            connection.execute(leases.TABLE.update().where(leases.TABLE.c.name == "trial 0").values(**other))
        time.sleep(0.5)  # this worker's own certainty has ended
        kept.update(files(folder.trial(0).root))

    view.event_hook = take_over
    why = make_search(tiny_bench(root, data), SearchLimits(2), view).run()
    assert files(folder.trial(0).root) == kept and "train.jsonl" in kept
    (said,) = [line for line in view.lines if "no longer this worker's" in line]
    assert "process 77 on gpu2 has taken the trial over" in said
    assert why == "the remaining trials are running in other processes: trial 0 (process 77 on gpu2)"
    assert [result.number for result in view.results] == [1]


def files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_a_server_that_is_away_is_waited_for(
    postgres: Postgres, root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, postgres.place(StudyFolder(root)))
    view = Recorder()

    def stop(event: Any) -> None:
        view.event_hook = lambda event: None
        postgres.stop()

    def say(text: str) -> None:
        view.lines.append(text)
        if "does not answer" in text:
            postgres.start_again()

    view.event_hook, view.say = stop, say  # type: ignore[method-assign]
    make_search(tiny_bench(root, data), SearchLimits(2), view).run()
    assert any("does not answer; waiting" in line for line in view.lines)
    assert "the database answers again" in view.lines
    check_study(StudyFolder(root), 2)
    assert view.started == [(0, False), (1, False)]


def test_a_connection_that_is_cut_while_a_result_is_told_loses_nothing(
    postgres: Postgres, root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, postgres.place(StudyFolder(root)))
    view, publish = Recorder(), hpo.search.dashboard.publish

    def cut(*given: Any) -> None:
        monkeypatch.setattr("hpo.search.dashboard.publish", publish)
        postgres.restart("immediate")
        publish(*given)

    monkeypatch.setattr("hpo.search.dashboard.publish", cut)
    make_search(tiny_bench(root, data), SearchLimits(2), view).run()
    assert any("connection to the database was lost" in line for line in view.lines)
    assert any("trial 0 was already finished on disk" in line for line in view.lines)
    check_study(StudyFolder(root), 2)
    assert view.started == [(0, False), (1, False)]


@contextlib.contextmanager
def storage(url: str) -> Any:
    token = STORAGE.set(url)
    try:
        yield
    finally:
        STORAGE.reset(token)


def address(postgres: Postgres) -> str:
    return postgres.new_database().render_as_string(hide_password=False)


def contents(place: Path) -> bytes:
    return b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())


def test_the_command_and_its_readers_find_the_study_and_keep_the_password_to_themselves(
    postgres: Postgres, root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = address(postgres), StudyFolder(root)
    with storage(url):
        shown = run_session(root, data, trials=2)
    monkeypatch.setenv(VARIABLE, url)
    shown += run_session(root, data, trials=3)  # from another shell, with the address in the environment
    attempt_status = CliRunner().invoke(main, ["status", "study", "--runs", str(root.parent)])
    assert attempt_status.exit_code == 0, attempt_status.output
    assert "complete=3/3" in attempt_status.output
    listed = CliRunner().invoke(main, ["studies", "--runs", str(root.parent)])
    assert "3\t3" in listed.output or "3/3" in listed.output
    check_study(folder, 3)
    assert not folder.database.exists()

    run_confirm(folder, data, top=1, seeds=1, anyway=True)
    target = StudyFolder(root.with_name("study__confirm"))
    own, other = place_of(folder), place_of(target)
    assert own is not None and other is not None
    assert (other.url, other.study) == (own.url, "study__confirm") and not target.database.exists()
    deleted = CliRunner().invoke(main, ["delete", "study", "--yes", "--runs", str(root.parent)])
    shown_last = deleted.output.partition("moved to ")[2]  # what can be undone is said first
    assert "optuna delete-study --study-name study --storage postgresql+psycopg://hpo@" in shown_last
    assert "its trials are still in the database" in shown_last
    assert not root.exists()
    for secret in (PASSWORD, url.split(":")[2].partition("@")[0]):
        assert secret.encode() not in contents(root.parent)
        assert secret not in shown + attempt_status.output + listed.output + deleted.output


def test_a_search_that_cannot_begin_takes_its_study_back_from_the_server(
    postgres: Postgres, root: Path, data: Path
) -> None:
    with storage(address(postgres)):
        with pytest.raises(DataError, match="scores would be meaningless"):
            run_session(root, data, guarded=True)
        assert not root.exists()
        run_session(root, data)
        assert (study := begun_study(StudyFolder(root))) is not None and len(study.get_trials()) == 1


def test_a_study_of_another_folder_is_left_alone(postgres: Postgres, root: Path, tmp_path: Path) -> None:
    """A second machine whose runs folder is not the shared one; and one that lost its storage.json."""
    url, elsewhere = address(postgres), StudyFolder(tmp_path / "elsewhere" / "study")
    with storage(url):
        settle_new(StudyFolder(root))
        enqueue(StudyFolder(root), 1)
        with pytest.raises(ConfigError, match="belongs to another runs folder") as refused:
            open_place(elsewhere, chosen_place(elsewhere))
        assert "a folder that all machines share" in refused.value.hint
        settle_new(elsewhere)
        with pytest.raises(ConfigError, match="belongs to another runs folder"):
            open_study(elsewhere)
        assert len(open_study(StudyFolder(root)).get_trials()) == 1


def settle_new(folder: StudyFolder) -> None:
    make_folder(folder.root)
    settle(folder, chosen_place(folder))


def test_a_server_that_cannot_be_reached_is_named_without_the_password(
    postgres: Postgres, root: Path, data: Path
) -> None:
    url = postgres.new_database()
    with storage(url.set(password="wrong-secret").render_as_string(hide_password=False)):
        with pytest.raises(MachineError, match="cannot open the database at postgresql") as refused:
            run_session(root, data)
        assert VARIABLE in refused.value.hint and "wrong-secret" not in str(refused.value)
    with storage(url.set(port=1).render_as_string(hide_password=False)):
        with pytest.raises(MachineError, match="cannot open the database") as refused:
            run_session(root, data)
        assert PASSWORD not in str(refused.value)
    assert not root.exists()


def test_a_second_name_of_the_same_server_is_followed(
    postgres: Postgres, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine calls it 127.0.0.1, and another one localhost."""
    folder, url = StudyFolder(root), postgres.new_database()
    with storage(url.render_as_string(hide_password=False)):
        settle_new(folder)
        enqueue(folder, 2)
    monkeypatch.setenv(VARIABLE, url.set(host="localhost").render_as_string(hide_password=False))
    assert len(open_study(folder).get_trials()) == 2
    place = place_of(folder)
    assert place is not None and "127.0.0.1" in place.url
    assert server_of(place).engine.url.host == "localhost"
    other = StudyFolder(
        root.with_name("other")
    )  # another worker has just begun it, or this is another server
    make_folder(other.root)
    settle(other, Place(place.url, "other", "0"))
    with pytest.raises(ConfigError, match=r"in the database at .*127.0.0.1.* there is none at .*localhost"):
        open_place(other, chosen_place(other))


def test_the_dashboard_opens_the_folders_own_study(
    postgres: Postgres, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, address(postgres))
    for name in ("first", "study"):
        settle_new(StudyFolder(root.with_name(name)))
        enqueue(StudyFolder(root.with_name(name)), 1)
    said: queue.Queue[str] = queue.Queue()
    serves = (StudyFolder(root), "127.0.0.1", 0, said.put)
    threading.Thread(target=hpo.search.dashboard.serve, args=serves, daemon=True).start()
    page = said.get(timeout=60).split()[3]
    with urllib.request.urlopen(page.replace("/dashboard/", "/api/")) as answer:
        assert json.load(answer)["name"] == "study"


def test_a_search_within_hours_on_a_server_ends_with_a_confirmed_winner(
    postgres: Postgres, root: Path, data: Path
) -> None:
    with storage(address(postgres)):
        said = run_session(root, data, trials=2, hours=1.0)
        check_study(StudyFolder(root), 2)
        check_confirmation(StudyFolder(root.with_name("study__confirm")), 4)
    assert said.splitlines()[-1].startswith("next: hpo train")
    assert not (root / ".locks" / "study.lock").exists()  # the study lock is the server's
