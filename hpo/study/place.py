"""Where a study's database is: study.db in its folder, or a database server.

Owns storage.json (the server's address without its password), which addresses are accepted, and where a password comes
from: ``--storage``, HPO_STORAGE, or what the driver itself reads (~/.pgpass).  Does not connect; see
``hpo.study.storage``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hpo.study.folder import StudyFolder, read_json
from trainer.errors import ConfigError, MachineError, install_with
from trainer.files import write_new

if TYPE_CHECKING:
    from sqlalchemy import URL

VARIABLE = "HPO_STORAGE"
FORM = "postgresql+psycopg://USER@HOST/DATABASE"
# dialect and driver → the driver's module, and the extra that installs it
DRIVERS = {"postgresql+psycopg": ("psycopg", "postgres"), "mysql+pymysql": ("pymysql", "mysql")}
SHORT = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}

# ``--storage`` of this process's command.
STORAGE: ContextVar[str | None] = ContextVar("STORAGE", default=None)


@dataclass(frozen=True)
class Place:
    """A study on a database server.

    ``url`` has no password.  ``folder`` is a random name for the study's folder: a study of the same name that belongs
    to another folder is not touched.
    """

    url: str
    study: str
    folder: str


def place_of(folder: StudyFolder) -> Place | None:
    """Where the folder's study is.  None: in its own study.db, or nowhere yet."""
    found = read_json(folder.storage)
    if found is None:
        return None
    try:
        return Place(str(found["url"]), str(found["study"]), str(found["folder"]))
    except KeyError as error:
        raise MachineError(f"{folder.storage} has no {error}", "restore the file from a backup") from None


def chosen_place(folder: StudyFolder) -> Place | None:
    """Where the study of ``hpo search`` is or will be.  Raises ConfigError if ``--storage`` contradicts the folder."""
    found, given = place_of(folder), STORAGE.get()
    if found is not None and given and not same_database(url := parsed(given), parsed(found.url)):
        raise ConfigError(
            f"study {folder.name} is in the database at {found.url}, but --storage names {without_password(url)}",
            "leave --storage out, or start a study under another name: hpo search NAME --storage …",
        )
    if found is not None or not (given or os.environ.get(VARIABLE)):
        return found
    if folder.database.is_file():
        if given:
            raise ConfigError(
                f"study {folder.name} was begun in its own {folder.database.name}, so --storage cannot be used",
                "leave --storage out, or start a study under another name: hpo search NAME --storage …",
            )
        return None
    return Place(without_password(parsed(given or os.environ[VARIABLE])), folder.name, uuid.uuid4().hex)


def beside(folder: StudyFolder, parent: StudyFolder) -> Place | None:
    """Where a confirmation or target trials are stored: in the same database as their study."""
    found = place_of(parent)
    if found is None or folder.has_study:
        return place_of(folder)
    return Place(found.url, folder.name, uuid.uuid4().hex)


def settle(folder: StudyFolder, place: Place | None) -> None:
    """Write storage.json, unless another worker has just written it."""
    if place is not None and not folder.storage.is_file():
        write_new(folder.storage, json.dumps(asdict(place), indent=1))


def address(place: Place) -> URL:
    """The address with its password.

    One machine may reach the same server under another name than another machine: ``--storage`` goes before the stored
    address, and so does HPO_STORAGE, each if it names the same database.
    """
    stored = parsed(place.url)
    texts = (STORAGE.get(), os.environ.get(VARIABLE))
    given, usual = (url if url and same_database(url, stored) else None for url in map(_parsed, texts))
    if given is None:
        return usual or stored
    if given.password is None and usual is not None and usual.username == given.username:
        return given.set(password=usual.password)
    return given


def same_database(one: URL, other: URL) -> bool:
    """Whether two addresses can be of one database.  The server's name and port do not matter: each machine may have
    its own for it."""
    return (one.get_backend_name(), one.database) == (other.get_backend_name(), other.database)


def is_renamed(place: Place) -> bool:
    """Whether this process reaches the server under another name than the stored one.  It may be another server."""
    own, stored = address(place), parsed(place.url)
    return (own.host, own.port) != (stored.host, stored.port)


def _parsed(text: str | None) -> URL | None:
    return parsed(text) if text else None


def parsed(text: str) -> URL:
    """A database address.  Raises ConfigError, without repeating the text: it may contain a password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    if text.startswith("grpc:"):
        raise ConfigError(
            "grpc:// cannot be used: claims are rows of a table, and Optuna's gRPC proxy passes on trials only",
            f"give every worker the database: --storage {FORM}",
        )
    if text.count("@") > 1:  # SQLAlchemy would take the rest of a password for the server's name
        raise ConfigError(
            "the address of the database has more than one @",
            "write an @ that belongs to the password or the user as %40, for example USER:PASS%40WORD@HOST/DATABASE",
        )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError("the address of the database cannot be read", f"write {FORM}") from None
    url = url.set(drivername=SHORT.get(url.drivername, url.drivername))
    if url.get_backend_name() == "sqlite":
        raise ConfigError(
            "--storage is for a database server; without it a study is a SQLite file in its own folder",
            f"leave --storage out, or write {FORM}",
        )
    if url.drivername not in DRIVERS:
        raise ConfigError(
            f"--storage cannot be {url.drivername}", f"use one of: {', '.join(f'{d}://…' for d in DRIVERS)}"
        )
    if not url.database:
        raise ConfigError("--storage names no database", f"write {FORM}")
    if any("password" in name for name in url.query):
        raise ConfigError("--storage has a password behind the ?", "write it as USER:PASSWORD@HOST")
    module, extra = DRIVERS[url.drivername]
    if importlib.util.find_spec(module) is None:
        raise MachineError(f"{module} is not installed", install_with(extra))
    return url


def without_password(url: URL) -> str:
    """The address as it is stored and shown."""
    return url._replace(password=None).render_as_string()  # ``set`` ignores None


def shown(text: str) -> str:
    """``without_password`` of a word of a command line; empty if it is no address."""
    try:
        return without_password(parsed(text))
    except (ConfigError, MachineError):
        return ""
