"""Sending messages in the background: no message holds up the work, whatever its service does.

Each URL has a thread of its own, so a service that does not answer delays no other one.  The first message that a
service does not take causes one warning; what it did not take is sent again with the next message.  In quiet hours
messages are kept, and sent as one when they are over; a failure of the whole command is sent at once.  If the command
ends before the quiet hours, a small process of its own keeps the messages until then (``hpo.study.later``).

Nothing here prints or stores a URL, because URLs contain passwords; a warning names the service only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hpo.study.quiet import QuietHours
from trainer.text import clean_text

SECONDS = 5.0  # at the end of a command, for all services together
MOST = 50  # messages that are kept for a service, or in quiet hours; the newest
LINE_CHARACTERS = 500  # of a message that is sent together with others

Warn = Callable[[str], None]
_NONE: Warn = lambda text: None  # noqa: E731


@dataclass(frozen=True)
class Message:
    title: str
    body: str
    warn: Warn = field(default=_NONE, repr=False, compare=False)


def together(messages: Sequence[Message]) -> Message:
    """One message of several: a line for each."""
    if len(messages) == 1:
        return messages[0]
    lines = [f"{message.title}: {message.body}"[:LINE_CHARACTERS] for message in messages]
    return Message(f"{len(messages)} messages: {messages[-1].title}", "\n".join(lines), messages[-1].warn)


class Mailbox:
    """One URL and its thread."""

    def __init__(self, url: str) -> None:
        self.scheme = scheme(url)
        self._url = url
        self._waiting: queue.Queue[Message | None] = queue.Queue()
        self._unsent: list[Message] = []
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        self._waiting.put(message)

    def close(self, until: float) -> None:
        """Wait for what is being sent, until a time (``time.monotonic``)."""
        self._waiting.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))

    @property
    def failed(self) -> bool:
        """Whether a message could not be sent, or is still being sent."""
        return bool(self._unsent) or self._thread.is_alive()

    def fails(self, warn: Warn) -> bool:
        """Whether to warn now: once."""
        if self._warned:
            return False
        self._warned = True
        warn(f"warning: could not send a notification ({self.scheme}); the command continues")
        return True

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            self._unsent = [*self._unsent, message][-MOST:]
            with contextlib.suppress(queue.Empty):
                while True:
                    more = self._waiting.get_nowait()
                    if more is None:
                        self._waiting.put(None)
                        break
                    self._unsent = [*self._unsent, more][-MOST:]
            whole = together(self._unsent)
            if send(self._url, whole.title, whole.body):
                self._unsent = []
            else:
                with contextlib.suppress(Exception):
                    self.fails(whole.warn)


class Sender:
    """All URLs of a command."""

    def __init__(
        self,
        urls: Sequence[str],
        quiet: QuietHours | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self._urls, self._quiet, self._clock = tuple(urls), quiet, clock
        self._boxes: list[Mailbox] = []
        self._kept: list[Message] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def put(self, message: Message, *, at_once: bool = False) -> None:
        """Send a message.  ``at_once``: also in quiet hours, with what was kept."""
        left = self._quiet_seconds()
        with self._lock:
            self._kept = [*self._kept, message][-MOST:]
            if left <= 0 or at_once:
                self._send_kept()
            elif self._timer is None:
                self._timer = threading.Timer(left + 1.0, self._after_quiet)
                self._timer.daemon = True
                self._timer.start()

    def close(self, warn: Warn) -> None:
        """At most five seconds; then the services that did not answer are named, unless they were before."""
        until = time.monotonic() + SECONDS
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._kept and not self._handed_over():
                self._send_kept()
        for box in self._boxes:
            box.close(until)
        for box in self._boxes:
            if box.failed:
                box.fails(warn)

    def _quiet_seconds(self) -> float:
        return 0.0 if self._quiet is None else self._quiet.seconds_left(self._clock())

    def _after_quiet(self) -> None:
        with self._lock:
            self._timer = None
            self._send_kept()

    def _send_kept(self) -> None:
        """Called with the lock held."""
        if not self._kept:
            return
        self._boxes = self._boxes or [Mailbox(url) for url in self._urls]
        whole, self._kept = together(self._kept), []
        for box in self._boxes:
            box.put(whole)

    def _handed_over(self) -> bool:
        """Give what was kept to a process that sends it after the quiet hours.  False if they are over."""
        left = self._quiet_seconds()
        if left <= 0:
            return False
        whole = together(self._kept)
        order = {"seconds": left, "urls": self._urls, "title": whole.title, "body": whole.body}
        try:
            hand_over(order)
        except OSError:
            return False
        self._kept = []
        return True


def hand_over(order: dict[str, Any]) -> None:
    """Start ``hpo.study.later``.  The URLs go through a pipe: a command line can be read by other users."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo.study.later"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *([known] if known else [])])},
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(json.dumps(order).encode())


def scheme(url: str) -> str:
    """The part of a URL that may be printed: the service."""
    name, separator, _ = url.partition("://")
    return clean_text(name)[:20] if separator else "no scheme://"


def service(url: str) -> Any:
    """Apprise with one service, or None.  Apprise logs URLs, which contain secrets, so its log is turned off."""
    try:
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        found = apprise.Apprise()
        return found if found.add(url) else None
    except Exception:  # a plugin may raise anything
        return None


def send(url: str, title: str, body: str) -> bool:
    """Send to one service."""
    try:
        found = service(url)
        return found is not None and bool(found.notify(title=title, body=body))
    except Exception:  # a plugin may raise anything, and a notification must not end a command
        return False
