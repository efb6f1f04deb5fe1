"""Fixtures of the tests of ``hpo train``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_folder, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5 as a diffusers folder."""
    return save_folder(tiny_base("sd15"), tmp_path_factory.mktemp("base") / "tiny")
