"""A real server on this machine that takes the messages of ``--notify``."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Inbox:
    """A real server, and what it received.  ``arrived`` is released for each message."""

    def __init__(self) -> None:
        self.received: list[dict[str, str]] = []
        self.arrived = threading.Semaphore(0)
        self.status = 200
        inbox = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if inbox.status == 200:
                    inbox.received.append(message)
                self.send_response(inbox.status)
                self.end_headers()
                inbox.arrived.release()

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"json://127.0.0.1:{self.server.server_port}/s3cret"

    @property
    def titles(self) -> list[str]:
        return sorted(message["title"] for message in self.received)

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=20), "the message did not arrive"


@contextmanager
def open_inbox() -> Iterator[Inbox]:
    box = Inbox()
    try:
        yield box
    finally:
        box.server.shutdown()
        box.server.server_close()


class Post:
    """In place of a ``Sender``: keeps what would be sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def put(self, message: Any, *, at_once: bool = False) -> None:
        self.messages.append(message)
