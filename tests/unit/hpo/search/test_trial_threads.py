"""On a CPU a trial goes on with the number of threads it was begun with: another number gives other last bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpo.machine import registry, threads
from hpo.search.trial import run_trial
from tests.tiny_search import Recorder, draw_images, tiny_bench
from trainer.errors import Interrupted
from trainer.events import Event, Step
from trainer.files import read_records, sha256_file


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv(registry.FOLDER, str(tmp_path / "locks"))
    for name in threads.LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 2)
    threads._set.clear()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    threads._set.clear()


def test_a_trial_goes_on_with_its_threads(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = [2]
    monkeypatch.setattr(threads.registry, "enter", lambda: living[0])
    data = draw_images(tmp_path / "images")
    counts: list[tuple[int, int]] = []  # trial, threads of each step

    def trial(root: str, number: int, stop_at: int | None = None) -> str:
        """The LoRA of a trial, which is interrupted after a step if told."""
        bench = tiny_bench(tmp_path / root, data)
        bench.measure_anchors(lambda text: None)
        folder, view = bench.folder.trial(number), Recorder()
        folder.root.mkdir(parents=True, exist_ok=True)
        config = bench.config({**bench.study.baseline, "max_train_epochs": 3}, number)

        def hook(event: Event) -> None:
            if isinstance(event, Step):
                counts.append((number, torch.get_num_threads()))
                view.stop = view.stop or event.step == stop_at

        view.event_hook = hook
        run_trial(bench, folder, config, view)
        return sha256_file(folder.lora)

    whole = trial("whole", 0)
    with pytest.raises(Interrupted):
        trial("stopped", 0, stop_at=3)
    living[0] = 1  # the other worker has ended
    assert trial("stopped", 0) == whole
    assert {number for _, number in counts} == {1}
    rows = read_records(tmp_path / "stopped" / "trial_0000" / "starts.jsonl")
    assert [row["threads"] for row in rows if row["event"] == "start"] == [1, 1]
    counts.clear()
    with pytest.raises(Interrupted):
        trial("stopped", 1, stop_at=1)
    assert {number for _, number in counts} == {2}  # the next one takes what is free
