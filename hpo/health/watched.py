"""What the files of a study or run say about the work that goes on there, for ``hpo watch``.

Only files are read: work.jsonl (which command), health.jsonl (process, trial, figures, alerts), train.jsonl (the last
steps), result.json of each trial, and one number of the study's database, which is opened read-only.  So it works from
another terminal, or another machine that sees the folder, and whoever writes may be killed in the middle of a line.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from hpo.health.log import ALERT, FIGURES, NAME, health_rows, last_rows
from hpo.study import RUNNING, TOTAL, Step, StudyFolder, open_steps, read_json, steps

LIVING_SECONDS = 60.0  # figures that are younger come from a process that lives
STEP_ROWS = 20  # the rate is the median of so many steps
STEP_BYTES = 20_000  # of the end of train.jsonl
ALERTS = 5
_SKIPPED = ("samples", "sample", "checkpoints", "cache", "artifacts", "data", ".locks")


@dataclass(frozen=True)
class Working:
    """One process, by its last row in health.jsonl and by the step log of what it trains.  ``rate``: steps or images
    per second.  ``left``: seconds to the end of the whole command if that is known, else of this part."""

    pid: int | None
    trial: int | None
    phase: str
    done: int | None
    total: int | None
    rate: float | None
    loss: float | None
    left: float | None
    paused: str
    age: float  # seconds since the row was written
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """The state of the command that was started last.  ``root``: the folder that records it; ``place``: the folder in
    which it works.  ``state``: running, finished, interrupted, failed; killed if its process is gone.  ``next``: the
    command that goes on, empty if there is nothing left to do."""

    name: str
    root: Path
    place: Path
    stage: str
    state: str
    began: datetime | None
    ended: datetime | None
    complete: int
    other: Mapping[str, int]
    total: int | None
    best: tuple[int, float] | None
    working: Sequence[Working]
    alerts: Sequence[Mapping[str, Any]]
    next: str

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING


def newest(roots: Sequence[Path]) -> Path | None:
    """The folder whose command runs, else the one that was worked in last."""
    found = []
    for root in roots:
        if done := steps(root):
            last = max(done, key=lambda step: (step.state == RUNNING, step.when))
            found.append((last.state == RUNNING, last.when, root))
    return max(found, key=lambda one: one[:2])[2] if found else None


def watched(root: Path, resume: str, beside: Sequence[Path] = (), now: datetime | None = None) -> Watched:
    """Read the state.  ``resume``: the command that goes on, if there is something left.  ``beside``: folders that
    belong to the same study (its confirmation, its target trials)."""
    now = now or datetime.now(UTC)
    step = _last(root)
    place = _place([root, *beside])
    rows = health_rows(place)
    working = _working(place, rows, now)
    living = [one for one in working if one.age < LIVING_SECONDS]
    state = _state(step, living)
    results = [found for folder in StudyFolder(place).trial_folders() if (found := read_json(folder.result))]
    states = [str(result.get("state")) for result in results]
    return Watched(
        name=StudyFolder(root).name,
        root=root,
        place=place,
        stage=step.step if step else "",
        state=state,
        began=_time(step.started_utc) if step else None,
        ended=_time(step.ended_utc) if step else None,
        complete=sum(one in ("complete", "infeasible", "pruned") for one in states),
        other={one: states.count(one) for one in ("infeasible", "pruned", "failed") if one in states},
        total=_total(StudyFolder(place)),
        best=_best(results),
        working=living if state == RUNNING else working[-1:],
        alerts=[row for row in rows if row.get("event") == ALERT][-ALERTS:],
        next=resume if state != RUNNING and any(left.words for left in open_steps(root)) else "",
    )


def _last(root: Path) -> Step | None:
    done = steps(root)
    return max(done, key=lambda step: (step.state == RUNNING, step.when)) if done else None


def _state(step: Step | None, living: Sequence[Working]) -> str:
    if step is None:
        return RUNNING if living else "unknown"
    if step.ended_utc or step.state == RUNNING:
        return step.state
    return RUNNING if living else "killed"  # a lock of another machine cannot be seen from here


def _place(roots: Sequence[Path]) -> Path:
    """The folder whose health.jsonl was written last; the first one without any."""
    found = []
    for root in roots:
        for folder, inside, names in os.walk(root):
            inside[:] = [name for name in inside if name not in _SKIPPED]
            if NAME in names:
                with contextlib.suppress(OSError):
                    found.append((os.stat(os.path.join(folder, NAME)).st_mtime, folder))
    return Path(max(found)[1]) if found else roots[0]


def _working(place: Path, rows: Sequence[Mapping[str, Any]], now: datetime) -> list[Working]:
    """The last row of each process, the newest last."""
    last: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        if row.get("event") == FIGURES:
            last.pop(row.get("pid"), None)
            last[row.get("pid")] = row
    return [_one(place, row, now) for row in last.values()]


def _one(place: Path, row: Mapping[str, Any], now: datetime) -> Working:
    written = _time(str(row.get("time_utc", "")))
    age = max(0.0, (now - written).total_seconds()) if written else float("inf")
    trial = _whole(row.get("trial"))
    folder = place if trial is None else StudyFolder(place).trial(trial).root
    log = [line for line in last_rows(folder / "train.jsonl", STEP_BYTES) if line.get("event") == "step"]
    done, total, rate = _whole(row.get("done")), _whole(row.get("total")), _number(row.get("rate"))
    phase, loss = str(row.get("phase", "")), None
    if log and phase in ("", "training"):
        seconds = [value for line in log[-STEP_ROWS:] if (value := _number(line.get("seconds")))]
        losses = [value for line in log[-STEP_ROWS:] if (value := _number(line.get("loss"))) is not None]
        phase, done, total = "training", _whole(log[-1].get("step")), _whole(log[-1].get("total_steps"))
        rate, loss = 1 / median(seconds) if seconds else rate, sum(losses) / len(losses) if losses else None
    left = _number(row.get("left_of_all"))
    if left is None:
        left = _number(row.get("left"))
    if left is not None:
        left = max(0.0, left - age)
    paused = str(row.get("paused", ""))
    return Working(_whole(row.get("pid")), trial, phase, done, total, rate, loss, left, paused, age, row)


def _total(folder: StudyFolder) -> int | None:
    """``--trials``, from the study's database.  None without one, or if it is on a server."""
    if not folder.database.is_file():
        return None
    with (
        contextlib.suppress(sqlite3.Error, ValueError),
        contextlib.closing(
            sqlite3.connect(f"{folder.database.resolve().as_uri()}?mode=ro", uri=True, timeout=1)
        ) as connection,
    ):
        found = connection.execute(
            "SELECT value_json FROM study_user_attributes WHERE key = ?", (TOTAL,)
        ).fetchone()
        return int(found[0]) if found else None
    return None


def _best(results: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    scored = [
        (value, number)
        for result in results
        if result.get("state") == "complete"
        and (value := _number(result.get("value"))) is not None
        and (number := _whole(result.get("number"))) is not None
    ]
    return (max(scored)[1], max(scored)[0]) if scored else None


def _time(text: str) -> datetime | None:
    with contextlib.suppress(ValueError):
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
