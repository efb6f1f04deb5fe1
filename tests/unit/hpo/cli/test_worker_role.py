"""What a command that was started as a worker does otherwise: nothing is recorded, asked or added twice."""

from __future__ import annotations

import contextvars
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from hpo.cli.workers import as_worker, launching, role_taken
from hpo.machine import ASSIGNED, WORKERS
from hpo.night import Role
from hpo.search.crew import Crew
from hpo.search.sampled import SearchLimits, SearchProposals
from hpo.search.session import SearchRequest
from hpo.study.config import Inputs
from hpo.study.folder import StudyFolder
from hpo.study.notify import NOTIFIER, Notifier
from hpo.study.use import Use
from hpo.study.work import INVOCATION, Invocation, Work, recorded
from hpo.terminal.workers import WorkersView
from tests.inbox import Post

TYPED = Invocation(("search", "luca", "--workers", "2"), "/here", began=12.0)


def request(**words: Any) -> SearchRequest:
    return SearchRequest(
        Inputs("sd15"),
        4,
        ask=lambda question, answers: "",
        enqueue=Path("mine.toml"),
        fork_from="other",
        **words,
    )


def as_second_command(role: Role) -> tuple[SearchRequest, Invocation | None, str | None, int]:
    """What it does, and what it sets for the rest of its process."""

    def run() -> tuple[SearchRequest, Invocation | None, str | None, int]:
        INVOCATION.set(TYPED)
        worker: Any = SimpleNamespace(role=role, report=lambda event, **values: None)
        own, _ = as_worker(worker, request(workers=2, launch=launching(Console(file=io.StringIO()))))
        return own, INVOCATION.get(), ASSIGNED.get(), WORKERS.get()

    return contextvars.copy_context().run(run)


def test_the_leading_worker_adds_what_is_enqueued_and_the_others_do_not() -> None:
    leads, command, device, workers = as_second_command(Role(1, 2, "cuda:3", leads=True, began=5.0))
    assert leads.enqueue == Path("mine.toml")
    assert (device, workers) == ("cuda:3", 2)
    assert command is not None and command.is_worker and command.began == 5.0
    for own in (leads, follows := as_second_command(Role(2, 2, "cpu", until=99.0))[0]):
        assert own.launch is None and own.ask is None and own.report is not None
        assert own.inputs == Inputs("sd15"), "the device is not what the user asked for"
    assert (follows.enqueue, follows.until) == (None, 99.0)


def test_a_command_typed_by_a_person_has_no_role_and_a_library_starts_no_processes() -> None:
    assert role_taken() is None
    assert contextvars.Context().run(launching, Console(file=io.StringIO())) is None


def test_a_worker_is_not_recorded_as_a_command_of_its_own(tmp_path: Path) -> None:
    def run() -> None:
        INVOCATION.set(Invocation(("search",), "/here", is_worker=True))
        with recorded(tmp_path, "search"):
            pass

    contextvars.copy_context().run(run)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_hangs_and_starts_again_is_two_messages(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "luca")
    view = WorkersView(Console(file=io.StringIO()), "luca", ["cpu", "cpu"])
    crew = Crew(folder, view, Use(folder, None), Work(begun=True), max_hours=None)
    told = Post()
    token = NOTIFIER.set(Notifier(told))  # type: ignore[arg-type]
    try:
        post: Any = SimpleNamespace(
            number=2,
            words="worker 2",
            why="it hung: no progress for 30 minutes",
            log=tmp_path / "worker-2.log",
            pulse=SimpleNamespace(silent_words="30 minutes"),
            process=SimpleNamespace(pid=4),
        )
        crew.on_hang(post)
        crew.on_pause(post, 5.0)
    finally:
        NOTIFIER.reset(token)
    assert [message.title for message in told.messages] == [
        f"{folder.words}: hung",
        f"{folder.words}: restarted",
    ]
    assert all("worker 2" in message.body for message in told.messages)


def test_max_hours_count_from_the_first_begin_also_for_a_worker_that_starts_again(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    view = WorkersView(Console(file=io.StringIO()), "luca", ["cpu", "cpu"])
    crew = Crew(folder, view, Use(folder, None), Work(begun=False), max_hours=2.0)
    assert crew.until() is None
    post: Any = SimpleNamespace(number=1)
    before = time.monotonic()
    for _ in range(2):
        crew.on_report(post, {"event": "begun"})
    first = crew.until()
    assert first is not None and before + 7200 <= first <= time.monotonic() + 7200
    crew.on_report(post, {"event": "begun"})
    assert crew.until() == first and crew.use.begun and crew.work.begun
    bench: Any = SimpleNamespace(study=SimpleNamespace(objectives=("score",)), folder=folder)
    for until, over in ((time.monotonic() - 1, True), (time.monotonic() + 60, False)):
        limits = SearchLimits(4, max_hours=2.0, until=until)
        proposals = SearchProposals(None, bench, limits, lambda text: None)  # type: ignore[arg-type]
        assert bool(proposals.over()) is over
