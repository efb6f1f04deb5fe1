"""The screen and the JSON of ``hpo watch``.  Owns layout and wording; what is shown: ``hpo.health.watched``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpo.health import figure_words, fitted
from hpo.terminal.text import clock, left, pace
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.health import Watched, Working

LABEL = 9  # columns


def watch_screen(seen: Watched, width: int = 80, now: datetime | None = None) -> RenderableType:
    """One screen, at most ``width`` columns wide."""
    now = now or datetime.now(UTC)
    rows: list[tuple[str, Text]] = []
    if trials := _trials(seen):
        rows.append(("trials", Text(trials)))
    room = width - LABEL - 1
    for number, work in enumerate(seen.working):
        rows.append(("now" if seen.is_running else "last", Text(_now(work, room))))
        if work.paused and seen.is_running:
            rows.append(("", Text(f"paused: {clean_text(work.paused)}"[:room], style="bold")))
        if seen.is_running and work.left is not None:
            rows.append(("time", Text(left(work.left))))
        if number == len(seen.working) - 1:
            health = fitted(figure_words(work.figures, everything=True), room)
            if health:
                rows.append(("health", Text(health)))
    for place, alert in enumerate(reversed(seen.alerts)):
        style = "bold" if alert.get("level") == "danger" else ""
        rows.append(("alerts" if not place else "", Text(_alert(alert), style=style)))
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=LABEL, max_width=LABEL, style="dim")
    table.add_column(overflow="fold", max_width=room)
    for label, text in rows:
        table.add_row(label, text)
    foot = [Text("Ctrl-C ends this view; the run goes on", style="dim")] if seen.is_running else []
    if seen.next:
        foot = [Text(f"next: {clean_text(seen.next)}")]
    return Group(_head(seen, now, width), table, *foot)


def _head(seen: Watched, now: datetime, width: int) -> Text:
    stage = clean_text(seen.stage) or "nothing was recorded"
    if seen.is_running:
        state = f"running for {clock((now - seen.began).total_seconds())}" if seen.began else "running"
    else:
        at = seen.ended or _last_sign(seen, now)
        state = f"{seen.state}{f', {at.astimezone():%-d %b %H:%M}' if at else ''}"
    head = Text.assemble((clean_text(seen.name), "bold"), f"  {stage}, {clean_text(state)}")
    head.truncate(width, overflow="ellipsis")
    return head


def _last_sign(seen: Watched, now: datetime) -> datetime | None:
    ages = [work.age for work in seen.working if work.age != float("inf")]
    return datetime.fromtimestamp(now.timestamp() - min(ages), UTC) if ages else seen.began


def _trials(seen: Watched) -> str:
    if not seen.complete and seen.total is None:
        return ""
    of = f"/{max(seen.total, seen.complete)}" if seen.total is not None else ""
    parts = [f"{seen.complete}{of} done", *(f"{count} {what}" for what, count in seen.other.items())]
    if seen.best:
        parts.append(f"best: trial {seen.best[0]}, {seen.best[1]:.4f}")
    return ", ".join(parts)


def _now(work: Working, room: int) -> str:
    images = work.phase == "images"
    parts = [f"trial {work.trial}"] if work.trial is not None else []
    if work.done is None or not work.total:
        parts.append("preparing …")
    elif images:
        parts.append(f"{work.done}/{work.total} images")
    else:
        parts.append(f"step {work.done}/{work.total}")
    if work.rate:
        parts.append(pace(work.rate).replace("step", "image") if images else pace(work.rate))
    if work.loss is not None and not images:
        parts.append(f"loss {work.loss:.4f}")
    if work.age >= 30 and work.age != float("inf"):
        parts.append(f"seen {clock(work.age)} ago")
    return fitted(parts, room)


def _alert(alert: Any) -> str:
    at = ""
    with contextlib.suppress(ValueError):
        at = f"{datetime.fromisoformat(str(alert.get('time_utc'))).astimezone():%H:%M} "
    return f"{at}{clean_text(str(alert.get('text', '')))}"[:300]


def watch_json(seen: Watched, now: datetime | None = None) -> dict[str, Any]:
    """The state as one object."""
    now = now or datetime.now(UTC)
    return {
        "name": seen.name,
        "folder": str(seen.place),
        "stage": seen.stage,
        "state": seen.state,
        "running": seen.is_running,
        "started": seen.began.isoformat() if seen.began else None,
        "ended": seen.ended.isoformat() if seen.ended else None,
        "trials": {"complete": seen.complete, "total": seen.total, **seen.other},
        "best": {"trial": seen.best[0], "score": seen.best[1]} if seen.best else None,
        "processes": [_process(work) for work in seen.working],
        "alerts": _without_process(seen.alerts),
        "next": seen.next or None,
    }


def _process(work: Working) -> dict[str, Any]:
    values = asdict(work)
    figures = dict(values.pop("figures"))
    shown = {
        name: value
        for name, value in figures.items()
        if name not in values and name not in ("event", "time_utc", "stage", "left_of_all")
    }
    age = values.pop("age")
    return {**values, "age": None if age == float("inf") else round(age, 1), "health": shown}


def _without_process(alerts: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in alert.items() if name not in ("event", "pid")} for alert in alerts
    ]
