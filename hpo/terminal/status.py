"""``hpo status`` in its three forms: a table that fits the terminal, tab-separated values for a pipe, and JSON.

Owns layout and wording.  Does not own the rows; see ``hpo.study.table``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hpo.study import Holder
from hpo.terminal.text import clock, figures, short
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import Row, StudyTable

GAP = 2  # columns between two cells
FOLD = 12  # width from which names and words are broken at their underscores
_COMMAND, _NO_BREAK = re.compile(r"(^ *|: )(hpo [a-z].*)$"), "\x1f"  # textwrap does not break at the latter
DIM = ("infeasible", "pruned", "failed", "duplicate")


@dataclass(frozen=True)
class _Column:
    """One column of the terminal's table: the lines of its head, and a cell for each trial."""

    head: tuple[str, ...]
    cells: tuple[str, ...]
    right: bool = True

    @property
    def width(self) -> int:
        lines = [line for cell in self.cells for line in cell.splitlines()]
        return max(map(len, (*self.head, *lines)), default=0)


def head_lines(table: StudyTable) -> list[str]:
    """What the study is and how far it is; what is equal in all trials."""
    now, noun = table.now, "runs" if table.kind.word == "confirmation" else "trials"
    parts = [f"{now.complete}/{max(now.total, now.complete)} {noun}"]
    counts = {
        "infeasible": now.infeasible,
        "pruned": now.pruned,
        "failed": now.failed,
        "duplicates": now.duplicates,
    }
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    running = sum(row.process is not None for row in table.rows)
    parts += [f"{running} running"] if running else []
    lines = [f"study {clean_text(table.name)}: {clean_text(table.kind.title)}; {', '.join(parts)}"]
    if table.constants:
        lines.append(f"same in all {noun}: {_words(table.constants)}")
    return lines


def best_lines(table: StudyTable) -> list[str]:
    """The best trial of a search or of probes, and the baseline; or that there is no result yet."""
    now, kind = table.now, table.kind.word
    if not any(row.score is not None for row in table.rows):
        return [f"no {'run' if kind == 'confirmation' else 'trial'} has a score yet"]
    if kind == "confirmation" or now.best is None:
        return []
    row = next(row for row in table.rows if row.number == now.best[0])
    what, remark = (
        ("best of the search", " (optimistic: it was selected)")
        if kind == "search"
        else ("best target trial", "")
    )
    lines = [f"{what}: trial {row.number}, {figures(now.best)}{remark}", f"  {_words(row.settings)}"]
    if now.baseline and now.baseline[0] != now.best[0]:
        lines.append(f"trial {now.baseline[0]}, {table.kind.baseline}: {figures(now.baseline)}")
    elif now.baseline:
        lines.append(f"trial {now.baseline[0]} has {table.kind.baseline}")
    elif now.baseline_trouble:
        lines.append(f"{table.kind.baseline}: {clean_text(now.baseline_trouble).replace('_', ' ')}")
    return lines


