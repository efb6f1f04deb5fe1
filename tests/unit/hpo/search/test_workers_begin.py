"""Workers that start a study together: one scores the untrained base, the others wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpo.search import session
from hpo.search.session import _one_after_the_other
from hpo.study.folder import StudyFolder
from hpo.study.locks import holder

HOLD = """
import sys
from pathlib import Path
from hpo.study.folder import StudyFolder
print(StudyFolder(Path(sys.argv[1])).base_lock().try_acquire(), flush=True)
sys.stdin.read()
"""


def test_the_second_worker_says_that_it_waits_and_goes_on_when_the_first_is_gone(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "True\n"
        bench = SimpleNamespace(folder=StudyFolder(tmp_path))
        said: list[str] = []

        def say(line: str) -> None:
            assert first.poll() is None  # it waits for a living process
            said.append(line)
            first.kill()

        with _one_after_the_other(bench, SimpleNamespace(say=say)):
            assert first.wait() != 0
            assert said == ["another worker scores the untrained base; waiting for it …"]
        assert holder(bench.folder.base_lock().path) is None
        with _one_after_the_other(bench, SimpleNamespace(say=lambda line: said.append(line))):
            assert len(said) == 1


def test_a_worker_that_waits_long_names_the_process_that_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "NAMED_AFTER_SECONDS", 0.0)
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "True\n"
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if f"still waiting for process {first.pid}" in line or len(said) > 2:
                first.kill()

        with _one_after_the_other(SimpleNamespace(folder=StudyFolder(tmp_path)), SimpleNamespace(say=say)):
            assert len(said) == 2 and f"process {first.pid}" in said[1]
