"""A database server, as this process reaches it.

Owns the connections and their limits, waiting for a server that restarts, and the errors of one that cannot be reached.
Does not own what is stored there (Optuna, ``hpo.study.leases``).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpo.study.place import VARIABLE, Place, address, without_password
from trainer.errors import MachineError, first_line
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import URL, Engine

CONNECT_SECONDS = 10  # for one attempt
SILENT_SECONDS = 60  # a connection without any answer is given up (assumed)
PATIENCE_SECONDS = 900.0  # for a server that was reached before: a restart, an update, a cut network
RETRY_SECONDS = 1.0
ATTEMPTS = 10  # workers that begin together create the same tables
CONNECTED: dict[str, dict[str, Any]] = {
    "postgresql": {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": SILENT_SECONDS * 1000,
        "application_name": "hpo",
    },
    "mysql": {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": 2 * SILENT_SECONDS,
        "write_timeout": SILENT_SECONDS,
        "init_command": "SET time_zone = '+00:00'",
    },
}


class Server:
    """One database.  One connection while idle; a claim needs three for a moment."""

    def __init__(self, url: URL) -> None:
        self.words = without_password(url)
        self.say: Callable[[str], None] = lambda text: None
        self._waits = False
        self.storage = self._opened(url)
        self._wait_from_now_on()

    @property
    def engine(self) -> Engine:
        return self.storage.engine

    def _opened(self, url: URL) -> optuna.storages.RDBStorage:
        import optuna
        from sqlalchemy.exc import DatabaseError

        from hpo.study.leases import create_table

        text = (
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        )  # Optuna's format
        kwargs = {
            "pool_pre_ping": True,
            "pool_size": 1,
            "max_overflow": 8,
            "connect_args": CONNECTED[url.get_backend_name()],
        }
        for attempt in range(1, ATTEMPTS + 1):
            try:
                storage = optuna.storages.RDBStorage(text, engine_kwargs=kwargs)
                create_table(storage.engine)
                return storage
            except DatabaseError as error:
                if attempt == ATTEMPTS or not _is_race(error):
                    raise self._unreachable(error, url) from None
                time.sleep(0.05 * attempt)
            except Exception as error:  # Optuna and alembic raise different types
                raise self._unreachable(error, url) from None
        raise AssertionError("not reached")

    def _unreachable(self, error: Exception, url: URL) -> MachineError:
        reason = clean_text(first_line(getattr(error, "orig", None) or error))
        if url.password:
            reason = reason.replace(str(url.password), "***")
        hint = "check that the server runs and can be reached from here"
        if "password" in reason.lower() or "access denied" in reason.lower():
            hint = f"give the password in {VARIABLE} (the whole address), or for PostgreSQL in ~/.pgpass"
        return MachineError(f"cannot open the database at {self.words}: {reason}", hint)

    def _wait_from_now_on(self) -> None:
        """A server that was reached once is waited for when it goes away."""
        from sqlalchemy import event

        @event.listens_for(self.engine, "do_connect")
        def connect(dialect: Any, record: Any, cargs: Any, cparams: Any) -> Any:
            until = time.monotonic() + PATIENCE_SECONDS
            while True:
                try:
                    found = dialect.connect(*cargs, **cparams)
                except dialect.loaded_dbapi.OperationalError:
                    if time.monotonic() > until:
                        raise
                    if not self._waits:
                        minutes = PATIENCE_SECONDS / 60
                        self.say(f"the database does not answer; waiting up to {minutes:.0f} minutes …")
                    self._waits = True
                    time.sleep(RETRY_SECONDS)
                else:
                    if self._waits:
                        self.say("the database answers again")
                    self._waits = False
                    return found


def _is_race(error: Exception) -> bool:
    """Whether another process has just created the same table."""
    text = str(error).lower()
    return any(sign in text for sign in ("already exists", "duplicate", "unique", "deadlock"))


@functools.cache
def _server(url: URL, pid: int) -> Server:
    return Server(url)


def server_of(place: Place) -> Server:
    """The server of a study.  A process has one set of connections for it, and a forked process its own."""
    return _server(address(place), os.getpid())
