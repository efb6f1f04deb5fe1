"""The out-of-memory ladder: its order, what it never changes, and real runs that go down it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.cli.main import main
from hpo.train.ladder import RunLadder
from tests.tiny_run import TINY, stop_after
from tests.tiny_search import draw_images
from trainer.bases.sd15 import SD15
from trainer.compute.fp8 import holds_fp8
from trainer.config import TrainConfig
from trainer.memory.ladder import next_rung


def walk(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Every rung down to the bottom."""
    found: list[tuple[str, TrainConfig]] = []
    while rung := next_rung(config, tuple(name for name, _ in found)):
        config = rung.config
        found.append((rung.name, config))
    return found


def test_the_order_is_the_one_that_was_decided() -> None:
    config = TrainConfig(train_batch_size=4, resolution=1024)
    assert [name for name, _ in walk(config)] == [
        "batch 2",
        "batch 1",
        "checkpointing 3",
        "checkpointing",
        "fp8 base",
        "resolution 768",
        "frozen text encoders",
        "offload",
    ]


@given(
    st.builds(
        TrainConfig,
        train_batch_size=st.integers(1, 9),
        gradient_accumulation_steps=st.integers(1, 9),
        resolution=st.sampled_from([512, 768, 1024, 1536]),
        gradient_checkpointing=st.booleans(),
        checkpoint_blocks=st.none() | st.integers(1, 9),
        micro_batch_size=st.none() | st.integers(1, 9),
        fp8_base=st.booleans(),
        cpu_offload=st.booleans(),
        network_train_unet_only=st.booleans(),
    )
)
@settings(max_examples=60, deadline=None)
def test_it_ends_and_every_rung_changes_something_but_never_the_effective_batch(config: TrainConfig) -> None:
    configs = [config, *(after for _, after in walk(config))]
    assert len(configs) < 15
    for before, after in pairwise(configs):
        assert before != after
        assert after.effective_batch_size == config.effective_batch_size
        assert after.train_batch_size == config.train_batch_size
        assert after.images_at_once <= before.images_at_once
    last = configs[-1]
    assert last.images_at_once == 1 and last.gradient_checkpointing and last.checkpoint_blocks is None
    assert last.fp8_base and last.resolution <= 768 and last.cpu_offload and not last.updates_text_encoder


def test_only_what_was_given_up_after_a_checkpoint_may_differ_from_it(tmp_path: Path) -> None:
    path, config = tmp_path / "ladder.jsonl", TrainConfig(train_batch_size=2)
    taken = RunLadder(path, config, print)
    taken.step_down("out of memory", 0)
    assert not taken.changed
    taken.step_down("out of memory", 3)
    expected = {"gradient_checkpointing", "checkpoint_blocks"}
    assert taken.changed == expected == RunLadder(path, config, print).changed
    by_hand = RunLadder(path, taken.config, print)
    assert (by_hand.config, by_hand.changed, by_hand.tried) == (taken.config, expected, ())


# Real runs of the command on the tiny base, whose forward pass fails as a card's does: with PyTorch's own error,
# at a limit on what is in it.

SETTINGS = (
    TINY
    + """
learning_rate = 1e-3
train_batch_size = 4
max_train_epochs = 3
save_precision = "float"
"""
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_images(tmp_path / "images" / "2_zkw figure", count=4)
    (tmp_path / "settings.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def train(base: Path, *words: str) -> Result:
    command = ["train", "settings.toml", "--base", str(base), "--data", "images", "--device", "cpu"]
    return CliRunner().invoke(main, [*command, *words], catch_exceptions=False)


def a_card_that_holds(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[SD15, torch.Tensor, Any], bool], *, from_call: int = 0
) -> None:
    """Let the forward pass run out of memory unless ``fits``, from a call on: something else took memory."""
    whole, calls = SD15.predict, iter(range(1_000_000))

    def predict(
        self: SD15, noisy: torch.Tensor, times: torch.Tensor, states: Any, sizes: Any
    ) -> torch.Tensor:
        if next(calls) >= from_call and torch.is_grad_enabled() and not fits(self, noisy, states):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, noisy, times, states, sizes)

    monkeypatch.setattr(SD15, "predict", predict)


