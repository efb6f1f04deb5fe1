"""The first hour on a GPU: a part that fails or hangs does not end the rest, and the same command goes on."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest

from tests.bench import first_hour
from tests.bench.first_hour import Part, run


def parts_named(*names):
    return [Part(name, 1, lambda cpu, place: {}, lambda row: [f"value {row['value']}"]) for name in names]


@pytest.fixture
def given(tmp_path):
    return argparse.Namespace(out=tmp_path, cpu=True, again=None, minutes=60.0)


@pytest.fixture
def parts(monkeypatch):
    found = parts_named("one", "two", "three")
    monkeypatch.setattr(first_hour, "PARTS", found)
    return found


def test_a_part_that_fails_is_reported_and_the_same_command_goes_on(given, parts):
    asked = []

    def measured(part, seconds):
        asked.append((part.name, seconds))
        if part.name == "three" and len(asked) == 3:
            raise KeyboardInterrupt
        return {"failed": "no | card"} if part.name == "two" else {"value": 7}

    with pytest.raises(KeyboardInterrupt):
        run(parts, given, measured)
    text = (given.out / "first_hour.md").read_text()
    assert "value 7" in text and "no / card" in text and "Not run yet." in text
    run(parts, given, measured)
    assert [name for name, _ in asked] == ["one", "two", "three", "three"]
    given.again = "failed"
    run(parts, given, measured)
    assert [name for name, _ in asked[4:]] == ["two"]
    assert all(seconds <= 60 for _, seconds in asked)
    kept = json.loads((given.out / "first_hour.json").read_text())
    assert set(kept["parts"]) == {"one", "two", "three"}


def test_it_ends_within_its_time(given, parts, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    given.minutes = 1.5
    asked = {}

    def measured(part, seconds):
        asked[part.name] = seconds
        clock[0] += seconds
        return {"value": 1}

    run(parts, given, measured)
    assert asked == {"one": 60.0, "two": 30.0}
    assert sum(part.minutes for part in first_hour.PARTS) <= 60
    assert "Not run yet." in (given.out / "first_hour.md").read_text()


def test_a_part_that_the_hour_cut_off_goes_on_with_the_same_command(given, parts, capsys):
    cut_off = {"failed": "it was ended after 5 s", "timed_out": True}
    given.minutes = 0.5  # less than a part's own limit
    run(parts[:1], given, lambda part, seconds: dict(cut_off))
    assert "Not finished after" in (given.out / "first_hour.md").read_text()
    assert "the same command goes on" in capsys.readouterr().out
    given.minutes = 60.0
    run(parts[:1], given, lambda part, seconds: dict(cut_off))  # its own limit is too short
    assert "--again failed" in capsys.readouterr().out
    run(parts[:1], given, lambda part, seconds: {"value": 7})
    assert "value 7" not in (given.out / "first_hour.md").read_text()
    given.again = "failed"
    run(parts[:1], given, lambda part, seconds: {"value": 7})
    assert "value 7" in (given.out / "first_hour.md").read_text()


def test_cells_that_are_measured_are_shown_before_all_are(given, monkeypatch):
    part = next(part for part in first_hour.PARTS if part.name == "cells")
    monkeypatch.setattr(first_hour, "PARTS", [part])

    def measured(part, seconds):
        cell = {"step_seconds": 0.5, "peak_bytes": 9e9, "predicted": 9e9, "users_gb": 8}
        (given.out / first_hour.CELLS_FILE).write_text(json.dumps({"sdxl-1024-b1": cell}))
        return {"failed": "it was ended after 1020 s", "timed_out": True}

    kept = run([part], given, measured)
    text = (given.out / "first_hour.md").read_text()
    assert "| sdxl-1024-b1 | 8 |" in text and "Not finished" in text
    assert "unfinished" in kept["cells"]


def test_ctrl_c_and_a_folder_that_cannot_be_made_are_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(first_hour, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        first_hour.main(["--cpu", "--out", str(tmp_path)])
    assert caught.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        first_hour.main(["--cpu", "--out", str(tmp_path / "file" / "folder")])
    assert caught.value.code == 2 and "cannot be made" in capsys.readouterr().err


def test_the_limits_of_all_parts_are_an_hour_together():
    assert sum(part.minutes for part in first_hour.PARTS) <= first_hour.MINUTES


def test_what_was_measured_without_a_gpu_does_not_get_into_a_page_of_one(given, parts):
    run(parts, given, lambda part, seconds: {"value": 1})
    given.cpu = False
    with pytest.raises(SystemExit, match="another --out"):
        run(parts, given, lambda part, seconds: {"value": 1})


def test_a_process_that_hangs_is_ended_and_one_that_breaks_is_told(tmp_path, monkeypatch):
    def starting(code):
        def popen(command, **how):
            return real([sys.executable, "-c", code], **how)

        monkeypatch.setattr(first_hour.subprocess, "Popen", popen)

    real = subprocess.Popen
    starting("import threading; threading.Event().wait()")
    assert first_hour._child([], tmp_path / "log", 0.5) == {
        "failed": "it was ended after 0 s",
        "timed_out": True,
    }
    starting("raise SystemExit('the driver is old')")
    assert "the driver is old" in first_hour._child([], tmp_path / "log", 60.0)["failed"]
    starting("print('words'); print('{\"value\": 3}')")
    assert first_hour._child([], tmp_path / "log", 60.0) == {"value": 3}


def test_what_a_part_starts_stays_in_its_process_group(tmp_path, monkeypatch):
    """A part that takes too long is ended with its group: what it started must be in it."""
    real = subprocess.Popen
    code = "import os; print('{\"group\":', os.getpgrp(), '}')"
    monkeypatch.setattr(
        first_hour.subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", code], **how)
    )
    assert first_hour._child([], tmp_path / "log", 60.0)["group"] != os.getpgrp()
    found = [*first_hour.memory(True, tmp_path)["forms"].values()]
    found += first_hour.cells(True, tmp_path)["cells"].values()
    assert len(found) == 3 and {row["group"] for row in found} == {os.getpgrp()}


def test_every_failed_allocation_is_shown_with_what_became_of_it():
    rows = {
        "cublas": {"raised": "RuntimeError: a | b", "recognised": True, "goes_on": False},
        "cudnn": {"failed": "it ended with -6"},
    }
    text = "\n".join(first_hour.show_memory({"forms": rows}))
    assert "| cublas | RuntimeError: a / b | yes | **no** |" in text and "it ended with -6" in text


def test_a_failed_allocation_of_this_machine_is_recognised_and_training_goes_on():
    found = first_hour.failure("allocation", cpu=True)
    assert found["recognised"] and found["goes_on"] and "allocate" in found["raised"]
