"""Claims in a database server: a lease for each trial, and a study lock, for workers on any number of machines.

Owns the table hpo_leases and the rules of a lease:

* Its end is a time of the database's clock.  A thread renews it while its process lives.
* Each time it is taken, its fence is counted up.  A result is stored in the transaction that locks the lease's row and
  finds the fence unchanged: a worker whose lease was taken over cannot tell.
* A worker that has not renewed its lease in time by its own clock asks before it goes on.
* The lease of a dead process of this machine counts as free at once: the kernel knows.
* After a restart of the server, leases last for their full time again, so that living workers can renew them.

The study lock is the locked row ``study``, for as long as a transaction lasts.  It keeps the number of trials exact;
that a trial has one worker does not depend on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from hpo.study.locks import Holder
from hpo.study.optunaparts import within
from hpo.study.ownership import ClaimLost
from trainer.errors import MachineError

LEASE_SECONDS = 120.0  # how long a silent worker keeps its trial
RENEWALS = 4  # in that time
STUDY_WAIT_SECONDS = 600  # for other workers that choose a trial: many may begin at once

TABLE = sql.Table(
    "hpo_leases",
    sql.MetaData(),
    sql.Column("study", sql.String(200), primary_key=True),
    sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("fence", sql.BigInteger, nullable=False),
    sql.Column(
        "expires", sql.Double, nullable=False
    ),  # seconds since 1970 by the database's clock; 0: released
    sql.Column("worker", sql.String(36), nullable=False),
    sql.Column("host", sql.String(255), nullable=False),
    sql.Column("boot", sql.String(100), nullable=False),
    sql.Column("pid", sql.BigInteger, nullable=False),
    sql.Column("started", sql.String(32), nullable=False),
)


class now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock when the statement runs, not when its transaction began."""

    type = sql.Double()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **more: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


@compiles(now, "mysql")
@compiles(now, "mariadb")
def _now_mysql(element: now, compiler: Any, **more: Any) -> str:
    return "(unix_timestamp(sysdate(6)) + 0e0)"


def create_table(engine: sql.Engine) -> None:
    TABLE.metadata.create_all(engine)


@dataclass(frozen=True)
class Worker:
    """This process: ``worker`` is a random name; the rest says whether it lives, to processes of its machine."""

    worker: str
    host: str
    boot: str
    pid: int
    started: str


def this_worker() -> Worker:
    return _worker(os.getpid())


@cache
def _worker(pid: int) -> Worker:
    return Worker(str(uuid.uuid4()), socket.gethostname()[:255], _boot(), pid, _started(pid))


def _boot() -> str:
    """This start of this machine, and the container: in another one, process numbers mean other processes."""
    found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{found} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine's start; empty if there is no such process."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Times:
    """The database's clock, and when its server was started, in seconds since 1970."""

    now: float
    server_started: float


