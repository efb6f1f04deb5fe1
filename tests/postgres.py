"""A real PostgreSQL server for tests, in a folder of its own, on a free port of this machine.

PostgreSQL refuses to run as root.  Then it runs as the user ``postgres``, or ``nobody``.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

from sqlalchemy import URL, create_engine, text

from hpo.study.folder import StudyFolder
from hpo.study.place import Place, settle, without_password

USER, PASSWORD = "hpo", "p@ss/w:rd%{x}"  # everything that an address must escape


def find_programs() -> Path | None:
    """The folder of initdb and pg_ctl."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True
    )
    return next((place for place in found if (place / "pg_ctl").exists()), None)


def _other_user() -> str | None:
    """Who runs the server; None: this user."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


class Postgres:
    def __init__(self, more: str = "") -> None:
        programs = find_programs()
        assert programs is not None
        self.programs, self.user = programs, _other_user()
        self.root = Path(
            tempfile.mkdtemp(prefix="hpo-postgres-", dir="/tmp")
        )  # a path that fits into a socket's
        self.data = self.root / "data"
        self.more = more  # options of the server
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        (self.root / "password").write_text(PASSWORD)
        if self.user:
            for path in (self.root, self.root / "password"):
                shutil.chown(path, self.user)
        self._run("initdb", "-D", self.data, "-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "-N",
                  f"--pwfile={self.root / 'password'}")  # fmt: skip
        self.start_again()

    def start_again(self) -> None:
        options = f"-p {self.port} -k {self.root} -c listen_addresses=127.0.0.1 -c fsync=off {self.more}"
        self._control("start", "-o", options, "-l", str(self.root / "log"))

    def restart(self, mode: str = "immediate") -> None:
        """``immediate``: as if it had crashed."""
        self._control("restart", "-m", mode)

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")

    def remove(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def url(self, database: str) -> URL:
        return URL.create("postgresql+psycopg", USER, PASSWORD, "127.0.0.1", self.port, database)

    def new_database(self) -> URL:
        name = f"t{uuid.uuid4().hex[:8]}"
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    def place(self, folder: StudyFolder) -> str:
        """Put the folder's study into a database of its own; the address with its password."""
        url = self.new_database()
        folder.root.mkdir(parents=True, exist_ok=True)
        settle(folder, Place(without_password(url), folder.name, uuid.uuid4().hex))
        return url.render_as_string(hide_password=False)

    def _control(self, *words: str) -> None:
        self._run("pg_ctl", "-D", self.data, "-w", "-s", *words)

    def _run(self, program: str, *words: str | Path) -> None:
        as_user = ["runuser", "-u", self.user, "--"] if self.user else []
        done = subprocess.run(
            [*as_user, self.programs / program, *words],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (program, words, done.stderr, self._log())

    def _log(self) -> str:
        log = self.root / "log"
        return log.read_text()[-2000:] if log.exists() else ""
