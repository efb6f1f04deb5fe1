"""``hpo evaluate`` under its supervisor: the images that are done are kept, and the rest follows.  Real processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hpo.cli.main import main
from tests import supervised
from tests.faults.zygote import finish
from tests.supervised import Fault, begin, is_over, once, tell_supervisor
from tests.tiny_run import JUDGING, MINI_CLIP, THREE_CHECKPOINTS, loud_base
from tests.tiny_search import draw_images
from trainer.errors import Interrupted, MachineError
from trainer.files import read_records

pytestmark = pytest.mark.faults
WORDS = ["evaluate", "out", "--clip", str(MINI_CLIP), "--device", "cpu", "--hang-minutes", "0.02"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints, and out-whole: the same, evaluated without a disturbance."""
    import shutil

    torch.set_num_threads(1)
    here = tmp_path_factory.mktemp("trained")
    draw_images(here / "images" / "1_zkw figure", count=4)
    draw_images(here / "images" / "held_out", count=3, seed=2)
    (here / "sd15-character.toml").write_text(JUDGING)
    (here / "settings.toml").write_text(THREE_CHECKPOINTS)
    loud_base(here / "base", "sd15")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        words = ["train", "settings.toml", "--base", "base", "--data", "images", "--device", "cpu"]
        done = CliRunner().invoke(main, [*words, "--output", "out"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        shutil.copytree(here / "out", here / "fresh")
        done = CliRunner().invoke(main, WORDS, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        (here / "out").rename(here / "out-whole")
    return here


@pytest.fixture
def here(trained: Path) -> Path:
    import shutil

    shutil.rmtree(trained / "out", ignore_errors=True)
    shutil.copytree(trained / "fresh", trained / "out")
    return trained


def figures(folder: Path) -> Any:
    return json.loads((folder / "zkw.run" / "evaluation" / "evaluation.json").read_text())


def ends(here: Path, screen: Path, fault: Fault = lambda done, what: None) -> int:
    return finish(begin(here, screen, WORDS, fault))


@pytest.mark.parametrize(("what", "reason"), [(supervised.spin, "hang"), (supervised.crash, "crash:SIGSEGV")])
def test_an_evaluation_whose_process_fails_goes_on_to_the_same_choice(
    here: Path, tmp_path: Path, what: Callable[[], None], reason: str
) -> None:
    screen = tmp_path / "screen"
    assert ends(here, screen, once(tmp_path / "marker", 4, what, "epoch 2")) == 0, screen.read_text()
    assert figures(here / "out") == figures(here / "out-whole")
    deaths = read_records(here / "out" / "zkw.run" / "night.jsonl")
    assert [row["reason"] for row in deaths] == [reason]
    assert re.search("[12]/3 checkpoints were scored before", screen.read_text())


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGINT,), Interrupted.exit_code),
        ((signal.SIGTERM, signal.SIGTERM), Interrupted.TERMINATED),
    ],
)
def test_a_signal_ends_an_evaluation_with_its_code_and_the_same_command_goes_on(
    here: Path, tmp_path: Path, numbers: tuple[int, ...], code: int
) -> None:
    screen, marker = tmp_path / "screen", tmp_path / "marker"
    assert ends(here, screen, once(marker, 4, tell_supervisor(*numbers), "epoch 2")) == code
    assert "finished images are kept" in screen.read_text() and is_over(int(marker.read_text()))
    assert not (here / "out" / "zkw.run" / "night.jsonl").exists()
    assert ends(here, screen) == 0 and figures(here / "out") == figures(here / "out-whole")


def test_a_second_ctrl_c_ends_an_evaluation_at_once(here: Path, tmp_path: Path) -> None:
    def what() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        supervised.until(supervised.is_asked_to_stop)
        os.kill(os.getppid(), signal.SIGINT)
        while True:
            signal.pause()

    screen = tmp_path / "screen"
    assert ends(here, screen, once(tmp_path / "marker", 4, what, "epoch 2")) == Interrupted.exit_code
    assert "stopped at once" in screen.read_text()


@pytest.mark.parametrize("free", [4, 24])
def test_a_disk_that_is_full_ends_an_evaluation_and_loses_nothing(
    here: Path, tmp_path: Path, free: int
) -> None:
    """``free``: writes to files before the disk is full for ever."""
    screen = tmp_path / "screen"
    code = finish(begin(here, screen, WORDS, prepare=lambda: supervised.disk_full_after(free)))
    said = screen.read_text()
    assert code == MachineError.exit_code, said
    assert "disk full" in said and "Traceback" not in said and "goes on in" not in said
    assert ends(here, screen) == 0 and figures(here / "out") == figures(here / "out-whole")
