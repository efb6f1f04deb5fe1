"""Notifications: what the long commands send to the Apprise URLs of ``--notify``.

Owns the events and who gets them.  One mechanism for all commands: the command line sets ``NOTIFIER``,
``hpo.study.work`` tells how a step ended, the search tells of convergence and new best trials, and the guard of a run
(``hpo.health``) what goes wrong.  Nothing here may end a command or print or store a URL, because URLs contain
passwords.  Does not own the sending (``hpo.study.sending``) or quiet hours (``hpo.study.quiet``).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.night import notifies
from trainer.errors import ConfigError
from trainer.text import clean_text

if TYPE_CHECKING:  # every command imports this module, and few send anything
    from hpo.study.quiet import QuietHours
    from hpo.study.sending import Sender

NOTIFY_VARIABLE, QUIET_VARIABLE = "HPO_NOTIFY", "HPO_QUIET_HOURS"
FINISHED, FAILED, INTERRUPTED, CONVERGED, BEST = "finished", "failed", "interrupted", "converged", "best"
RESTARTED, HUNG, ANOMALY, DISK = "restarted", "hung", "anomaly", "disk"
EVENTS = (FINISHED, FAILED, INTERRUPTED, CONVERGED, RESTARTED, HUNG, ANOMALY, DISK, BEST)
USUAL = tuple(event for event in EVENTS if event != BEST)  # a new best trial can be news every few minutes


@dataclass(frozen=True)
class Notifier:
    """Where to send, and which events."""

    sender: Sender
    events: tuple[str, ...] = USUAL


NOTIFIER: ContextVar[Notifier | None] = ContextVar("NOTIFIER", default=None)


@contextlib.contextmanager
def notifying(urls: Sequence[str], events: Sequence[str] = USUAL, quiet: str = "") -> Iterator[None]:
    """Send the events of the block to these URLs, else to those of HPO_NOTIFY.

    ``quiet``: hours in which messages wait, as ``23:00-07:00``; else HPO_QUIET_HOURS.  At the end of the block, what is
    not sent is waited for, at most five seconds.  Raises ConfigError for a URL that Apprise cannot parse.
    """
    found, hours = notification_urls(urls), quiet_hours(quiet)
    check_services(found)
    if not found:
        token = NOTIFIER.set(None)
        try:
            yield
        finally:
            NOTIFIER.reset(token)
        return
    from hpo.study.sending import Sender

    notifies({"urls": found, "events": tuple(events), "quiet": quiet})
    sender = Sender(found, hours)
    token = NOTIFIER.set(Notifier(sender, tuple(events)))
    try:
        yield
    finally:
        NOTIFIER.reset(token)
        sender.close(_warn)


def send_beside(wanted: Mapping[str, Any], event: str, title: str, body: str) -> None:
    """Send one event from a process of its own: for the supervisor, which loads no library and starts no thread.

    ``wanted``: {"urls": …, "events": …, "quiet": …}, as ``notifying`` has given it to ``hpo.night.notifies``.
    """
    if event not in wanted["events"]:
        return
    from datetime import datetime

    from hpo.study.sending import hand_over

    hours = None if event == FAILED else quiet_hours(str(wanted["quiet"]))
    left = 0.0 if hours is None else hours.seconds_left(datetime.now().astimezone())
    hand_over({"seconds": left, "urls": list(wanted["urls"]), "title": title, "body": body})


def tell(
    event: str,
    title: str,
    body: str,
    warn: Callable[[str], None] | None = None,
    *,
    ends: bool = True,
) -> None:
    """Send one event, if it is wanted.  Takes no time.  ``warn`` prints a warning, from another thread; without it, to
    the standard error.  ``ends``: a failure is that of the whole command, which is sent in quiet hours, too."""
    notifier = NOTIFIER.get()
    if notifier is not None and event in notifier.events:
        from hpo.study.sending import Message

        notifier.sender.put(Message(title, body, warn or _warn), at_once=event == FAILED and ends)


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


def joined_urls(urls: Sequence[str]) -> str:
    """A value of HPO_NOTIFY that ``notification_urls`` splits into these URLs.  A space within one becomes %20, which
    Apprise reads as a space."""
    from urllib.parse import quote

    return " ".join("".join(quote(sign) if sign.isspace() else sign for sign in url) for url in urls)


def quiet_hours(given: str, environment: Mapping[str, str] = os.environ) -> QuietHours | None:
    """Of ``--quiet-hours``, else of HPO_QUIET_HOURS.  Raises ConfigError."""
    from hpo.study.quiet import read_quiet_hours

    return read_quiet_hours(given or environment.get(QUIET_VARIABLE, ""))


def check_services(urls: Sequence[str]) -> None:
    """Raise ConfigError for a URL that Apprise cannot parse, before anything starts.  Never prints the URL:
    it is a secret."""
    from hpo.study.sending import scheme, service

    for number, url in enumerate(urls, 1):
        if not service(url):
            raise ConfigError(
                f"--notify (or {NOTIFY_VARIABLE}): URL {number} of {len(urls)} ({scheme(url)}) is not an Apprise URL",
                "use a format from https://github.com/caronc/apprise, for example ntfy://TOPIC",
            )
