"""Several processes that open a new study's database at once."""

from __future__ import annotations

from pathlib import Path

from hpo.study.folder import StudyFolder
from hpo.study.storage import open_storage
from tests.faults import zygote

PROCESSES = 6


def opens(root: Path) -> None:
    assert open_storage(StudyFolder(root)).get_all_studies() == []


def test_processes_that_create_a_database_at_once_all_open_it(tmp_path: Path) -> None:
    for n in range(3):
        root = tmp_path / f"study{n}"
        root.mkdir()
        running = [zygote.start(opens, root) for _ in range(PROCESSES)]
        assert [zygote.finish(pid) for pid in running] == [0] * PROCESSES
