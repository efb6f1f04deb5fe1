"""A run that is stopped or killed goes on where less memory is free than before: the plan is made once,
before the first step, and every rung of the ladder can be followed from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from hpo.cli.main import main
from hpo.train import memory as runmemory
from hpo.train.ladder import RunLadder
from tests.faults.zygote import attempt
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import stop_after
from tests.tiny_search import draw_images
from trainer.bases.sd15 import SD15
from trainer.config import TrainConfig
from trainer.loop import loop
from trainer.memory import ladder
from trainer.memory.footprint import base_facts, predict
from trainer.memory.stacks import SAFE_SHARE, choose

PLENTY = 10**12
SETTINGS = """
resolution = 64
bucket_no_upscale = false
bucket_reso_steps = 32
min_bucket_reso = 32
network_dim = 512
optimizer_type = "AdamW"
mixed_precision = "no"
learning_rate = 1e-3
train_batch_size = 2
max_train_steps = 4
save_precision = "float"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    draw_images(tmp_path / "images" / "2_zkw figure", count=2)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    save_folder(tiny_base("sd15"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(loop.Conduct.__init__.__kwdefaults__, "checkpoint_every_seconds", 0.0)
    return tmp_path


def train(*words: str) -> Result:
    command = ["train", "settings.toml", "--base", "base", "--data", "images", "--device", "cpu", *words]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def free_is(monkeypatch: pytest.MonkeyPatch, bytes_: int) -> None:
    """What the card says is free.  The run itself is on the CPU."""
    monkeypatch.setattr(runmemory, "free_bytes", lambda device: bytes_)


def tight() -> int:
    """As much as makes the planner change what no checkpoint can follow."""
    config = TrainConfig(
        resolution=64, network_dim=512, optimizer_type="AdamW", mixed_precision="no", train_batch_size=2
    )
    facts = base_facts("base")
    in_bf16 = predict(config.with_values({"mixed_precision": "bf16"}), facts).peak_bytes
    vram = int(in_bf16 / SAFE_SHARE) - 10_000
    moved = {move.key for move in choose(config, facts, vram).moves}
    assert moved == {"mixed_precision", "optimizer_type"}
    return vram


def rows(run: str) -> list[dict[str, Any]]:
    path = Path(run, "lora.run/ladder.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(run: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(f"{run}/lora.safetensors")


def test_a_stopped_run_goes_on_bitwise_when_less_is_free(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_is(monkeypatch, PLENTY)
    assert train("--output", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        assert train("--output", "stopped").exit_code == 130
    free_is(monkeypatch, tight())
    again = train("--output", "stopped")
    assert again.exit_code == 0, again.output
    assert rows("stopped") == [] and "going on after step 2" in again.output
    a, b = weights("whole"), weights("stopped")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_plan_is_one_line_and_is_kept_whatever_is_free_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first checkpoint, and stopped after it."""

    def killed() -> None:
        monkeypatch.setitem(loop.Conduct.__init__.__kwdefaults__, "checkpoint_every_seconds", 1e9)
        stop_after(monkeypatch, 1, signal.SIGKILL)
        train()

    free_is(monkeypatch, tight())
    assert attempt(killed) == -signal.SIGKILL
    (plan,) = rows("output")
    assert plan["rung"] == "plan" and plan["step"] == 0
    assert plan["changes"] == {"mixed_precision": ["no", "bf16"], "optimizer_type": ["AdamW", "AdamW8bit"]}
    free_is(monkeypatch, PLENTY)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        result = train()
        assert result.exit_code == 130 and "as before: optimizer_type AdamW → AdamW8bit" in result.output
    free_is(monkeypatch, tight() // 2)
    result = train("--set", "optimizer_type=AdamW8bit")  # by hand, as the plan did
    assert result.exit_code == 0, result.output
    assert rows("output") == [plan]


def test_every_rung_can_be_followed_from_a_checkpoint_also_after_a_kill_between_logging_and_loading(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again the dry step and the loading go well, then the next step runs out of memory."""
    monkeypatch.setattr(ladder, "SMALLER_PX", 32)
    words = ("--set", "network_dim=2", "--set", "optimizer_type=AdamW8bit", "--set", "mixed_precision=auto")

    def dies_on(rung: str, fits: Iterator[bool]) -> None:
        take, forward = RunLadder.take, SD15.predict

        def dying(self: RunLadder, taken: ladder.Rung, *given: Any) -> None:
            take(self, taken, *given)
            if taken.name == rung:
                os.kill(os.getpid(), signal.SIGKILL)

        def running_out(self: SD15, *given: Any) -> torch.Tensor:
            if not next(fits):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, *given)

        monkeypatch.setattr(RunLadder, "take", dying)
        monkeypatch.setattr(SD15, "predict", running_out)
        train(*words)

    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGINT)
        assert train(*words).exit_code == 130
    one_by_one = [True, True, False]  # the dry step computes both images, then the real one fails
    assert attempt(dies_on, "frozen text encoders", iter([True, False] + 5 * one_by_one)) == -signal.SIGKILL
    assert attempt(dies_on, "offload", iter(one_by_one)) == -signal.SIGKILL
    assert [row["rung"] for row in rows("output")] == [
        *("batch 1", "checkpointing 3", "checkpointing", "fp8 base"),
        *("resolution 768", "frozen text encoders", "offload"),
    ]
    assert {row["step"] for row in rows("output")} == {2}
    result = train(*words)
    assert result.exit_code == 0, result.output
    assert result.output.count("as before: ") == 7 and weights("output")
