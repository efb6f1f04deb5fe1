"""Fixtures that several rooms' tests share.  A test file that needs another one defines its own of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


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
