"""docs/reliability.md is what the tests say, and no serious row of the fault list is without a test in CI."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests import scoreboard
from tests.scoreboard import MISSING, all_names, page, rows

TEST = """
import pytest
raise SystemExit
pytestmark = pytest.mark.faults
@pytest.mark.{mark}
def test_a(a):
    '''A1 · weight 5 · x | y
    z → all
    good.

    More.
    '''
def test_b():
    '''A2 · weight 2 · no such weight → x'''
"""


def test_the_page_is_what_the_tests_say() -> None:
    told = (scoreboard.TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert told == page(), "run: python -m tests.scoreboard > docs/reliability.md"


def test_every_row_has_one_test_or_a_reason() -> None:
    count = Counter(row.name for row in rows())
    assert len(all_names()) == 55 and max(count.values()) == 1
    assert sorted([*count, *MISSING]) == sorted(all_names()), "a row has a test, or is in MISSING; never both"


def test_rows_that_cost_data_or_work_are_tested_in_ci() -> None:
    assert [row.name for row in rows() if row.weight >= 3 and not row.in_ci] == []
    assert [name for name, (weight, _, _) in MISSING.items() if weight >= 3] == []


def test_marks_and_docstrings_are_read_without_importing_the_test(tmp_path: Path) -> None:
    for mark, in_ci in (("parametrize('a', [1])", True), ("slow", False), ("skipif(True)", False)):
        (tmp_path / "test_x.py").write_text(TEST.format(mark=mark), encoding="utf-8")
        (row,) = rows(tmp_path)
        assert (row.name, row.weight, row.fault, row.promise) == ("A1", 5, "x | y z", "all good.")
        assert row.marks >= {"faults"} and row.in_ci == in_ci
