"""Fixtures that several rooms' tests share.  A test file that needs another one defines its own of the same name."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, find_programs


@pytest.fixture(scope="module", autouse=True)
def objects_that_stay_are_not_looked_through() -> None:
    """The imported libraries make hundreds of thousands of objects that stay.  Python's garbage collector looks through
    them whenever memory is released (``trainer.oom.release``): about a second each time, while both cores were busy."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of its own, on a free port of this machine."""
    if find_programs() is None:
        pytest.skip(
            "NO POSTGRESQL: studies on several machines are not tested here (apt-get install postgresql)"
        )
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session", autouse=True)
def cache_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Traces that tests and the commands they start keep: never in the home of whoever runs the tests."""
    if os.environ.get("PYTEST_XDIST_WORKER"):  # what one process has traced, the other one reads
        folder = tmp_path_factory.getbasetemp().parent / "cache"
        folder.mkdir(exist_ok=True)
    else:
        folder = tmp_path_factory.mktemp("cache")
    own = {"HPO_CACHE": folder, "HPO_LOCKS": tmp_path_factory.mktemp("locks")}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update({name: str(place) for name, place in own.items()})
    yield folder
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn images, for tiny studies."""
    import torch

    from tests.tiny_search import draw_images

    torch.set_num_threads(1)
    return draw_images(tmp_path_factory.mktemp("data") / "images")
