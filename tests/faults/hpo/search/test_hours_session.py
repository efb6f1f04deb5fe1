"""``hpo search --hours``: search and confirmation in one command; killed, stopped, with too little time, by two
processes."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import hpo.search.session
from hpo.cli.main import main
from hpo.search.workbench import Workbench
from hpo.search.worker import Worker
from hpo.study.config import Inputs
from hpo.study.folder import TOTAL, StudyFolder, read_json
from hpo.study.hours import Round
from hpo.study.storage import open_study
from hpo.study.work import INVOCATION, Invocation, open_steps
from hpo.study.worked import Stored, Worked, stored_hours, used_seconds
from hpo.terminal.live import PlainView
from tests.faults.zygote import attempt, die_at, finish, start
from tests.tiny_confirm import check_confirmation
from tests.tiny_search import check_study, draw_images
from tests.tiny_session import run_session
from trainer.files import read_records

pytestmark = pytest.mark.faults
WORDS = ("search", "study", "--hours", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return draw_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "study"


def target_of(root: Path) -> StudyFolder:
    return StudyFolder(root.with_name("study__confirm"))


class Clock:
    """The time that the command has: stands still but when a trial of the search has ended."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.after: dict[int, float] = {}  # trial → what the clock shows then

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    own, tell = Clock(), Worker.tell

    def tells(worker: Worker, claim: object, result: object) -> None:
        tell(worker, claim, result)  # type: ignore[arg-type]
        if worker.folder.name == "study":
            own.seconds = own.after.pop(claim.trial.number, own.seconds)  # type: ignore[attr-defined]

    monkeypatch.setattr(Worker, "tell", tells)
    monkeypatch.setattr(hpo.search.session, "Worked", functools.partial(Worked, now=own, tick=own))
    yield own


def test_a_search_ends_with_a_confirmed_winner_and_again_does_nothing(root: Path, data: Path) -> None:
    said = run_session(root, data, 2, hours=1.0)
    lines = said.splitlines()
    assert "plan for 1 hour: 2 trials, the limit of --trials, each about" in said
    assert (
        "this study searches 4 settings, but 2 trials are too few even for 1" in said.partition("plan for")[0]
    )
    assert "study: 2 trials are done, the limit of --trials" in said
    assert lines[-1].startswith("next: hpo train") and sum(line.startswith("next:") for line in lines) == 1
    check_study(StudyFolder(root), 2)
    check_confirmation(target_of(root), 4)
    outcome = read_json(StudyFolder(root).confirmed)
    assert outcome is not None and outcome["how"] == "retrained"
    assert any(line.startswith(f"confirmed: trial {outcome['winner']}, score") for line in lines)
    stored = stored_hours(open_study(StudyFolder(root)))
    assert stored is not None and stored.round == Round(1, 2) and stored.hours == 1
    where = ["status", "study", "--runs", str(root.parent)]
    assert "# time budget: 1 hour; 0:" in CliRunner().invoke(main, where).output
    budget = json.loads(CliRunner().invoke(main, [*where, "--json"]).output)["budget"]
    assert budget["hours"] == 1 and 0 < budget["used_seconds"] < 600
    again = run_session(root, data, 2, hours=1.0)
    assert "training" not in again and f"confirmed (retrained): trial {outcome['winner']}" in again
    assert read_json(StudyFolder(root).confirmed) == outcome


def test_a_budget_that_is_used_up_by_trial_0_ends_after_it(root: Path, data: Path, clock: Clock) -> None:
    clock.after = {0: 35.95}
    said = run_session(root, data, None, hours=0.01)
    assert "study: no further trial fits into 0.01 hours" in said
    assert "only trial 0 has a score" in said and not target_of(root).root.exists()
    check_study(StudyFolder(root), 1)
    study = open_study(StudyFolder(root))
    assert study.user_attrs[TOTAL] == 1 and stored_hours(study) is not None
    run_session(root, data, 1)  # a search without hours has no budget
    assert stored_hours(open_study(StudyFolder(root))) is None


