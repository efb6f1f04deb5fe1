"""A search on a disk that is full from some moment on: nothing is lost, and it goes on when there is room."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hpo.search.sampled import SearchLimits
from hpo.study.folder import StudyFolder, read_json
from tests.faults.zygote import attempt
from tests.tiny_search import check_study, make_search, table, tiny_bench

pytestmark = pytest.mark.faults
TRIALS, MOMENTS = 1, 12


def search(root: Path, data: Path) -> None:
    make_search(tiny_bench(root, data), SearchLimits(TRIALS)).run()


def search_without_room(root: Path, data: Path, free: int, counted: Path | None = None) -> None:
    """A search in a process that can write ``free`` times, and then never again: the disk is full."""
    write, made = os.write, [0]

    def limited(descriptor: int, content: Any) -> int:
        made[0] += 1
        if made[0] > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    os.write = limited
    try:
        search(root, data)
    finally:
        os.write = write
        if counted is not None:
            counted.write_text(str(made[0]))


def test_a_disk_that_is_full_at_any_moment_of_a_search_loses_nothing(tmp_path: Path, data: Path) -> None:
    """With room again, the same call ends with the results of a search that always had room."""
    whole = StudyFolder(tmp_path / "whole")
    assert attempt(search_without_room, whole.root, data, 10**9, tmp_path / "count") == 0
    writes = int((tmp_path / "count").read_text())
    assert writes >= MOMENTS
    ended = []
    for moment in range(MOMENTS):
        folder = StudyFolder(tmp_path / f"{moment}")
        ended.append(attempt(search_without_room, folder.root, data, moment * writes // MOMENTS))
        assert ended[-1] in (0, 1), "an error, never a crash"
        assert attempt(search, folder.root, data) == 0, moment
        check_study(folder, TRIALS)
        assert table(folder) == table(whole)
        for number in range(TRIALS):
            again, first = read_json(folder.trial(number).result), read_json(whole.trial(number).result)
            assert again and first and again["lora_sha256"] == first["lora_sha256"]
    assert ended.count(1) >= MOMENTS // 2, "the disk was full where it matters"
