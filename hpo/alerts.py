"""Telling people: CONVERGENCE_ALERT.txt and notifications.

Owns the alert file (written whole, withdrawn when a new best comes) and sending through apprise.  Nothing
here may end a trial or print a secret: a notification that fails is one warning line, after five seconds at
most.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hpo.convergence import Verdict
from hpo.folder import StudyFolder, read_json
from trainer.files import clean_text, write_atomic

NOTIFY_SECONDS = 5.0
NOTIFY_VARIABLE = "HPO_NOTIFY"
MEANING = {
    "converged": "more trials are unlikely to help: proposals have drawn together, and the best are alike",
    "plateau": "no gain above the noise lately, and proposals have drawn together",
    "no_signal": "the scoring noise hides the differences between trials: add prompts or seeds",
}
ALERTED = ("converged", "plateau")  # levels that write the file


@dataclass(frozen=True)
class Row:
    """A trial of the top table."""

    number: int
    value: float
    se: float
    settings: Mapping[str, Any]


def alert_text(folder: StudyFolder, verdict: Verdict, top: Sequence[Row], best: Row, *, status: str) -> str:
    """The file's text.  ``grep "Best trial:"`` gives the line that scripts read."""
    lines = [
        f"Best trial: Trial {best.number}  score {best.value:.4f} ± {best.se:.4f}",
        f"status: {status}",
        f"level: {verdict.level} – {MEANING[verdict.level]}",
        f"study: {folder.name}",
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        "",
        *verdict.lines(),
        "",
        "best trials:",
        *(
            f"  Trial {row.number}  {row.value:.4f} ± {row.se:.4f}  "
            + ", ".join(f"{name}={clean_text(str(value))}" for name, value in row.settings.items())
            for row in top
        ),
        "",
        "The best score of a search is optimistic, because it was selected: confirm it on fresh seeds.",
        f"files: {folder.trial(best.number).root}",
        f"next: hpo dashboard {folder.name}",
    ]
    return "\n".join(lines) + "\n"


def update_alert(folder: StudyFolder, verdict: Verdict | None, rows: Mapping[int, Row]) -> str | None:
    """Bring CONVERGENCE_ALERT.txt in line with the verdict; the new level to tell people about, or None.

    An alert is told once per level.  A new best after it withdraws it: the file then says so.
    """
    before = read_json(folder.convergence) or {}
    told, best_then = before.get("level"), before.get("best")
    if verdict is None:
        return None
    if verdict.level in ALERTED:
        best, top = rows[verdict.best], [rows[n] for n in verdict.top[:5]]
        write_atomic(folder.alert, alert_text(folder, verdict, top, best, status="active"))
        _remember(folder, verdict, "active")
        return verdict.level if (told, best_then) != (verdict.level, verdict.best) else None
    if told in ALERTED and before.get("status") == "active" and verdict.best != best_then:
        best = rows[verdict.best]
        text = f"Best trial: Trial {best.number}  score {best.value:.4f} ± {best.se:.4f}\n"
        text += (
            f"status: withdrawn – Trial {best.number} is better than Trial {best_then}, the search goes on\n"
        )
        write_atomic(folder.alert, text)
        _remember(folder, verdict, "withdrawn")
        return "withdrawn"
    return None


def _remember(folder: StudyFolder, verdict: Verdict, status: str) -> None:
    values = {**verdict.as_dict(), "status": status}
    if status == "withdrawn":
        values["level"] = "none"
    write_atomic(folder.convergence, json.dumps(values, indent=1))


def notification_urls(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """apprise URLs of ``--notify``, else of HPO_NOTIFY (separated by spaces or commas)."""
    if given:
        return tuple(given)
    return tuple(environment.get(NOTIFY_VARIABLE, "").replace(",", " ").split())


def notify(urls: Sequence[str], title: str, body: str, warn: Callable[[str], None]) -> None:
    """Send to every URL at once, five seconds at most.  Never raises; a warning names the service only."""
    outcomes: dict[str, bool] = {}

    def send(url: str) -> None:
        outcomes[url] = _send(url, title, body)

    threads = [threading.Thread(target=send, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + NOTIFY_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    failed = sorted({clean_text(url.partition("://")[0])[:20] for url in urls if not outcomes.get(url)})
    if failed:
        warn(f"a notification could not be sent ({', '.join(failed)}); the search goes on")


def _send(url: str, title: str, body: str) -> bool:
    """One service.  apprise logs URLs, and with them secrets: its log is off."""
    try:
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        service = apprise.Apprise()
        return bool(service.add(url)) and bool(service.notify(title=title, body=body))
    except Exception:  # a side channel never ends a trial, whatever a plugin raises
        return False
