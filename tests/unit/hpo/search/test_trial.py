"""A trial's own promises: remedies change no result and are remembered; a LoRA too weak to be
seen is its settings'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evaluation.images import images
from evaluation.images.images import Unchanged
from hpo.search.trial import run_trial
from hpo.search.workbench import Workbench
from hpo.study.result import write_params
from tests.tiny_search import Recorder, draw_images, tiny_bench, tiny_study
from trainer.adapters import adapter as adapters
from trainer.config import TrainConfig
from trainer.errors import Interrupted, MachineError
from trainer.files import append_line, read_records


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.set_num_threads(1)
    study = tiny_study({"train": {"gradient_checkpointing": False}})
    found = tiny_bench(tmp_path / "study", draw_images(tmp_path / "images"), study)
    found.folder.trial(0).root.mkdir(parents=True)
    return found


def settings(bench: Workbench, **values: Any) -> TrainConfig:
    return bench.config(bench.study.baseline, 0).with_values(values)


class SmallCard:
    """Refuses to train more than one image at once, or even one."""

    def __init__(self, bench: Workbench, monkeypatch: pytest.MonkeyPatch, fits: int = 1) -> None:
        forward = bench.base.unet.forward

        def limited(sample: Any, *args: Any, **kwargs: Any) -> Any:
            if len(sample) > fits and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(sample, *args, **kwargs)

        monkeypatch.setattr(bench.base.unet, "forward", limited)


def lora_of(bench: Workbench, number: int, config: TrainConfig) -> tuple[str, dict[str, torch.Tensor]]:
    """(the remedy that a trial needed, the weights in its LoRA)."""
    folder = bench.folder.trial(number)
    folder.root.mkdir(parents=True, exist_ok=True)
    result = run_trial(bench, folder, config, Recorder())
    assert result.state == "complete"
    return result.remedy, load_file(folder.lora)


@pytest.mark.parametrize(
    "dropout", [{}, {"network_dropout": 0.3}, {"rank_dropout": 0.3, "module_dropout": 0.1}]
)
def test_image_by_image_the_same_lora_is_trained(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, dropout: dict[str, float]
) -> None:
    bench.measure_anchors(lambda text: None)
    config = settings(bench, gradient_accumulation_steps=2, save_precision="float", **dropout)
    remedy, whole = lora_of(bench, 0, config)
    assert remedy == ""
    SmallCard(bench, monkeypatch)
    recomputing = config.with_values({"gradient_checkpointing": True})
    for number, settled in ((1, config), (2, recomputing)):
        remedy, split = lora_of(bench, number, settled)
        assert remedy.endswith("single images")
        assert split.keys() == whole.keys()
        for key, weight in whole.items():
            torch.testing.assert_close(split[key], weight, rtol=1e-3, atol=1e-5)


def test_out_of_memory_is_tried_with_checkpointing_then_image_by_image(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_anchors(lambda text: None)
    SmallCard(bench, monkeypatch)
    result = run_trial(bench, bench.folder.trial(0), settings(bench), Recorder())
    assert (result.state, result.remedy) == ("complete", "gradient_checkpointing, single images")


def test_the_remedy_of_an_infeasible_trial_is_kept(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallCard(bench, monkeypatch, fits=0)
    result = run_trial(bench, bench.folder.trial(0), settings(bench), Recorder())
    assert (result.state, result.reason, result.remedy) == (
        "infeasible", "out_of_memory", "gradient_checkpointing, single images",
    )  # fmt: skip


def test_an_interrupted_trial_goes_on_with_the_remedy_that_it_needed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_anchors(lambda text: None)
    SmallCard(bench, monkeypatch)
    view, folder = Recorder(), bench.folder.trial(0)
    view.stop = True  # after the first step that works
    with pytest.raises(Interrupted):
        run_trial(bench, folder, settings(bench), view)
    assert list(folder.checkpoints.glob("step-*"))
    before = len([row for row in read_records(folder.starts) if row["event"] == "remedy"])
    view.stop = False
    result = run_trial(bench, folder, settings(bench), view)
    assert (result.state, result.remedy) == ("complete", "gradient_checkpointing, single images")
    after = [row for row in read_records(folder.starts) if row["event"] == "remedy"]
    assert len(after) == before == 2  # it did not run out of memory again
    steps = [row["step"] for row in read_records(folder.steps) if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_checkpoint_of_whole_batches_goes_on_image_by_image(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_anchors(lambda text: None)
    view, folder = Recorder(), bench.folder.trial(0)
    view.stop = True
    with pytest.raises(Interrupted):
        run_trial(bench, folder, settings(bench), view)
    remedies = ["gradient_checkpointing", "single images"]
    append_line(folder.starts, json.dumps({"event": "remedy", "remedies": remedies}))
    SmallCard(bench, monkeypatch)
    view.stop = False
    result = run_trial(bench, folder, settings(bench), view)
    assert (result.state, result.remedy) == ("complete", ", ".join(remedies))
    steps = [row["step"] for row in read_records(folder.steps) if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


@pytest.fixture
def unchanged(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    bench.measure_anchors(lambda text: None)
    monkeypatch.setattr(images, "SAME_WITHIN", 255)
    yield bench


def test_a_lora_in_place_that_changes_no_pixel_is_its_settings_fault(unchanged: Workbench) -> None:
    result = run_trial(unchanged, unchanged.folder.trial(0), settings(unchanged), Recorder())
    assert (result.state, result.reason, result.value) == ("infeasible", "no_effect", -1)


def test_a_lora_that_is_switched_off_is_the_tools_fault(
    unchanged: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_to = adapters.Adapter.round_to

    def switched_off(self: Any, precision: str) -> None:
        round_to(self, precision)
        layer = self.layers[0].target
        module = self.base.components()[layer.component].get_submodule(layer.path)
        module.enable_adapters(False)

    monkeypatch.setattr(adapters.Adapter, "round_to", switched_off)
    result = run_trial(unchanged, unchanged.folder.trial(0), settings(unchanged), Recorder())
    assert (result.state, result.reason) == ("failed", Unchanged.__name__)


def test_a_trial_folder_that_cannot_be_made_is_a_machine_error(bench: Workbench) -> None:
    folder = bench.folder.trial(1)
    folder.root.write_text("a file in the way")
    with pytest.raises(MachineError, match="cannot write"):
        write_params(folder, {}, (), settings(bench))


def test_the_compute_type_is_a_fact_of_the_study(bench: Workbench) -> None:
    assert bench.facts()["compute type"] == "torch.float32"
