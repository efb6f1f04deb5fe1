"""A worker's side: reports never hold up the work, and the end of the supervisor is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.night import role
from hpo.night.process import Process, by_command
from hpo.night.role import VARIABLE, Role, taken_role
from tests.places import ROOT
from trainer.errors import ConfigError

WORKER = """
import os, signal, sys, threading
from hpo.night import role
role.ORPHAN_SECONDS = float(sys.argv[1])
worker = role.taken_role()
assert role.VARIABLE not in os.environ and not os.get_inheritable(worker.role.reports)
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, lambda *_: print("deaf", flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


def started(seconds: float, kind: str) -> subprocess.Popen[str]:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(seconds), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(writing,),
        env={**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: Role(1, 2, "cpu", reports=writing).text()},
    )
    os.close(writing)
    os.close(reading)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_worker_whose_supervisor_has_died_is_asked_to_end() -> None:
    process = started(60, "listens")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == -signal.SIGTERM


def test_a_worker_that_does_not_end_then_is_killed() -> None:
    process = started(0.1, "deaf")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert process.wait(20) == -signal.SIGKILL
    assert process.stdout.read() == "deaf\n"  # asked once


def test_a_supervisor_that_does_not_read_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, _ = os.pipe()
    stdin = os.dup(0)
    os.dup2(quiet, 0)  # the thread that watches the supervisor waits for ever
    reading, writing = os.pipe()
    monkeypatch.setenv(VARIABLE, Role(1, 1, "cpu", reports=writing).text())
    try:
        worker = taken_role()
        assert worker is not None
        for number in range(3000):
            worker.report("progress", dropped=True, number=number, text="x" * 100)
        worker.report("result", trial=7)
        text = os.read(reading, 1 << 20)  # what was in the pipe
        worker.report("end")
        text += os.read(reading, 1 << 20)
        events = [json.loads(line)["event"] for line in text.splitlines()]
        assert 100 < events.count("progress") < 3000 and events[-2:] == ["result", "end"]
        os.close(reading)
        worker.report("nobody reads this")
    finally:
        os.dup2(stdin, 0)


@pytest.mark.parametrize(
    "text", ["", "2", "{}", '{"number": 1, "workers": 2, "device": "cpu", "reports": 987}']
)
def test_the_variable_of_a_worker_set_by_hand_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{VARIABLE} is set") as refused:
        taken_role()
    assert refused.value.hint == f"run: unset {VARIABLE}"


def test_a_file_named_like_a_module_in_the_users_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text("print('mine')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    process = Process(by_command(["--version"]), Role(1, 1, "cpu"), tmp_path / "log", "x")
    while process.ended() is None:
        process.reports()
    assert process.ended() == 0
    assert "hpo " in (tmp_path / "log").read_text() and "mine" not in (tmp_path / "log").read_text()
    assert role.STOP_WORD.endswith(b"\n")
