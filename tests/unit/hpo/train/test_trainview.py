"""What a person sees while one LoRA is trained."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from hpo.train.view import TrainView
from trainer.events import Skipped, Step


def step(number: int, loss: float, seconds: float) -> Step:
    return Step(
        step=number,
        total_steps=10,
        epoch=1,
        total_epochs=2,
        loss=loss,
        learning_rate=1.5e-4,
        text_encoder_lr=5e-5,
        grad_norm=0.5,
        seconds=seconds,
    )


def test_the_bar_shows_loss_rate_seconds_a_step_and_time_left() -> None:
    screen = io.StringIO()
    view = TrainView(Console(file=screen, force_terminal=True, width=80, color_system=None), "zed")
    view.on_event(step(1, 0.25, 2.0))
    view.on_event(Skipped(2, "loss"))
    with view:
        pass
    shown = " ".join(screen.getvalue().split())
    for words in (
        "zed",
        "step 1/10",
        "epoch 1/2",
        "loss 0.2500",
        "lr 1.50e-4",
        "2.0 s/step",
        "1 skipped",
    ):
        assert words in shown, words
    assert "less than a minute left" in shown and view.seconds_left() == 18  # nine steps of two seconds


def test_time_left_counts_what_is_done_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    view = TrainView(Console(file=io.StringIO(), width=80), "zed")
    for number in range(3, 8):
        view.on_event(step(number, 0.1, 2.0))
        now += 40.0  # two seconds of training, then samples
    assert view.seconds_left() == pytest.approx(3 * 40)  # and it does not count up while samples are drawn
    view.on_event(step(10, 0.1, 2.0))
    assert "a few seconds left" in view.line()


def test_without_a_terminal_the_same_is_said_in_lines() -> None:
    screen = io.StringIO()
    view = TrainView(Console(file=screen, width=80), "zed")
    view.on_event(step(9, 0.1, 1.0))
    assert "step 9/10" in view.line() and "a few seconds left" in view.line()
    assert "\x1b" not in screen.getvalue()
