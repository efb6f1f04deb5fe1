"""docs/reliability.md from the tests: ``python -m tests.scoreboard > docs/reliability.md``.

A test that proves a row of the fault list begins its docstring with the row:

    D4 · weight 5 · what goes wrong → what is promised

The docstrings are read without importing the tests.  ``MISSING`` holds the rows without a test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
GROUPS = {
    "A": ("Crashes", 9),
    "B": ("Resources", 8),
    "C": ("Numbers", 9),
    "D": ("Files and texts from others", 13),
    "W": ("Several workers, time, the machine", 16),
}
ROW = re.compile(r"([ABCDW]\d{1,2}) · weight ([135]) · (.+?) → (.+)")
TABLE = "|---|---|---|---|"
OUTSIDE = frozenset({"slow", "gpu", "skip", "skipif", "xfail"})  # marks of tests that CI leaves out, or may

# Rows without a test: (weight, fault, why).  A row goes from here when a test has it.
MISSING: dict[str, tuple[int, str, str]] = {
    "W14": (
        1,
        "A log that grows without end",
        "none does: train.jsonl has one line a step, and a run has an end",
    ),
}

NOT_PROMISED = (
    "**Power loss.** Every file and its folder are synced before they count. That is as far as it goes: no "
    "test cuts the power, and a disk that lies about syncing can lose the last seconds.",
    "**The same numbers on a GPU.** After a kill, training on a CPU ends with bitwise the same file. CUDA "
    "does not promise the same sums twice; `hpo doctor` and docs/devices.md say what can be done.",
    "**What only a GPU shows.** Real peaks of its memory, 8-bit optimizers that resume there, error codes of "
    "the driver: tests with the mark `gpu`, run by hand where there is one, and not part of this page.",
    "**Locks on network disks.** Whether NFS or SMB keep a lock depends on the server. Work on such a disk is "
    "refused; studies on several machines use a database server (docs/scale-out.md), and are tested with "
    "processes of one machine.",
    "**Bad memory and bad disks.** A checkpoint is checked by its sha256. A bit that flips in memory before "
    "it is written is not seen.",
    "**A process stuck in the driver.** Nothing can end it but a restart of the machine. It is said, and "
    "left.",
    "**Secrets against somebody with your account.** Files of a run can be read by whoever may read your "
    "files.",
)

HEAD = """# Reliability

What can go wrong, and what is promised then. Every row is one test, and its text is the test's own description:
this page is made by `python -m tests.scoreboard > docs/reliability.md`, and CI fails if it is not current.

The weight says what the fault would cost: **5** lost data or a wrong result that nobody notices, **3** a trial that
is stuck, run twice or has to be repaired by hand, **1** an unclear message. Rows of weight 3 and 5 are tested in
every run of CI, without exceptions.
"""


@dataclass(frozen=True)
class Row:
    """A row of the fault list and its test.  ``marks``: pytest's, of the test and its file."""

    name: str
    weight: int
    fault: str
    promise: str
    test: str
    file: Path
    marks: frozenset[str]

    @property
    def in_ci(self) -> bool:
        return not self.marks & OUTSIDE

    @property
    def order(self) -> tuple[str, int]:
        return self.name[0], int(self.name[1:])


def all_names() -> list[str]:
    """Every row of the fault list."""
    return [f"{group}{number}" for group, (_, count) in GROUPS.items() for number in range(1, count + 1)]


def rows(root: Path = TESTS) -> list[Row]:
    """The rows that tests have, sorted."""
    found = [row for path in sorted(root.rglob("test_*.py")) for row in _of_file(path)]
    return sorted(found, key=lambda row: row.order)


def _of_file(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    if " · weight " not in text:
        return
    tree = ast.parse(text)
    of_file = _marks_of_file(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if match := ROW.fullmatch(first):
                name, weight, fault, promise = match.groups()
                marks = of_file | {mark for d in node.decorator_list for mark in _marks(d)}
                yield Row(name, int(weight), fault, promise, node.name, path, frozenset(marks))


def _marks_of_file(tree: ast.Module) -> set[str]:
    return {
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "pytestmark" for t in node.targets)
        for mark in _marks(node.value)
    }


def _marks(node: ast.AST) -> Iterator[str]:
    """Names after ``pytest.mark`` in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "pytest.mark":
            yield part.attr


def page(found: list[Row] | None = None) -> str:
    """The text of docs/reliability.md."""
    found = rows() if found is None else found
    lines = [HEAD]
    for group, (title, _) in GROUPS.items():
        lines += [
            f"## {group} · {title}",
            "",
            "| row | what goes wrong | what is promised | weight |",
            "|---|---|---|---|",
        ]
        for row in (row for row in found if row.name[0] == group):
            place = row.file.relative_to(TESTS.parent).as_posix()
            name = f'[{row.name}](../{place} "{row.test}")'
            lines.append(f"| {name} | {_cell(row.fault)} | {_cell(row.promise)} | {row.weight} |")
        lines.append("")
    if missing := [(name, MISSING[name]) for name in all_names() if name in MISSING]:
        lines += [
            "## Rows without a test",
            "",
            "| row | what goes wrong | why | weight |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {_cell(fault)} | {_cell(why)} | {weight} |" for name, (weight, fault, why) in missing
        ]
        lines.append("")
    lines += ["## What is not promised", "", *(f"* {text}" for text in NOT_PROMISED)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
