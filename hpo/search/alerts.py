"""Telling people: CONVERGENCE_ALERT.txt and notifications.

Owns the alert file (written whole, withdrawn when it no longer holds) and sending through apprise.  Nothing here
may end a trial or print a secret: a notification that fails is one warning line, after five seconds at most.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hpo.study import ConvergenceVerdict, StudyFolder, TrialRow, read_json
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.text import clean_text

NOTIFY_SECONDS = 5.0
NOTIFY_VARIABLE = "HPO_NOTIFY"
MEANING = {
    "converged": "more trials are unlikely to help: proposals have drawn together, and the best are alike",
    "plateau": "no gain above the noise lately, and proposals have drawn together",
    "no_signal": "the scoring noise hides the differences between trials: add prompts or seeds",
}
ALERTED = ("converged", "plateau")  # levels that write the file


def alert_text(
    folder: StudyFolder,
    verdict: ConvergenceVerdict,
    top: Sequence[TrialRow],
    best: TrialRow,
    *,
    withdrawn: str = "",
) -> str:
    """The file's text.  ``grep "Best trial:"`` gives the line that scripts read, and that ``hpo status`` shows."""
    state = "withdrawn" if withdrawn else verdict.level
    meaning = "" if verdict.level == "none" else f" – {MEANING[verdict.level]}"
    lines = [
        f"Best trial: Trial {best.number}  score {best.value:.4f} ± {best.se:.4f}  ({state})",
        f"status: withdrawn – {withdrawn}, the search goes on" if withdrawn else "status: active",
        f"level: {verdict.level}{meaning}",
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
        f"images: hpo dashboard {folder.words}",
        f"next: hpo {'status' if withdrawn else 'confirm'} {folder.words}",
    ]
    return "\n".join(lines) + "\n"


def update_alert(
    folder: StudyFolder, verdict: ConvergenceVerdict | None, rows: Mapping[int, TrialRow]
) -> str | None:
    """Bring CONVERGENCE_ALERT.txt in line with the verdict; the new level to tell people about, or None.

    An alert is told once per level.  It is withdrawn by a new best, and when the figures no longer say so;
    the file then says why.  Once there, the file follows the figures, active or withdrawn.
    """
    before = read_json(folder.convergence) or {}
    told, best_then = before.get("level"), before.get("best")
    if verdict is None:
        return None
    why, status = "", "active"
    if verdict.level not in ALERTED:
        if "status" not in before:
            return None
        status, why = "withdrawn", str(before.get("why", ""))
        if before["status"] == "active":
            why = f"the figures no longer say {told}"
            if verdict.best != best_then:
                why = f"Trial {verdict.best} is better than Trial {best_then}"
    best, top = rows[verdict.best], [rows[n] for n in verdict.top[:5]]
    write_atomic(folder.alert, alert_text(folder, verdict, top, best, withdrawn=why))
    values = {**verdict.as_dict(), "status": status, "why": why}
    if status == "withdrawn":
        values["level"] = "none"
    write_atomic(folder.convergence, json.dumps(values, indent=1))
    if status == "withdrawn":
        return "withdrawn" if before["status"] == "active" else None
    return verdict.level if (told, best_then) != (verdict.level, verdict.best) else None


def notification_urls(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """apprise URLs of ``--notify``, else of HPO_NOTIFY (separated by spaces: a URL may hold commas)."""
    if given:
        return tuple(given)
    return tuple(environment.get(NOTIFY_VARIABLE, "").split())


def check_services(urls: Sequence[str]) -> None:
    """Refuse a URL that apprise cannot read, now and not when there is news.  Never shows it: it is a secret."""
    for number, url in enumerate(urls, 1):
        if not _service(url):
            raise ConfigError(
                f"--notify (or {NOTIFY_VARIABLE}): address {number} of {len(urls)} ({_scheme(url)}) is none "
                "that apprise knows",
                "write it as https://github.com/caronc/apprise shows, for example ntfy://TOPIC",
            )


def _scheme(url: str) -> str:
    """What of a URL may be shown: which service it is."""
    scheme, separator, _ = url.partition("://")
    return clean_text(scheme)[:20] if separator else "no scheme://"


def _service(url: str) -> Any:
    """apprise with one service, or None.  apprise logs URLs, and with them secrets: its log is off."""
    try:
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        service = apprise.Apprise()
        return service if service.add(url) else None
    except Exception:  # whatever a plugin raises
        return None


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
    failed = sorted({_scheme(url) for url in urls if not outcomes.get(url)})
    if failed:
        warn(f"a notification could not be sent ({', '.join(failed)}); the search goes on")


def _send(url: str, title: str, body: str) -> bool:
    """One service."""
    service = _service(url)
    try:
        return service is not None and bool(service.notify(title=title, body=body))
    except Exception:  # a side channel never ends a trial, whatever a plugin raises
        return False
