"""Notifications: what the long commands send to the Apprise URLs of ``--notify``.

Owns the events, the URLs and sending.  One mechanism for all commands: the command line sets ``NOTIFIER``,
``hpo.study.work`` tells how a step ended, and the search tells of convergence and new best trials.  Nothing here may
end a command or print or store a URL, because URLs contain passwords: a failed notification causes one warning line,
after at most five seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError
from trainer.text import clean_text

NOTIFY_SECONDS = 5.0
NOTIFY_VARIABLE = "HPO_NOTIFY"
FINISHED, FAILED, INTERRUPTED, CONVERGED, BEST = "finished", "failed", "interrupted", "converged", "best"
EVENTS = (FINISHED, FAILED, INTERRUPTED, CONVERGED, BEST)
USUAL = (FINISHED, FAILED, INTERRUPTED, CONVERGED)  # a new best trial can be news every few minutes


@dataclass(frozen=True)
class Notifier:
    """Where to send, and which events."""

    urls: tuple[str, ...]
    events: tuple[str, ...] = USUAL


NOTIFIER: ContextVar[Notifier | None] = ContextVar("NOTIFIER", default=None)


@contextlib.contextmanager
def notifying(urls: Sequence[str], events: Sequence[str] = USUAL) -> Iterator[None]:
    """Send the events of the block to these URLs, else to those of HPO_NOTIFY.

    Raises ConfigError for a URL that Apprise cannot parse.
    """
    found = notification_urls(urls)
    check_services(found)
    token = NOTIFIER.set(Notifier(found, tuple(events)) if found else None)
    try:
        yield
    finally:
        NOTIFIER.reset(token)


def tell(event: str, title: str, body: str, warn: Callable[[str], None] | None = None) -> None:
    """Send one event, if it is wanted.  ``warn`` prints a warning; without it, to the standard error."""
    notifier = NOTIFIER.get()
    if notifier is not None and event in notifier.events:
        notify(notifier.urls, title, body, warn or _warn)


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def chosen_events(text: str) -> tuple[str, ...]:
    """The events of ``--notify-on``: names separated by commas, or "all".  Raises ConfigError for another name."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("all",):
        return EVENTS
    for name in names:
        if name not in EVENTS:
            raise ConfigError(
                f"--notify-on: unknown event {clean_text(name)}", f"use {', '.join(EVENTS)}, or all"
            )
    return names


def notification_urls(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Apprise URLs from ``--notify``, else from HPO_NOTIFY (separated by spaces: a URL may contain commas)."""
    if given:
        return tuple(given)
    return tuple(environment.get(NOTIFY_VARIABLE, "").split())


def check_services(urls: Sequence[str]) -> None:
    """Raise ConfigError for a URL that Apprise cannot parse, before anything starts.  Never prints the URL:
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
        warn(f"warning: could not send a notification ({', '.join(failed)}); the command continues")


def _send(url: str, title: str, body: str) -> bool:
    """Send to one service."""
    service = _service(url)
    try:
        return service is not None and bool(service.notify(title=title, body=body))
    except Exception:  # a plugin may raise anything, and a notification must not end a command
        return False
