"""Fixtures that several rooms' tests share.  A test file that needs another one defines its own of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn images, for tiny studies."""
    import torch

    from tests.tiny_search import draw_images

    torch.set_num_threads(1)
    return draw_images(tmp_path_factory.mktemp("data") / "images")