def reason_lines(table: StudyTable) -> list[str]:
    """Why trials have no score, one line for each reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in table.rows:
        if row.state in DIM:
            reason = "same settings as an earlier trial" if row.state == "duplicate" else row.reason
            found.setdefault((row.state, clean_text(reason).replace("_", " ")), []).append(row.number)
    return [
        f"{state}{f' ({reason})' if reason else ''}: {_trials(numbers)}"
        for (state, reason), numbers in found.items()
    ]


def _trials(numbers: Sequence[int]) -> str:
    return f"trial{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def _words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{clean_text(str(name))}={short(value)}" for name, value in settings.items())


def wrapped(text: str, width: int = 79) -> str:
    """Text in lines of this width, broken between words; settings, and a command at the end, stay whole, so that
    they can be copied."""
    indent = " " * (len(text) - len(text.lstrip())) or "  "
    held = _COMMAND.sub(lambda found: found[1] + found[2].replace(" ", _NO_BREAK), text)
    lines = textwrap.fill(
        held, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace(_NO_BREAK, " ")


# Terminal


def status_table(table: StudyTable, width: int = 80) -> tuple[Table, list[str]]:
    """The table for a terminal of this width, and lines about what was left out.

    Settings that matter least are left out until the rest fits.  * marks the best score, + the Pareto front of a
    study with two objectives.
    """
    fixed = [
        _Column(("trial",), tuple(_number(table, row) for row in table.rows), right=False),
        _Column(("score",), tuple(map(_result, table.rows)), right=False),
        *(
            _Column((part.removeprefix("prompt_"),), tuple(_part(row, part) for row in table.rows))
            for part in table.parts
        ),
        _Column(("time",), tuple("" if r.seconds is None else clock(r.seconds) for r in table.rows)),
    ]
    settings = {name: _setting(table, name) for name in table.columns}
    kept = list(settings)

    def needed() -> int:
        columns = [*fixed, *(settings[name] for name in kept)]
        return sum(column.width for column in columns) + GAP * (len(columns) - 1)

    dropped: list[str] = []
    while kept and needed() > width:
        least = min(reversed(kept), key=lambda name: table.weights.get(name, 0.0))
        kept.remove(least)
        dropped.append(least)
    shown = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_edge=False)
    columns = [*fixed, *(settings[name] for name in kept)]
    for column in columns:
        shown.add_column(
            Text("\n".join(column.head)), justify="right" if column.right else "left", no_wrap=True
        )
    for place, row in enumerate(table.rows):
        best = row.number == _best(table)
        style = "dim" if row.state in DIM else "bold" if best else ""
        shown.add_row(*(Text(column.cells[place]) for column in columns), style=style)
    if not dropped:
        return shown, []
    names = ", ".join(map(clean_text, reversed(dropped)))
    return shown, [
        f"not shown, because they matter least ({table.weighed_by}): {names}. Everything: hpo status "
        f"{clean_text(table.words)} | cat"
    ]


def _number(table: StudyTable, row: Row) -> str:
    mark = "*" if row.number == _best(table) else ""
    return f"{row.number}{mark}{'+' if row.number in table.now.front else ''}"


def _best(table: StudyTable) -> int | None:
    """The trial with the best score; None in a confirmation, whose runs are repeats."""
    return table.now.best[0] if table.now.best and table.kind.word != "confirmation" else None


def _result(row: Row) -> str:
    if row.score is not None:
        return f"{row.score:.3f} ± {row.se or 0.0:.3f}"
    if not row.process:
        return clean_text(row.state)
    return f"{row.state} ({clean_text(Holder(row.process, row.host).words)})"


def _part(row: Row, part: str) -> str:
    return f"{row.parts[part]:.3f}" if row.score is not None and part in row.parts else ""


def _setting(table: StudyTable, name: str) -> _Column:
    values = [row.settings.get(name) for row in table.rows]
    cells = tuple("" if value is None else "\n".join(_folded(short(value), FOLD)) for value in values)
    number = all(value is None or isinstance(value, (int, float)) for value in values)
    widest = max((len(line) for cell in cells for line in cell.splitlines()), default=0)
    return _Column(tuple(_folded(clean_text(name), max(widest, 8))), cells, right=number)


def _folded(name: str, width: int) -> list[str]:
    """A name in lines of at most this width, if its words between underscores allow it."""
    lines: list[str] = []
    for place, word in enumerate(name.split("_")):
        part = f"_{word}" if place else word
        if lines and len(lines[-1]) + len(part) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return lines


# Pipe and JSON


def status_tsv(table: StudyTable) -> list[str]:
    """Lines of tab-separated values, first the names: every trial and every setting, with all digits."""
    names = (
        "trial",
        "state",
        "reason",
        "score",
        "se",
        "objective",
        "prompt_following",
        "likeness",
        "seconds",
    )
    lines = ["\t".join((*names, *map(_cell, (*table.columns, *table.constants))))]
    for row in table.rows:
        values: Iterable[Any] = (
            *(row.number, row.state, row.reason, row.score, row.se, row.objective),
            *(row.parts.get("prompt_following"), row.parts.get("likeness"), row.seconds),
            *(row.settings.get(name) for name in table.columns),
            *(table.constants[name] for name in table.constants),
        )
        lines.append("\t".join(map(_cell, values)))
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(clean_text(str(value)).split())


def status_json(table: StudyTable, confirmed: Mapping[str, Any] | None) -> dict[str, Any]:
    """The whole status as an object."""
    now = table.now

    def known(what: tuple[int, float, float] | None) -> dict[str, Any] | None:
        return {"trial": what[0], "score": what[1], "se": what[2]} if what else None

    found = confirmed or {}
    names = ("how", "winner", "score", "interval", "beats_trial0")
    return {
        "study": table.name,
        "kind": table.kind.word,
        "of": table.kind.of or None,
        "base": table.kind.base or None,
        "complete": now.complete,
        "total": now.total,
        "infeasible": now.infeasible,
        "pruned": now.pruned,
        "failed": now.failed,
        "duplicates": now.duplicates,
        "confirmed": {name: found.get(name) for name in names} if found else None,
        "best": known(now.best),
        "baseline": known(now.baseline),
        "baseline_is": table.kind.baseline,
        "front": list(now.front),
        "constants": dict(table.constants),
        "settings": list(table.columns),
        "weights": {name: table.weights[name] for name in table.columns},
        "weighed_by": table.weighed_by,
        "trials": [
            {
                "trial": row.number,
                "state": row.state,
                "reason": row.reason or None,
                "message": row.message or None,
                "baseline": row.is_baseline,
                "process": row.process,
                **({"host": row.host} if row.host else {}),
                "score": row.score,
                "se": row.se,
                "objective": row.objective,
                **row.parts,
                "seconds": row.seconds,
                "settings": dict(row.settings),
            }
            for row in table.rows
        ],
    }