def rungs(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "ladder.jsonl").read_text().splitlines()]


def steps(run: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(run, "train.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]


def weights(path: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def assert_close(first: str, second: str) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=5e-3, atol=2e-6, msg=name)


def test_memory_that_runs_out_in_mid_run_costs_no_step_and_does_not_change_the_result(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 samples in batches of 4: 2 steps an epoch.  The dry step and 3 real ones go well, then half fits."""
    assert train(base, "--output", "free").exit_code == 0
    a_card_that_holds(monkeypatch, lambda self, noisy, states: len(noisy) <= 2, from_call=4)
    result = train(base, "--output", "tight")
    assert result.exit_code == 0, result.output
    taken = rungs("tight/lora.run")
    assert [(row["rung"], row["step"]) for row in taken] == [("batch 2", 3)]
    assert "the effective batch stays 4" in result.output
    assert [row["step"] for row in steps("tight/lora.run")] == [1, 2, 3, 4, 5, 6]
    free = [row["loss"] for row in steps("free/lora.run")]
    assert [row["loss"] for row in steps("tight/lora.run")] == pytest.approx(free, rel=1e-4)
    assert_close("free/lora.safetensors", "tight/lora.safetensors")


def test_at_the_bottom_it_says_what_was_tried(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card_that_holds(monkeypatch, lambda *_: False)
    result = train(base)
    assert result.exit_code == 6
    names = [row["rung"] for row in rungs("output/lora.run")]
    assert names == [
        *("batch 2", "batch 1", "checkpointing 3", "checkpointing"),
        *("fp8 base", "frozen text encoders", "offload"),
    ]
    assert "nothing left to give up" in result.output and "Traceback" not in result.output
    assert not Path("output/lora.safetensors").exists()


def test_the_base_goes_to_8_bits_and_the_run_goes_on(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card_that_holds(monkeypatch, lambda self, noisy, states: holds_fp8(self.unet), from_call=3)
    result = train(base, "--set", "gradient_checkpointing=true", "--set", "micro_batch_size=1")
    assert result.exit_code == 0, result.output
    assert [row["rung"] for row in rungs("output/lora.run")] == ["fp8 base"]
    assert [row["step"] for row in steps("output/lora.run")] == [1, 2, 3, 4, 5, 6]


def test_frozen_text_encoders_keep_what_they_had_learned(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = lambda self, noisy, states: not states.hidden_BLD.requires_grad  # noqa: E731
    a_card_that_holds(monkeypatch, frozen, from_call=4)
    words = ["gradient_checkpointing=true", "micro_batch_size=4", "fp8_base=true", "save_every_n_steps=3"]
    sets = [word for name in [*words, "train_batch_size=1"] for word in ("--set", name)]
    result = train(base, *sets)
    assert result.exit_code == 0, result.output
    assert [(row["rung"], row["step"]) for row in rungs("output/lora.run")] == [("frozen text encoders", 3)]
    early, late = weights("output/lora-step00000003.safetensors"), weights("output/lora.safetensors")
    assert early.keys() == late.keys()
    text = {name for name in late if name.startswith("lora_te")}
    assert text and all(torch.equal(early[name], late[name]) for name in text)
    assert any(not torch.equal(early[name], late[name]) for name in late.keys() - text)


def test_a_resumed_run_remembers_its_rungs_and_a_finished_one_is_known_again(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card_that_holds(monkeypatch, lambda self, noisy, states: len(noisy) <= 2, from_call=2)
    assert train(base, "--output", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGINT)
        assert train(base, "--output", "stopped").exit_code == 130
    again = train(base, "--output", "stopped")
    assert again.exit_code == 0 and "as before: 2 of the 4 images" in again.output
    assert len(rungs("stopped/lora.run")) == 1
    assert_close("whole/lora.safetensors", "stopped/lora.safetensors")
    assert "trained already" in train(base, "--output", "stopped").output
