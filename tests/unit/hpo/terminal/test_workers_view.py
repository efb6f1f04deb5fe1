"""Several workers on one screen: what all of them say is shown once, and the block fits 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hpo.study.standing import Standing
from hpo.terminal.live import Current
from hpo.terminal.workers import LiveWorkersView, ReportingView, WorkersView, reporting_console, workers_block
from trainer.events import Step

NOW = {
    "total": 30, "complete": 12, "infeasible": 1, "failed": 0,
    "best": [4, 0.5312, 0.01], "baseline": [0, 0.5, 0.01],
}  # fmt: skip


def shown(*devices: str) -> tuple[WorkersView, io.StringIO]:
    screen = io.StringIO()
    return WorkersView(Console(file=screen, width=80), "luca", devices), screen


def line(text: str) -> dict[str, Any]:
    return {"event": "line", "text": text}


def trial(number: int) -> dict[str, Any]:
    return {"event": "trial", "trial": number, "text": f"trial {number} (13/30): rank 4", "standing": NOW}


def test_until_the_first_trial_the_leader_speaks_for_all_and_warnings_are_never_lost() -> None:
    view, screen = shown("cuda:0", "cuda:1")
    view.know(["searched as a style"])
    view.starts(1, leads=True)
    view.starts(2, leads=False)
    for text in ("searched as a style", "cost: 30 trials", "warning: slow"):
        view.shows(1, line(text))
    for text in ("cost: 29 trials", "warning: slow", "warning: cuda:1 has no bf16"):
        view.shows(2, line(text))
    view.starts(1, leads=True)  # it died and says all of it again
    view.shows(1, line("cost: 30 trials"))
    view.shows(2, trial(5))
    view.shows(2, line("resuming trial 5: from step 100"))
    assert screen.getvalue().splitlines() == [
        "cost: 30 trials",
        "warning: slow",
        "warning: cuda:1 has no bf16",
        "worker 2: trial 5 (13/30): rank 4",
        "resuming trial 5: from step 100",
    ]


def test_the_end_is_that_of_the_worker_that_ended_last_and_a_confirmation_is_shown_as_it_goes() -> None:
    view, screen = shown("cuda:0", "cuda:1")
    for number in (1, 2):
        view.shows(number, trial(number))
    view.shows(1, {"event": "ended"})
    view.shows(2, {"event": "ended"})
    view.shows(2, line("study=luca complete=30/30"))
    view.shows(1, line("study=luca complete=29/30"))  # written earlier, read later
    assert view.last_end == ["study=luca complete=30/30"]
    assert "study=" not in screen.getvalue()
    view.shows(2, {"event": "follows"})
    view.shows(2, line("confirming 3 trials"))
    assert screen.getvalue().splitlines()[-2:] == ["study=luca complete=30/30", "confirming 3 trials"]
    assert view.last_end == []


def test_workers_that_are_stopped_say_the_study_once() -> None:
    view, screen = shown("cpu", "cpu")
    for number in (1, 2):
        view.shows(number, {"event": "begun"})
        view.shows(number, trial(number))
        view.shows(number, line(f"study=luca complete={number}/30"))
    assert "study=" not in screen.getvalue() and view.last_study == "study=luca complete=2/30"


def test_progress_of_all_is_one_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    view, screen = shown("cuda:0", "cuda:1")
    for number in (1, 2):
        view.shows(number, trial(number))
    before = screen.getvalue()
    report = {
        "event": "progress",
        "phase": "training",
        "done": 3,
        "total": 9,
        "text": "step 3/9",
        "left": 600.0,
    }
    view.shows(1, report)
    assert screen.getvalue() == before
    monkeypatch.setattr("hpo.terminal.workers.PLAIN_SECONDS", 0.0)
    view.shows(2, {**report, "left": 900.0})
    assert screen.getvalue().replace("\n", "") == before.replace("\n", "") + (
        "  worker 1: trial 1, step 3/9; worker 2: trial 2, step 3/9; study: about 15:00 left"
    )


def test_the_block_fits_80_columns() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    view = LiveWorkersView(console, "luca", ["cuda:0", "cuda:1", "cuda:2"])
    view.shows(1, trial(1234))
    text = "step 1310/1600, 2.4 steps/s, loss 0.1234, 2 skipped"
    report = {"event": "progress", "phase": "training", "done": 3, "total": 9, "text": text, "left": 4000.0}
    view.shows(1, report)
    view.rests(2, "starts again", 28.0)
    console.print(workers_block(view, 80))
    block = screen.getvalue().splitlines()
    assert max(map(len, block)) <= 80
    assert block[0].rstrip() == "luca  3 workers  12/30 trials"
    assert "cuda:0 trial 1234" in block[1] and "step 1310/1600, 2.4 steps/s, loss 0.1234" in block[1]
    assert block[2].rstrip().startswith("2 cuda:1") and block[2].rstrip().endswith("starts again in 28 s")
    assert "best so far: trial 4, 0.5312 ± 0.0100" in block[4]
    assert block[-1].rstrip() == "about 1:06:40 left   1 infeasible"
    view.on_ask()
    console.print(workers_block(view, 80))
    assert screen.getvalue().rstrip().endswith("press Ctrl-C again to stop at once")


def test_what_a_worker_prints_is_in_its_log_and_progress_is_only_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sent: list[dict[str, Any]] = []

    def report(event: str, *, dropped: bool = False, **values: Any) -> None:
        sent.append({"event": event, **values})

    view = ReportingView(reporting_console(report), lambda suggested: suggested, report)
    view.say("[bold] is no markup")
    standing = Standing(30, 12, 1, 0, 2, (4, 0.5, 0.1), None)
    view.on_trial(7, {"rank": 4}, False, standing)
    view.on_event(Step(1, 9, 1, 1, 0.25, 1e-4, 1e-4, 0.1, 0.5))
    view.on_event(Step(2, 9, 1, 1, 0.25, 1e-4, 1e-4, 0.1, 0.5))  # too early for the next report
    assert isinstance(view.current, Current)
    log = capsys.readouterr().out
    assert "[bold] is no markup" in log and "trial 7 (13/30): rank 4" in log
    assert [event["event"] for event in sent] == ["line", "trial", "progress"]
    assert sent[0]["text"] == "[bold] is no markup"
    assert sent[1]["standing"]["best"] == (4, 0.5, 0.1) and sent[2]["done"] == 1
