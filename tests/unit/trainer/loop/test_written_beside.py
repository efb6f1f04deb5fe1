"""Large checkpoints are written while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.errors import Interrupted, MachineError
from trainer.events import Event, Saved, Step
from trainer.loop import checkpoint, loop
from trainer.loop.loop import Conduct, train


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint counts as large."""
    monkeypatch.setattr(loop, "BESIDE_BYTES", 0)


def trained(folder: Path | None, **options: object) -> tuple[list[Event], str]:
    base, config = tiny_base("sd15"), tiny_config(max_train_epochs=4)
    adapter = inject(base, config)
    how = Conduct(checkpoints=folder, checkpoint_every_seconds=0.0, **options)  # type: ignore[arg-type]
    events: list[Event] = []
    try:
        for event in train(config, base, adapter, tiny_prepared(base, config), how):
            events.append(event)
        return events, adapter.fingerprint()
    except Interrupted:
        return events, ""
    finally:
        adapter.remove()


def test_steps_go_on_while_a_checkpoint_is_written(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one takes until the fourth step is done; the next is not begun before it is complete."""
    fourth, write = threading.Event(), checkpoint.write

    def slow(folder: Path, found: checkpoint.Snapshot) -> Path:
        assert fourth.wait(60)
        return write(folder, found)

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(loop._Saves, "are_due", property(lambda saves: saves._writing is None))
    base, config = tiny_base("sd15"), tiny_config(max_train_epochs=4)
    adapter = inject(base, config)
    seen: list[str] = []
    for event in train(config, base, adapter, tiny_prepared(base, config), Conduct(checkpoints=tmp_path)):
        if isinstance(event, Step):
            seen.append(f"step {event.step}")
            if event.step == 4:
                fourth.set()
        elif isinstance(event, Saved):
            seen.append(f"saved {event.step}")
    adapter.remove()
    first = next(name for name in seen if name.startswith("saved"))
    assert first == "saved 1"
    assert seen.index(first) > seen.index("step 4")


def test_what_is_written_is_the_state_of_its_step_whatever_came_later(large: None, tmp_path: Path) -> None:
    whole, fingerprint = trained(None)
    asked = iter(range(1, 100))
    trained(tmp_path, should_stop=lambda: next(asked) >= 3)
    assert checkpoint.steps_behind(tmp_path) == 3
    resumed, again = trained(tmp_path)
    assert again == fingerprint
    losses = [event.loss for event in whole if isinstance(event, Step)]
    assert [event.loss for event in resumed if isinstance(event, Step)] == losses[3:]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, found: checkpoint.Snapshot) -> Path:
        raise MachineError("the disk is full", "make room")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(MachineError, match="the disk is full"):
        trained(tmp_path)


def test_a_newer_checkpoint_is_not_removed_for_an_older_one(tmp_path: Path) -> None:
    """The second was complete before a step had shown that the first is good."""
    for number in (1, 2, 3):
        (tmp_path / f"step-{number:06d}").mkdir()
    checkpoint.drop_others(tmp_path / "step-000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    checkpoint.drop_others(tmp_path / "step-000004")
    assert len(list(tmp_path.iterdir())) == 2, "what it would be kept for does not exist"
