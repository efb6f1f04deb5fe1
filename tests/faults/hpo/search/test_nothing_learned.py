"""A real search whose rates are far too low: it says so after five trials, and confirm and transfer refuse it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hpo.confirm.run import confirm
from hpo.confirm.wanted import ConfirmRequest
from hpo.study.folder import StudyFolder
from hpo.study.learning import learning_lines
from hpo.study.storage import open_study
from hpo.transfer.source import read_source
from tests.tiny_search import draw_images
from tests.tiny_session import run_session
from trainer.errors import ConfigError

pytestmark = pytest.mark.faults
TOO_LOW = ("learning_rate={low=1e-7, high=1e-6, log=true}", "baseline.learning_rate=1e-7")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return draw_images(tmp_path_factory.mktemp("data") / "images")


def test_it_is_said_once_after_five_trials_and_again_at_the_end(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "runs" / "flat"
    root.parent.mkdir()
    lines = run_session(root, data, trials=7, sets=TOO_LOW).splitlines()
    said = [n for n, line in enumerate(lines) if line.startswith("nothing learned: none of")]
    finished = [n for n, line in enumerate(lines) if line.startswith("trial=")]
    assert len(said) == 2 and finished[4] < said[0] < finished[5] and said[1] > finished[6]
    assert "none of 5 trials" in lines[said[0]] and "none of 7 trials" in lines[said[1]]
    assert any("learning rate too low: 5 trials hardly changed the weights" in line for line in lines)
    assert any("too few images seen" in line for line in lines)
    assert not any(line.startswith("next: hpo confirm") for line in lines)

    folder = StudyFolder(root)
    assert learning_lines(open_study(folder), folder)[0] == lines[said[1]]
    for number in range(7):
        result = json.loads(folder.trial(number).result.read_text())
        assert result["reason"] == "no_effect" or 0 < result["weight_change"] < 0.01
    request = ConfirmRequest("flat", top=1, seeds=1, runs=root.parent)
    with pytest.raises(ConfigError, match="study flat: nothing learned"):
        confirm(request, Console(file=io.StringIO()), lambda: True)
    with pytest.raises(ConfigError, match="study flat: nothing learned"):
        read_source(folder)


def test_a_search_that_learns_something_says_nothing_of_it(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "runs" / "steep"
    root.parent.mkdir()
    rates = ("learning_rate={low=1e-3, high=1e-1, log=true}", "max_train_epochs={low=1, high=2}")
    text = run_session(root, data, trials=2, sets=rates)
    assert "nothing learned" not in text and "measured: about" in text and "next: hpo confirm steep" in text