def test_without_time_for_the_confirmation_its_command_is_said_and_more_hours_make_it(
    root: Path, data: Path, clock: Clock
) -> None:
    clock.after = {1: 3599.9}
    said = run_session(root, data, 2, hours=1.0)
    assert "too little time is left to confirm" in said
    assert said.splitlines()[-1].startswith("next: hpo confirm study")
    assert not target_of(root).root.exists()
    said = run_session(root, data, 2, hours=2.0)
    assert "the time budget was 1 hour and is 2 hours now" in said
    assert said.splitlines()[-1].startswith("next: hpo train")
    check_study(StudyFolder(root), 2)
    check_confirmation(target_of(root), 4)


def search_killed_at(root: Path, data: Path, place: str, call: int, when: str) -> None:
    INVOCATION.set(Invocation(WORDS, str(root.parent.parent)))
    die_at(place, call, when)
    run_session(root, data, 2, hours=1.0)


SEAMS = [
    ("hpo.search.trial.write_result", 2, "after"),  # in the search: its result is on disk only
    ("hpo.confirm.proposals.suggested_run", 2, "before"),  # in the confirmation
]


@pytest.mark.parametrize(("place", "call", "when"), SEAMS)
def test_a_killed_command_goes_on_with_what_is_left(
    root: Path, data: Path, place: str, call: int, when: str
) -> None:
    folder = StudyFolder(root)
    assert attempt(search_killed_at, root, data, place, call, when) == -signal.SIGKILL
    used = used_seconds(folder)
    assert {step.words for step in open_steps(root)} == {WORDS}
    said = run_session(root, data, 2, hours=1.0)
    assert said.splitlines()[-1].startswith("next: hpo train")
    check_study(folder, 2)
    check_confirmation(target_of(root), 4)
    assert len(list(folder.hours.glob("*.jsonl"))) == 2
    assert used_seconds(folder) > used
    assert ("the search within 1 hour is over" in said) is place.startswith("hpo.confirm.")


def one_of_two(root: Path, data: Path) -> None:
    said = run_session(root, data, 2, hours=1.0)
    assert said.splitlines()[-1].startswith(("next: hpo train", "next: hpo status"))


def test_two_processes_share_the_search_and_one_confirms(root: Path, data: Path) -> None:
    both = [start(one_of_two, root, data) for _ in range(2)]
    assert [finish(pid) for pid in both] == [0, 0]
    folder = StudyFolder(root)
    check_study(folder, 2)
    check_confirmation(target_of(root), 4)
    assert sum(len(read_records(one.starts)) for one in target_of(root).trial_folders()) == 4
    assert len(list(folder.hours.glob("*.jsonl"))) == 2


def test_the_confirmation_uses_the_device_of_its_own_process(root: Path, data: Path) -> None:
    """study.json names that of the worker that wrote it last."""
    devices = list[str | None]()

    def loads(inputs: Inputs) -> None:
        devices.append(inputs.device)
        if len(devices) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_session(root, data, 2, hours=1.0, loads=loads)
    facts = StudyFolder(root).facts
    stored = json.loads(facts.read_text())
    facts.write_text(json.dumps({**stored, "inputs": {**stored["inputs"], "device": "cuda:9"}}))
    said = run_session(root, data, 2, hours=1.0, loads=loads)
    assert "the search within 1 hour is over" in said
    assert devices == [None, "cpu", None]  # chosen; that of the search; chosen, as there was no search


def test_the_plan_is_stored_before_the_next_worker_scores_the_base(
    root: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, found = hpo.search.session._one_after_the_other, list[Stored | None]()

    @contextlib.contextmanager
    def watched(bench: Workbench, view: PlainView) -> Iterator[None]:
        with alone(bench, view):
            yield
            found.append(stored_hours(open_study(bench.folder)))

    monkeypatch.setattr(hpo.search.session, "_one_after_the_other", watched)
    run_session(root, data, 1, hours=1.0)
    (stored,) = found
    assert stored is not None and stored.pace is not None and stored.pace.image_seconds > 0