class Leases:
    """The claims of one study, as this process sees them (``hpo.study.ownership.Ownership``)."""

    def __init__(self, engine: sql.Engine, study: str) -> None:
        self.me = this_worker()
        self.seconds = LEASE_SECONDS
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._study = study
        self._has_row = False
        self._inside: sql.Connection | None = None  # of the study lock, while this process holds it
        self._live: dict[str, Holder] | None = None  # of other workers, as it was when it was taken
        self._held: list[Lease] = []
        self._guard = threading.Lock()
        self._renewer: threading.Thread | None = None

    # hpo.study.ownership.Ownership

    @contextmanager
    def study(self) -> Iterator[None]:
        self._make_study_row()
        with self.transaction() as connection:
            try:
                connection.execute(self._row("study").with_for_update())
            except OperationalError as error:
                if error.connection_invalidated:
                    raise
                raise MachineError(
                    f"another worker has been choosing a trial for {STUDY_WAIT_SECONDS} s",
                    "run the same command again; if that does not help, stop the workers one by one",
                ) from None
            self._inside, self._live = connection, self._living(connection)
            try:
                yield
            finally:
                self._inside = self._live = None

    def trial(self, number: int) -> Lease:
        return Lease(self, f"trial {number}")

    def base(self) -> Lease:
        return Lease(self, "base")

    @contextmanager
    def alone(self, name: str, work: str, hint: str) -> Iterator[None]:
        lease = Lease(self, name)
        if not lease.try_acquire():
            other = lease.holder()
            raise MachineError(f"{other.words if other else 'another process'} already {work}", hint)
        try:
            yield
        finally:
            lease.release()

    def runners(self, numbers: Iterable[int]) -> dict[int, Holder | None]:
        with self.transaction() as connection:
            live = self._living(connection)
        return {number: live.get(f"trial {number}") for number in numbers}

    def survives(self, error: Exception) -> bool:
        cause = error.__cause__
        return isinstance(cause, OperationalError | InterfaceError) or (
            isinstance(cause, DBAPIError) and cause.connection_invalidated
        )

    # For Lease

    @contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        """A transaction of its own.  Errors are Optuna's."""
        try:
            with self._engine.connect() as connection, connection.begin():
                self._limit(connection)
                yield connection
        except SQLAlchemyError as error:
            raise StorageInternalError("the claims of the study cannot be read or written") from error

    def is_free(self, row: sql.Row[Any], times: Times) -> bool:
        """Whether a lease can be taken: released, expired, of a dead process of this machine, or of this process."""
        if row.worker == self.me.worker or row.expires == 0:
            return True
        if row.boot == self.me.boot and _started(row.pid) != row.started:
            return True
        return bool(times.now >= max(row.expires, times.server_started + self.seconds))

    def take(self, name: str) -> int | None:
        """Take a lease: its fence, or None if another worker has it."""
        if self._live is not None and name in self._live:
            return None
        key = {"study": self._study, "name": name}
        with self.transaction() as connection:
            if self._inside is not None:
                self._inside.execute(sql.select(1))  # fails if the server has ended the study lock meanwhile
            row = connection.execute(self._row(name).with_for_update()).one_or_none()
            if row is not None and not self.is_free(row, self.times(connection)):
                return None
            values = {**asdict(self.me), "expires": now() + self.seconds}
            if row is not None:
                connection.execute(self._update(name).values(**values, fence=row.fence + 1))
                return int(row.fence) + 1
            try:
                with connection.begin_nested():
                    connection.execute(sql.insert(TABLE).values(**key, **values, fence=1))
            except IntegrityError:  # another process was faster
                return None
            return 1

    def keep(self, lease: Lease) -> None:
        """Renew a lease from now on, in the background."""
        with self._guard:
            self._held.append(lease)
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew_all, name="leases", daemon=True)
                self._renewer.start()

    def renew(self, lease: Lease) -> None:
        """Renew a lease, also one that has ended and was not taken.  Notes if it was taken."""
        asked = _clock()
        with self.transaction() as connection:
            changed = connection.execute(
                self._update(lease.name)
                .where(TABLE.c.worker == self.me.worker, TABLE.c.fence == lease.fence, TABLE.c.expires > 0)
                .values(expires=now() + self.seconds)
            )
        if changed.rowcount:
            lease.sure_until = asked + self.seconds
        else:
            lease.lost = True

    def drop(self, lease: Lease) -> None:
        """Give a lease back.  If that fails, it ends by itself."""
        with self._guard:
            if lease in self._held:
                self._held.remove(lease)
        if lease.lost:
            return
        with contextlib.suppress(StorageInternalError), self.transaction() as connection:
            connection.execute(
                self._update(lease.name)
                .where(TABLE.c.worker == self.me.worker, TABLE.c.fence == lease.fence)
                .values(expires=0.0)
            )

    def row(self, connection: sql.Connection, name: str, *, locked: bool = False) -> sql.Row[Any] | None:
        query = self._row(name)
        return connection.execute(query.with_for_update() if locked else query).one_or_none()

    def times(self, connection: sql.Connection) -> Times:
        if connection.dialect.name == "postgresql":
            started: sql.ColumnElement[float] = sql.literal_column(
                "extract(epoch FROM pg_postmaster_start_time())::double precision"
            )
            return Times(*connection.execute(sql.select(now(), started)).one())
        time_now = float(connection.execute(sql.select(now())).scalar_one())
        _, seconds = connection.execute(sql.text("SHOW GLOBAL STATUS LIKE 'Uptime'")).one()
        return Times(time_now, time_now - float(seconds))

    def holder_in(self, row: sql.Row[Any]) -> Holder:
        return Holder(int(row.pid), "" if row.boot == self.me.boot else row.host)

    # Own

    def _row(self, name: str) -> sql.Select[Any]:
        return sql.select(TABLE).where(TABLE.c.study == self._study, TABLE.c.name == name)

    def _update(self, name: str) -> sql.Update:
        return sql.update(TABLE).where(TABLE.c.study == self._study, TABLE.c.name == name)

    def _make_study_row(self) -> None:
        """The row that is locked.  One is enough for the life of a study."""
        if self._has_row:
            return
        with self.transaction() as connection:
            if self.row(connection, "study") is None:
                values = {
                    **asdict(self.me),
                    "study": self._study,
                    "name": "study",
                    "fence": 0,
                    "expires": 0.0,
                }
                with contextlib.suppress(IntegrityError), connection.begin_nested():
                    connection.execute(sql.insert(TABLE).values(**values))
        self._has_row = True

    def _limit(self, connection: sql.Connection) -> None:
        """A worker that stops inside a transaction must not keep its locks for ever."""
        idle = max(1, int(self.seconds))
        if connection.dialect.name == "postgresql":
            limits = {"lock_timeout": STUDY_WAIT_SECONDS, "idle_in_transaction_session_timeout": idle}
            connection.execute(
                sql.select(
                    *(sql.func.set_config(name, f"{seconds}s", True) for name, seconds in limits.items())
                )
            )
        else:
            connection.execute(
                sql.text(
                    f"SET SESSION innodb_lock_wait_timeout = {STUDY_WAIT_SECONDS}, SESSION wait_timeout = {idle}"
                )
            )

    def _living(self, connection: sql.Connection) -> dict[str, Holder]:
        """The leases of other workers that have not ended, by name."""
        times = self.times(connection)
        query = sql.select(TABLE).where(TABLE.c.study == self._study, TABLE.c.expires > 0)
        rows = connection.execute(query).all()
        return {row.name: self.holder_in(row) for row in rows if not self.is_free(row, times)}

    def _renew_all(self) -> None:
        while True:
            time.sleep(self.seconds / RENEWALS)
            with self._guard:
                held = [lease for lease in self._held if not lease.lost]
                if not held:
                    self._renewer = None
                    return
            for lease in held:
                with contextlib.suppress(StorageInternalError):  # asked again next time, or by the worker
                    self.renew(lease)


