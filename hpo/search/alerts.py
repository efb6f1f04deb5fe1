"""Convergence alerts: CONVERGENCE_ALERT.txt and notifications.

Owns the alert file (written atomically, withdrawn when the conditions no longer hold) and sending through
Apprise. Nothing here may end a trial or print a secret: a failed notification causes one warning line, after
at most five seconds.
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
    "converged": "more trials are unlikely to help: suggestions focus on one region, the best trials are equivalent",
    "plateau": "no recent gain above the noise, and suggestions focus on one region",
    "no_signal": "scoring noise hides the differences between trials: add prompts or seeds",
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
    """The text of the alert file.  ``grep "Best trial:"`` finds the line for scripts; ``hpo status`` shows it."""
    state = "withdrawn" if withdrawn else verdict.level
    meaning = "" if verdict.level == "none" else f" – {MEANING[verdict.level]}"
    lines = [
        f"Best trial: Trial {best.number}  score {best.value:.4f} ± {best.se:.4f}  ({state})",
        f"status: withdrawn – {withdrawn}, the search continues" if withdrawn else "status: active",
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
        "The best search score is optimistic, because it was selected: confirm it with new seeds.",
        f"files: {folder.trial(best.number).root}",
        f"images: hpo dashboard {folder.words}",
        f"next: hpo {'status' if withdrawn else 'confirm'} {folder.words}",
    ]
    return "\n".join(lines) + "\n"


def update_alert(
    folder: StudyFolder, verdict: ConvergenceVerdict | None, rows: Mapping[int, TrialRow]
) -> str | None:
    """Update CONVERGENCE_ALERT.txt to the verdict.  Returns the new level to notify about, or None.

    Each level is notified once.  The alert is withdrawn if there is a new best trial or the conditions no longer
    hold; the file then gives the reason.  Once the file exists, it is kept up to date, active or withdrawn.
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
            why = f"the conditions for {told} no longer hold"
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
    """Apprise URLs from ``--notify``, else from HPO_NOTIFY (separated by spaces: a URL may contain commas)."""
    if given:
        return tuple(given)
    return tuple(environment.get(NOTIFY_VARIABLE, "").split())


def check_services(urls: Sequence[str]) -> None:
    """Raise ConfigError for a URL that Apprise cannot parse, before the search starts.  Never prints the URL:
    it is a secret."""
    for number, url in enumerate(urls, 1):
        if not _service(url):
            raise ConfigError(
                f"--notify (or {NOTIFY_VARIABLE}): URL {number} of {len(urls)} ({_scheme(url)}) is not an Apprise URL",
                "use a format from https://github.com/caronc/apprise, for example ntfy://TOPIC",
            )


def _scheme(url: str) -> str:
    """The part of a URL that may be printed: the service."""
    scheme, separator, _ = url.partition("://")
    return clean_text(scheme)[:20] if separator else "no scheme://"


def _service(url: str) -> Any:
    """Apprise with one service, or None.  Apprise logs URLs, which contain secrets, so its log is turned off."""
    try:
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        service = apprise.Apprise()
        return service if service.add(url) else None
    except Exception:  # a plugin may raise anything
        return None


def notify(urls: Sequence[str], title: str, body: str, warn: Callable[[str], None]) -> None:
    """Send to all URLs in parallel, for at most five seconds.  Never raises; a warning names only the service."""
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
        warn(f"warning: could not send a notification ({', '.join(failed)}); the search continues")


def _send(url: str, title: str, body: str) -> bool:
    """Send to one service."""
    service = _service(url)
    try:
        return service is not None and bool(service.notify(title=title, body=body))
    except Exception:  # a plugin may raise anything, and a notification must not end a trial
        return False
