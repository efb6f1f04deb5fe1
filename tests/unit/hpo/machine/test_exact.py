"""Deterministic mode is off unless asked for, and then complete."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpo.machine.exact import wants_deterministic
from trainer.errors import ConfigError

STATE = """
import os
from hpo.machine import deterministic
on = deterministic()
import torch
print(on, torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
      torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(
    ("value", "state"),
    [
        ("0", "False False False False False None"),
        ("1", "True True True True False :4096:8"),
    ],
)
def test_the_switch(value: str, state: str) -> None:
    own = {name: text for name, text in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    own["HPO_DETERMINISTIC"] = value
    done = subprocess.run([sys.executable, "-c", STATE], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == state


def test_the_usual_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, on in (
        (("", "0", "no", "NO", "False", "off", " Off "), False),
        (("1", "YES", "true", "On"), True),
    ):
        for word in words:
            monkeypatch.setenv("HPO_DETERMINISTIC", word)
            assert wants_deterministic() is on, word
    monkeypatch.setenv("HPO_DETERMINISTIC", "maybe")
    with pytest.raises(ConfigError, match="HPO_DETERMINISTIC=maybe"):
        wants_deterministic()