class Lease:
    """One lease of this process (``hpo.study.ownership.Claimed``)."""

    def __init__(self, leases: Leases, name: str) -> None:
        self._leases = leases
        self.name = name
        self.fence = 0  # 0: not taken
        self.lost = False
        self.sure_until = 0.0  # by this machine's clock

    def try_acquire(self) -> bool:
        assert not self.fence, f"{self.name} is already held by this process"
        asked = _clock()
        fence = self._leases.take(self.name)
        if fence is None:
            return False
        self.fence, self.lost, self.sure_until = fence, False, asked + self._leases.seconds
        self._leases.keep(self)
        return True

    def release(self) -> None:
        if self.fence:
            self._leases.drop(self)
            self.fence = 0

    def check(self, *, certain: bool = False) -> None:
        if not self.lost and (certain or _clock() >= self.sure_until):
            self._leases.renew(self)
        if self.lost:
            with self._leases.transaction() as connection:
                raise ClaimLost(self._words(self._leases.row(connection, self.name)))

    def holder(self) -> Holder | None:
        with self._leases.transaction() as connection:
            row = self._leases.row(connection, self.name)
            if row is None or self._leases.is_free(row, self._leases.times(connection)):
                return None
            return self._leases.holder_in(row)

    @contextmanager
    def telling(self, trial: optuna.Trial) -> Iterator[optuna.Trial]:
        with self._leases.transaction() as connection:
            row = self._leases.row(connection, self.name, locked=True)
            if row is None or row.worker != self._leases.me.worker or row.fence != self.fence:
                self.lost = True
                raise ClaimLost(self._words(row))
            yield within(trial, connection)

    def _words(self, row: sql.Row[Any] | None) -> str:
        if row is None:
            return f"{self.name} is no longer this worker's: its claim was deleted from the database"
        by = (
            "this process itself"
            if row.worker == self._leases.me.worker
            else self._leases.holder_in(row).words
        )
        return (
            f"{self.name} is no longer this worker's: it was silent for more than {self._leases.seconds:.0f} s, and "
            f"{by} has taken the trial over; only that result counts"
        )
